"""The files for `ray up`: a cluster of containers on AWS, on Google Cloud, or on machines that are there already.

Each machine mounts the shared storage, fetches the environment file with the secrets, and runs the image. The
dashboard, through which anyone could run code, listens on the head alone; `ray dashboard` and `prism submit` reach it
through an SSH tunnel.
"""

from typing import Any

from cluster.description import ClusterDescription, Machines

Config = dict[str, Any]
DISK_GIB = 300
HEAD_START = (
    "ray start --head --port=6379 --object-manager-port=8076 --dashboard-host=127.0.0.1 "
    "--autoscaling-config=~/ray_bootstrap_config.yaml"
)
WORKER_START = "ray start --address=$RAY_HEAD_IP:6379 --object-manager-port=8076"


def aws(cluster: ClusterDescription) -> Config:
    """The configuration of Ray's launcher for AWS."""
    there = cluster.aws

    def node(instance: str, *, spot: bool) -> Config:
        made: Config = {
            "InstanceType": instance,
            "ImageId": there.ami,
            "IamInstanceProfile": {"Name": there.instance_profile},
            "BlockDeviceMappings": [
                {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": DISK_GIB, "VolumeType": "gp3", "Encrypted": True}}
            ],
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
        }
        return made | ({"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {})

    fetch = (
        f"aws secretsmanager get-secret-value --region {there.region} --secret-id {there.secret} "
        "--query SecretString --output text"
    )
    return {
        **_named(cluster),
        "provider": {
            "type": "aws",
            "region": there.region,
            "availability_zone": there.zones,
            "cache_stopped_nodes": False,
        },
        "auth": {"ssh_user": "ubuntu"},
        "docker": _docker(cluster, gpu=False),
        "available_node_types": {
            "head": _head(node(cluster.head.aws, spot=False)),
            **{group.name: _group(cluster, group, node(group.aws, spot=group.spot)) for group in cluster.groups},
        },
        "head_node_type": "head",
        "initialization_commands": [*_mount(cluster, there.nfs), _keep(cluster, fetch)],
        **_start(),
    }


def gcp(cluster: ClusterDescription) -> Config:
    """The configuration of Ray's launcher for Google Cloud."""
    there = cluster.gcp

    def node(machine: str, *, gpu: bool, spot: bool) -> Config:
        made: Config = {
            "machineType": machine,
            "disks": [
                {
                    "boot": True,
                    "autoDelete": True,
                    "type": "PERSISTENT",
                    "initializeParams": {"diskSizeGb": DISK_GIB, "sourceImage": there.machine_image},
                }
            ],
            "serviceAccounts": [
                {"email": there.service_account, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}
            ],
        }
        scheduling = ([{"preemptible": True}] if spot else []) + ([{"onHostMaintenance": "TERMINATE"}] if gpu else [])
        return made | ({"scheduling": scheduling} if scheduling else {})

    fetch = f"gcloud secrets versions access latest --project={there.project} --secret={there.secret}"
    return {
        **_named(cluster),
        "provider": {
            "type": "gcp",
            "region": there.region,
            "availability_zone": there.zone,
            "project_id": there.project,
        },
        "auth": {"ssh_user": "ubuntu"},
        "docker": _docker(cluster, gpu=False),
        "available_node_types": {
            "head": _head(node(cluster.head.gcp, gpu=False, spot=False)),
            **{
                group.name: _group(cluster, group, node(group.gcp, gpu=group.gpus > 0, spot=group.spot))
                for group in cluster.groups
            },
        },
        "head_node_type": "head",
        "initialization_commands": [*_mount(cluster, there.nfs), _keep(cluster, fetch)],
        **_start(),
    }


def onprem(cluster: ClusterDescription) -> Config:
    """The configuration of Ray's launcher for machines that are there already; all of them do work, the head too."""
    there = cluster.onprem
    named = _named(cluster) | {"max_workers": len(there.workers)}
    return {
        **named,
        "provider": {"type": "local", "head_ip": there.head, "worker_ips": list(there.workers)},
        "auth": {"ssh_user": there.user, "ssh_private_key": there.key},
        "docker": _docker(cluster, gpu=there.gpu),
        "initialization_commands": [
            *_mount(cluster, there.nfs),
            f"test -r {cluster.secrets.environment_file}",  # put there by whoever looks after the machines
        ],
        **_start(),
    }


def _named(cluster: ClusterDescription) -> Config:
    return {
        "cluster_name": cluster.name,
        "max_workers": sum(group.most for group in cluster.groups),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": cluster.idle_minutes,
    }


def _docker(cluster: ClusterDescription, *, gpu: bool) -> Config:
    path = cluster.storage.path
    return {
        "image": cluster.image.name(gpu=gpu),
        "container_name": cluster.name,
        "pull_before_run": True,
        "run_options": [
            f"--env-file {cluster.secrets.environment_file}",
            f"--env PRISM_HOME={path}",
            "--env RAY_USAGE_STATS_ENABLED=0",
            f"--volume {path}:{path}",
            "--ulimit nofile=65536:65536",
        ],
    }


def _head(node: Config) -> Config:
    return {"resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0, "node_config": node}


def _group(cluster: ClusterDescription, group: Machines, node: Config) -> Config:
    image = {"worker_image": cluster.image.name(gpu=True), "pull_before_run": True}
    return {
        "resources": {"CPU": group.cpus} | ({"GPU": group.gpus} if group.gpus else {}),
        "min_workers": group.least,
        "max_workers": group.most,
        "node_config": node,
    } | ({"docker": image} if group.gpus else {})


def _mount(cluster: ClusterDescription, source: str) -> list[str]:
    path = cluster.storage.path
    return [
        "command -v mount.nfs4 || (sudo apt-get update && sudo apt-get install --yes nfs-common)",
        f"mountpoint -q {path} || (sudo mkdir -p {path} && "
        f"sudo mount -t nfs4 -o nfsvers=4.1,hard,noresvport {source} {path})",
    ]


def _keep(cluster: ClusterDescription, fetch: str) -> str:
    """What writes the secrets to the environment file, readable by the group docker alone, or fails."""
    file = cluster.secrets.environment_file
    folder = file.rpartition("/")[0]
    return f"sudo mkdir -p {folder} && set -o pipefail && {fetch} | sudo install -m 640 -g docker /dev/stdin {file}"


def _start() -> Config:
    return {
        "head_start_ray_commands": ["ray stop", HEAD_START],
        "worker_start_ray_commands": ["ray stop", WORKER_START],
    }
