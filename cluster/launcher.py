"""Ray's launcher (`ray up`) for the files of this folder: checked first, then run as it is."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.render import FOLDER, LAUNCHER
from library.errors import InputError, PrismError

EXAMPLES = re.compile(r"\b(?:my-[a-z-]+|[\w.-]*example\.com)")  # as in `cluster.description`
NEEDS = {"aws": ("boto3", "boto3"), "gcp": ("googleapiclient", "google-api-python-client")}


def up(cluster: str, *, yes: bool = False) -> None:
    """Start the cluster, or bring a running one up to date. Raises PrismError when the launcher fails."""
    _run(["up", _checked(cluster), "--no-config-cache"], yes=yes)


def status(cluster: str) -> None:
    """Let the cluster's head print its nodes, their use, and what waits for nodes."""
    _run(["exec", _checked(cluster), "ray status"])


def down(cluster: str, *, yes: bool = False) -> None:
    """Give back all machines of the cluster."""
    _run(["down", _checked(cluster)], yes=yes)


def configuration(cluster: str) -> Path:
    """The file of a cluster: aws, gcp or onprem are those of this folder, anything else is a path."""
    file = FOLDER / f"{cluster}.yaml" if cluster in LAUNCHER else Path(cluster)
    if not file.is_file():
        raise InputError(f"{cluster}: there is no such file; give one, or {', '.join(LAUNCHER)}")
    return file


def check(file: Path) -> None:
    """Raise InputError for a file that Ray's launcher does not take, names of the example, and a missing package."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = file.read_text("utf-8")
    try:
        found: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    provider = found.get("provider") if isinstance(found, dict) else None
    if not isinstance(provider, dict) or "type" not in provider:
        raise InputError(f"{file}: provider.type is missing; is this a file for Ray's launcher?")
    try:
        validate_config(prepare_config(found))
    except Exception as error:  # jsonschema's, click's, or whatever a provider's own check raises
        place = ".".join(map(str, getattr(error, "path", [])))
        reason = getattr(error, "message", None) or str(error)
        raise InputError(f"{file}: {f'{place}: ' if place else ''}{' '.join(reason.split())}") from error
    if left := list(dict.fromkeys(EXAMPLES.findall(text))):
        raise InputError(
            f"{file} still has the example's {', '.join(left[:3])}: describe your own cluster in a JSON file and run "
            "`prism cluster render --config FILE --out FOLDER`"
        )
    module, package = NEEDS.get(provider["type"], (None, None))
    if module and importlib.util.find_spec(module) is None:
        raise InputError(f"clusters of {provider['type']} need {package}: pip install {package}")


def _checked(cluster: str) -> str:
    file = configuration(cluster)
    check(file)
    return str(file)


def _run(arguments: Sequence[str], *, yes: bool = False) -> None:
    """Run `ray`, which talks to the user itself."""
    command = [sys.executable, "-m", "ray.scripts.scripts", *arguments, *(["--yes"] if yes else [])]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise PrismError(f"`ray {arguments[0]}` failed with status {done.returncode}; what it said is above")
