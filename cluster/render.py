"""Rendering a description into the files of this folder, and finding those that are out of date."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster import render_kubernetes, render_launcher
from cluster.description import ClusterDescription
from library import files
from library.errors import InputError

FOLDER = Path(__file__).resolve().parent
SERVE_CONFIG = FOLDER.parent / "serving" / "prism.yaml"
LAUNCHER = {"aws": render_launcher.aws, "gcp": render_launcher.gcp, "onprem": render_launcher.onprem}
HEADER = "# Made by `prism cluster render` from the description of the cluster: change that, not this file.\n"


def rendered(cluster: ClusterDescription) -> dict[str, str]:
    """The text of every file by its path within the folder.

    >>> list(rendered(ClusterDescription()))[:3]
    ['aws.yaml', 'gcp.yaml', 'onprem.yaml']
    """
    serve_text = _read(SERVE_CONFIG)
    serve = yaml.safe_load(serve_text)
    made = {f"{name}.yaml": [config(cluster)] for name, config in LAUNCHER.items()}
    made["kubernetes/shared.yaml"] = render_kubernetes.shared(cluster, serve)
    made["kubernetes/raycluster.yaml"] = [render_kubernetes.ray_cluster(cluster)]
    made["kubernetes/rayjob.yaml"] = [render_kubernetes.ray_job(cluster)]
    made["kubernetes/rayservice.yaml"] = [render_kubernetes.ray_service(cluster, serve_text, serve)]
    return {name: HEADER + "---\n".join(map(_text, documents)) for name, documents in made.items()}


def write(cluster: ClusterDescription, folder: Path) -> list[str]:
    """Write the files into a folder, each whole or not at all, and return the paths of those that changed."""
    changed = out_of_date(cluster, folder)
    texts = rendered(cluster)
    for name in changed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(folder / name, texts[name].encode())
    return changed


def out_of_date(cluster: ClusterDescription, folder: Path) -> list[str]:
    """The paths of the files that are missing or differ from what the description says."""
    return [name for name, text in rendered(cluster).items() if _read(folder / name, missing="") != text]


def _read(file: Path, *, missing: str | None = None) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise InputError(f"{file} is not there") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


class _Dumper(yaml.SafeDumper):
    """YAML as people write it: lists indented, texts of several lines as blocks, no anchors."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _string)


def _text(document: Mapping[str, Any]) -> str:
    return yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
