"""The verbs of `prism cluster`: its files, Ray's launcher, and many nodes on this machine."""

from dataclasses import dataclass
from pathlib import Path

from jobs.commands import FAILED, SUCCESS, Output, tell
from library.errors import InputError


@dataclass(frozen=True)
class ClusterRender(Output):
    """Make the files for Ray's launcher, and the Kubernetes manifests, from one description."""

    config: Path | None = None
    """A JSON file with the fields of the description that differ from the defaults; None makes the shipped files."""
    out: Path | None = None
    """Folder to write to; None is the folder cluster of this checkout."""
    check: bool = False
    """Write nothing; exit with 1 and the names of the files that are out of date, if any are."""

    def __call__(self) -> int:
        from cluster import render
        from cluster.description import ClusterDescription, read_description

        if self.out is None and not (render.FOLDER.parent / "pyproject.toml").is_file():
            raise InputError("--out: give a folder to write to; this is an installed package, not a checkout")
        folder = self.out or render.FOLDER
        description = ClusterDescription() if self.config is None else read_description(self.config)
        if self.check:
            stale = render.out_of_date(description, folder)
            self.finish({"folder": str(folder), "out_of_date": stale})
            if stale:
                tell(f"out of date in {folder}: {', '.join(stale)}; run prism cluster render")
            return FAILED if stale else SUCCESS
        changed = render.write(description, folder)
        told = ", ".join(changed) if changed else "nothing; all files were up to date"
        self.console().print(f"wrote to {folder}: {told}", highlight=False, markup=False, soft_wrap=True)
        self.finish({"folder": str(folder), "written": changed})
        return SUCCESS
