"""What a Prism cluster is: the one description from which all files for Ray's launcher and for Kubernetes are made.

The defaults are the cluster whose files are in this folder. Names under `example.com` and of the form `my-...` are
examples: another cluster is a JSON file with the fields that differ, given to `prism cluster render --config`.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, Field, PositiveInt, ValidationError, model_validator

from library.errors import InputError

Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")]
"""A name that clouds and Kubernetes take: lower-case letters, digits and hyphens."""


class Part(BaseModel, frozen=True, extra="forbid"):
    """Base of the parts of a description: unknown fields are refused."""


class Image(Part):
    """The container image, built from `cluster/Dockerfile` once for CPUs and once for GPUs."""

    repository: str = "registry.example.com/prism"
    """Where the image is, without a tag."""
    version: str = "0.1.0"
    """Version of the project; the tags are VERSION-cpu and VERSION-ACCELERATOR."""
    accelerator: str = "cu130"
    """The CUDA build of torch in the GPU image, the build argument ACCELERATOR."""

    def name(self, *, gpu: bool) -> str:
        """The image of a machine with or without GPUs."""
        return f"{self.repository}:{self.version}-{self.accelerator if gpu else 'cpu'}"


class Machines(Part):
    """A group of equal machines, and how many there may be."""

    name: Name
    """Name of the group."""
    cpus: PositiveInt
    """CPUs of each machine that Ray schedules by."""
    memory_gib: PositiveInt
    """Memory of each machine."""
    gpus: int = Field(0, ge=0)
    """GPUs of each machine; with any, it runs the GPU image."""
    least: int = Field(0, ge=0)
    """Machines that are always there."""
    most: PositiveInt
    """Machines that the autoscaler may go up to."""
    aws: str
    """Instance type on AWS."""
    gcp: str
    """Machine type on Google Cloud; one with GPUs has them built in (a2, a3, g2)."""
    spot: bool = False
    """Take machines that the cloud may take back at short notice: cheaper, and a training goes on from checkpoints."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"group {self.name}: least {self.least} is above most {self.most}")
        return self


class Head(Part):
    """The machine that runs Ray's control store, the dashboard and the drivers of jobs; no workers are put on it."""

    cpus: PositiveInt = 4
    memory_gib: PositiveInt = 16
    aws: str = "m7i.xlarge"
    gcp: str = "n2-standard-4"


class SecretKey(Part):
    """Where a secret is: a Kubernetes Secret and a key of it. The secret itself is in no file."""

    name: Name
    key: str


class Storage(Part):
    """Storage that all machines see: runs, searches, and the embedded registry unless there is a server for it."""

    path: str = "/mnt/prism"
    """Where it is mounted, and PRISM_HOME."""
    size: str = "1Ti"
    """Size of the volume on Kubernetes."""
    storage_class: str | None = None
    """Storage class on Kubernetes, one that allows ReadWriteMany; None is the cluster's default."""


class Redis(Part):
    """The Redis outside the cluster that keeps Ray's control store on Kubernetes, so that a new head takes over."""

    address: str = "rediss://redis.example.com:6379"
    """Address; rediss:// is TLS."""
    password: SecretKey = SecretKey(name="prism-redis", key="password")


class Secrets(Part):
    """The secrets that the containers use, by reference."""

    token: SecretKey = SecretKey(name="prism-token", key="token")
    """The bearer token that clients of the endpoints present (PRISM_TOKEN)."""
    tracking: SecretKey = SecretKey(name="prism-tracking", key="uri")
    """Address of the registry's server, with its password (MLFLOW_TRACKING_URI)."""
    tls: Name = "prism-tls"
    """Secret of type kubernetes.io/tls with the certificate of the endpoints."""
    pull: Name = "prism-pull"
    """Secret of type kubernetes.io/dockerconfigjson that may pull the image."""
    environment_file: str = "/etc/prism/environment"
    """On machines of Ray's launcher: the file with PRISM_TOKEN and MLFLOW_TRACKING_URI, one NAME=VALUE a line."""


class Aws(Part):
    """What Ray's launcher needs to know of an AWS account."""

    region: str = "us-west-2"
    zones: str = "us-west-2a,us-west-2b"
    ami: str = "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
    """Machine image with Docker and the NVIDIA runtime, or the Systems Manager parameter that holds one."""
    instance_profile: str = "my-prism-nodes"
    """IAM instance profile of all machines: may start instances, pass itself on, read the secret, pull the image."""
    secret: str = "my-prism-environment"
    """Secret in Secrets Manager whose text becomes the environment file."""
    nfs: str = "my-file-system.efs.us-west-2.amazonaws.com:/"
    """Shared storage: an EFS file system."""


class Gcp(Part):
    """What Ray's launcher needs to know of a Google Cloud project."""

    project: str = "my-project"
    region: str = "us-central1"
    zone: str = "us-central1-a"
    machine_image: str = (
        "projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204-nvidia-570"
    )
    """Machine image with Docker and the NVIDIA runtime."""
    service_account: str = "my-prism-nodes@my-project.iam.gserviceaccount.com"
    """Account of all machines: may start instances, act as itself, read the secret, pull the image."""
    secret: str = "my-prism-environment"
    """Secret in Secret Manager whose text becomes the environment file."""
    nfs: str = "my-filestore.us-central1-a.c.my-project.internal:/prism"
    """Shared storage: a Filestore share."""


class OnPrem(Part):
    """Machines that are there already and that Ray's launcher reaches by SSH."""

    head: str = "head.example.com"
    workers: tuple[str, ...] = ("node1.example.com", "node2.example.com")
    user: str = "prism"
    """User of the machines, in the group docker."""
    key: str = "~/.ssh/id_ed25519"
    """Private key that lets this user in."""
    gpu: bool = True
    """Whether the machines have GPUs, and run the GPU image."""
    nfs: str = "files.example.com:/prism"
    """Shared storage: an NFS export."""


class Kubernetes(Part):
    """What the manifests for the KubeRay operator need to know."""

    namespace: Name = "prism"
    gate_image: str = "haproxy:3.2-alpine"
    """Image of the container that ends TLS in front of an endpoint's machine."""
    job: tuple[str, ...] = (
        *("prism", "run", "send", "--lm", "EleutherAI/pythia-1b", "--engine", "fsdp", "--precision", "bf16"),
        *("--workers", "8", "--gpu", "--autoscale"),
    )
    """What the RayJob runs."""
    job_hours: PositiveInt = 72
    """After how many hours the RayJob is given up."""
    serving_least: PositiveInt = 2
    """Machines of the first group that always serve: with one, its eviction would stop the endpoints."""
    reserved: float = Field(0.06, ge=0, lt=0.5)
    """Share of each machine's CPUs and memory that is left to Kubernetes itself."""


class ClusterDescription(Part):
    """A whole cluster."""

    name: Name = "prism"
    ray: str = "2.60.0"
    """Version of Ray in the image."""
    image: Image = Image()
    head: Head = Head()
    groups: tuple[Machines, ...] = Field(
        (
            Machines(name="cpu", cpus=16, memory_gib=64, least=1, most=8, aws="m7i.4xlarge", gcp="n2-standard-16"),
            Machines(
                name="gpu", cpus=192, memory_gib=2048, gpus=8, most=4, aws="p5.48xlarge", gcp="a3-highgpu-8g", spot=True
            ),
        ),
        min_length=1,
    )
    idle_minutes: PositiveInt = 10
    """After how long without work a machine is given back."""
    storage: Storage = Storage()
    redis: Redis = Redis()
    secrets: Secrets = Secrets()
    aws: Aws = Aws()
    gcp: Gcp = Gcp()
    onprem: OnPrem = OnPrem()
    kubernetes: Kubernetes = Kubernetes()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names) or "head" in names:
            raise ValueError(f"groups {', '.join(names)}: their names must differ from each other and from head")
        return self


def read_description(file: str | Path) -> ClusterDescription:
    """The description in a JSON file that holds the fields which differ from the defaults.

    Raises InputError that names the field at fault.
    """
    try:
        return ClusterDescription.model_validate_json(Path(file).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not a text file") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise InputError(f"{file}: {place}: there is no such field") from None
        known = first["type"] in ("json_invalid", "value_error", "missing")
        given = "" if known else f", not {json.dumps(first['input'])}"
        message = re.sub("^(Value error, |Input )", "", first["msg"])
        raise InputError(f"{file}: {f'{place}: ' if place else ''}{message}{given}") from None
