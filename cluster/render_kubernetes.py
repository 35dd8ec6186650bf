"""The manifests for Kubernetes with the KubeRay operator (1.5 or newer): a RayCluster, a RayJob and a RayService.

All three are the same machines: a head that schedules no work, groups with and without GPUs that the autoscaler (v2)
grows and shrinks, a control store in a Redis outside, and a volume that everybody sees. Containers run as a plain
user without privileges, and take secrets by reference.

Endpoints listen on their machine's loopback, as `serving/prism.yaml` has it; a container beside them, the gate, ends
TLS and is what the service reaches. So the RayService takes that file as it is, and no token travels in the clear.
"""

import shlex
from typing import Any

from cluster.description import ClusterDescription, Machines, SecretKey

Manifest = dict[str, Any]
USER = 1000  # of the image
GATE_PORT = 8443
HEAD_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
CERTIFICATE = "/etc/gate/tls/server.pem"  # its key is beside it, with .key appended, where HAProxy looks for it


def shared(cluster: ClusterDescription, serve: Manifest) -> list[Manifest]:
    """What the three have in common: namespace, volume, the gate's configuration, and what may not be evicted."""
    http = serve["http_options"]
    volume: Manifest = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": cluster.storage.size}},
    }
    if cluster.storage.storage_class is not None:
        volume["storageClassName"] = cluster.storage.storage_class
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": cluster.kubernetes.namespace}},
        {**_head_of(cluster, "v1", "PersistentVolumeClaim", f"{cluster.name}-storage"), "spec": volume},
        {
            **_head_of(cluster, "v1", "ConfigMap", f"{cluster.name}-gate"),
            "data": {"haproxy.cfg": gate_configuration(http["port"], http["request_timeout_s"])},
        },
        *(_kept(cluster, kind, "head") for kind in ("cluster", "job", "service")),
        _kept(cluster, "service", "worker"),
    ]


def gate_configuration(port: int, seconds: float) -> str:
    """HAProxy's configuration: TLS outside, the Serve proxy of the same machine behind it."""
    return f"""\
global
    maxconn 4096
    log stdout format raw daemon
    ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
    mode http
    log global
    option httplog
    timeout connect 5s
    timeout client {seconds + 10:g}s
    timeout server {seconds + 10:g}s
frontend gate
    bind :{GATE_PORT} ssl crt {CERTIFICATE} alpn h2,http/1.1
    default_backend serve
backend serve
    server serve 127.0.0.1:{port}
"""


def ray_cluster(cluster: ClusterDescription) -> Manifest:
    """A cluster that stays, to submit jobs to."""
    return {
        **_head_of(cluster, "ray.io/v1", "RayCluster", cluster.name),
        "spec": _cluster_spec(cluster, "cluster"),
    }


def ray_job(cluster: ClusterDescription) -> Manifest:
    """A cluster that is made for one job and taken away after it; what the job leaves is on the shared storage."""
    submitter = _container(cluster, "submitter", gpu=False, cpu="500m", memory="1Gi")
    return {
        **_head_of(cluster, "ray.io/v1", "RayJob", f"{cluster.name}-job"),
        "spec": {
            "entrypoint": shlex.join(cluster.kubernetes.job),
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": {"spec": {**_pod(cluster), "restartPolicy": "Never", "containers": [submitter]}},
            "activeDeadlineSeconds": cluster.kubernetes.job_hours * 3600,
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": _cluster_spec(cluster, "job"),
        },
    }


def ray_service(cluster: ClusterDescription, serve_text: str, serve: Manifest) -> Manifest:
    """The endpoints of `serving/prism.yaml`, given as text and read; a changed cluster replaces the old when ready.

    The operator gives the service one port, which is that named `serve` of the head's container: the gate's, then.
    The head itself is left out of the service, and of a worker's container that port is where its proxy is asked.
    """
    return {
        **_head_of(cluster, "ray.io/v1", "RayService", f"{cluster.name}-service"),
        "spec": {
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": 180,
            "excludeHeadPodFromServeSvc": True,
            "serveService": {
                "metadata": {"name": f"{cluster.name}-endpoints"},
                "spec": {"type": "ClusterIP"},
            },
            "serveConfigV2": serve_text,
            "rayClusterConfig": _cluster_spec(cluster, "service", serve["http_options"]["port"]),
        },
    }


def _head_of(cluster: ClusterDescription, version: str, kind: str, name: str) -> Manifest:
    labels = {"app.kubernetes.io/name": cluster.name}
    metadata = {"name": name, "namespace": cluster.kubernetes.namespace, "labels": labels}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _kept(cluster: ClusterDescription, workload: str, role: str) -> Manifest:
    """A disruption budget that keeps one pod. Kubernetes takes no shares for pods whose owner it does not know."""
    return {
        **_head_of(cluster, "policy/v1", "PodDisruptionBudget", f"{cluster.name}-{workload}-{role}"),
        "spec": {"minAvailable": 1, "selector": {"matchLabels": _labels(cluster, workload, role)}},
    }


def _labels(cluster: ClusterDescription, workload: str, role: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": cluster.name, "app.kubernetes.io/component": f"{workload}-{role}"}


def _cluster_spec(cluster: ClusterDescription, workload: str, serve_port: int | None = None) -> Manifest:
    share = 1 - cluster.kubernetes.reserved
    head = _container(
        cluster,
        "ray-head",
        gpu=False,
        cpu=str(max(1, int(cluster.head.cpus * share))),
        memory=f"{max(1, int(cluster.head.memory_gib * share))}Gi",
    )
    head["ports"] = _ports(HEAD_PORTS if serve_port is None else HEAD_PORTS | {"serve": GATE_PORT})
    return {
        "rayVersion": cluster.ray,
        "authOptions": {"mode": "token"},  # the dashboard runs code for whoever holds the token, and nobody else
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": cluster.idle_minutes * 60,
            "imagePullPolicy": "IfNotPresent",
            "securityContext": _unprivileged(),
            "resources": _resources("500m", "1Gi"),
        },
        "gcsFaultToleranceOptions": {
            "redisAddress": cluster.redis.address,
            "redisPassword": {"valueFrom": _reference(cluster.redis.password)},
        },
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {"num-cpus": "0"},
            "template": {
                "metadata": {"labels": _labels(cluster, workload, "head")},
                "spec": {**_pod(cluster), "containers": [head], "volumes": _volumes(cluster)},
            },
        },
        "workerGroupSpecs": [
            _worker_group(cluster, group, workload, serve_port, first=group is cluster.groups[0])
            for group in cluster.groups
        ],
    }


def _worker_group(
    cluster: ClusterDescription, group: Machines, workload: str, serve_port: int | None, *, first: bool
) -> Manifest:
    serves = serve_port is not None
    share = 1 - cluster.kubernetes.reserved
    least = max(group.least, cluster.kubernetes.serving_least if serves and first else 0)
    worker = _container(
        cluster,
        "ray-worker",
        gpu=group.gpus > 0,
        cpu=str(max(1, int(group.cpus * share))),
        memory=f"{max(1, int(group.memory_gib * share))}Gi",
        gpus=group.gpus,
        secrets={"PRISM_TOKEN": cluster.secrets.token} if serves else {},
    )
    if serve_port is not None:
        worker["ports"] = _ports({"serve": serve_port})
    metadata: Manifest = {"labels": _labels(cluster, workload, "worker")}
    if not serves:  # a node that looks idle to Kubernetes may hold a training
        metadata["annotations"] = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    spec: Manifest = {
        **_pod(cluster),
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 120,
        "containers": [worker, *([_gate(cluster)] if serves else [])],
        "volumes": [*_volumes(cluster), *(_gate_volumes(cluster) if serves else [])],
    }
    if group.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "groupName": group.name,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": max(group.most, least),
        "rayStartParams": {},
        "template": {"metadata": metadata, "spec": spec},
    }


def _pod(cluster: ClusterDescription) -> Manifest:
    return {
        "imagePullSecrets": [{"name": cluster.secrets.pull}],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _container(
    cluster: ClusterDescription,
    name: str,
    *,
    gpu: bool,
    cpu: str,
    memory: str,
    gpus: int = 0,
    secrets: dict[str, SecretKey] | None = None,
) -> Manifest:
    hidden = {"MLFLOW_TRACKING_URI": cluster.secrets.tracking} | (secrets or {})
    mounts = [] if name == "submitter" else [{"name": "storage", "mountPath": cluster.storage.path}]
    return {
        "name": name,
        "image": cluster.image.name(gpu=gpu),
        "imagePullPolicy": "IfNotPresent",
        "resources": _resources(cpu, memory, gpus),
        "env": [
            {"name": "PRISM_HOME", "value": cluster.storage.path},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            *({"name": variable, "valueFrom": _reference(secret)} for variable, secret in hidden.items()),
        ],
        "securityContext": _unprivileged(),
        **({"volumeMounts": mounts} if mounts else {}),
    }


def _gate(cluster: ClusterDescription) -> Manifest:
    return {
        "name": "gate",
        "image": cluster.kubernetes.gate_image,
        "imagePullPolicy": "IfNotPresent",
        "resources": _resources("250m", "256Mi"),
        "ports": _ports({"https": GATE_PORT}),
        "readinessProbe": {"tcpSocket": {"port": GATE_PORT}, "periodSeconds": 5},
        "securityContext": _unprivileged() | {"readOnlyRootFilesystem": True},
        "volumeMounts": [
            {"name": "gate", "mountPath": "/usr/local/etc/haproxy", "readOnly": True},
            {"name": "tls", "mountPath": CERTIFICATE.rpartition("/")[0], "readOnly": True},
        ],
    }


def _volumes(cluster: ClusterDescription) -> list[Manifest]:
    return [{"name": "storage", "persistentVolumeClaim": {"claimName": f"{cluster.name}-storage"}}]


def _gate_volumes(cluster: ClusterDescription) -> list[Manifest]:
    certificate = CERTIFICATE.rpartition("/")[2]
    items = [{"key": "tls.crt", "path": certificate}, {"key": "tls.key", "path": f"{certificate}.key"}]
    return [
        {"name": "gate", "configMap": {"name": f"{cluster.name}-gate"}},
        {"name": "tls", "secret": {"secretName": cluster.secrets.tls, "defaultMode": 0o440, "items": items}},
    ]


def _ports(named: dict[str, int]) -> list[Manifest]:
    return [{"containerPort": port, "name": name} for name, port in named.items()]


def _resources(cpu: str, memory: str, gpus: int = 0) -> Manifest:
    amount = {"cpu": cpu, "memory": memory} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {"requests": amount, "limits": dict(amount)}


def _reference(secret: SecretKey) -> Manifest:
    return {"secretKeyRef": {"name": secret.name, "key": secret.key}}


def _unprivileged() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
