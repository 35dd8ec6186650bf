"""The verbs that look after clusters: their files, Ray's launcher, many nodes on this machine, and submitted jobs."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from jobs.commands import FAILED, INTERRUPTED, SUCCESS, Output, tell
from library.errors import InputError

if TYPE_CHECKING:
    from cluster.submit import Jobs


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


@dataclass(frozen=True)
class ClusterUp:
    """Start a cluster with Ray's launcher, or bring a running one up to date."""

    cluster: Positional[str]
    """aws, gcp or onprem (the rendered files), or the path of a file for `ray up`."""
    yes: bool = False
    """Do not ask before machines are started."""

    def __call__(self) -> int:
        from cluster import launcher

        launcher.up(self.cluster, yes=self.yes)
        return SUCCESS


@dataclass(frozen=True)
class ClusterStatus:
    """Show the nodes of a cluster of Ray's launcher, their use, and what waits for nodes."""

    cluster: Positional[str]
    """aws, gcp or onprem (the rendered files), or the path of a file for `ray up`."""

    def __call__(self) -> int:
        from cluster import launcher

        launcher.status(self.cluster)
        return SUCCESS


@dataclass(frozen=True)
class ClusterDown:
    """Give back all machines of a cluster of Ray's launcher."""

    cluster: Positional[str]
    """aws, gcp or onprem (the rendered files), or the path of a file for `ray up`."""
    yes: bool = False
    """Do not ask before machines are given back."""

    def __call__(self) -> int:
        from cluster import launcher

        launcher.down(self.cluster, yes=self.yes)
        return SUCCESS


@dataclass(frozen=True)
class ClusterLocal:
    """Run a Ray cluster of several nodes on this machine until Ctrl-C."""

    nodes: int = 2
    """How many nodes, each with its own raylet and object store."""
    cpus_per_node: int = 2
    """Logical CPUs of each: Ray only schedules by them."""

    def __call__(self) -> int:
        from cluster.local import LocalCluster
        from jobs.interrupts import counted_interrupts

        here = str(Path(sys.executable).parent)  # jobs find this Python, whether or not its environment is active
        os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])
        with LocalCluster(self.nodes, self.cpus_per_node, dashboard=True) as local, counted_interrupts() as interrupts:
            lines = [
                str(local.connection),
                f"run on it:    prism run send --workers 2 --address {local.address}",
                f"submit to it: prism submit --address {local.dashboard} -- prism run send --workers 2",
                f"join it:      ray start --address {local.address}    (from this machine)",
                "stop:         Ctrl-C",
            ]
            sys.stdout.write("\n".join([*lines, ""]))
            sys.stdout.flush()
            while not interrupts:
                time.sleep(0.2)
        raise KeyboardInterrupt


@dataclass(frozen=True)
class SubmitOptions(Output):
    """Send this project to a cluster and run a command there: prism submit [flags] -- prism run send ..."""

    address: str | None = None
    """The cluster's dashboard, as http://HOST:8265; None: RAY_API_SERVER_ADDRESS, else that of this machine."""
    working_dir: Path | None = None
    """Folder that is sent along and that the command runs in; None is this checkout."""
    env: tuple[str, ...] = ()
    """Environment of the command: NAME=VALUE, or NAME to pass on what it is here."""
    name: str | None = None
    """Name of the job; None lets Ray make one."""
    detach: bool = False
    """Do not follow the log: print the job's name and return."""
    follow: str | None = None
    """Follow the job of that name instead of submitting one."""
    stop: str | None = None
    """Stop the job of that name instead of submitting one."""


def submit(args: Sequence[str]) -> int:
    """Run a command on a cluster: prism submit [flags] -- prism run JOB ...; its exit status is that of the command."""
    from jobs import flags

    split = list(args).index("--") if "--" in args else len(args)
    options = flags.parse(SubmitOptions, args[:split], prog="prism submit")
    command = args[split + 1 :]
    asked = [bool(command), options.follow is not None, options.stop is not None]
    if sum(asked) != 1:
        raise InputError("give one of a command after --, --follow NAME, --stop NAME; as in prism submit -- prism list")
    from cluster.submit import Jobs, environment

    variables = environment(options.env)
    cluster = Jobs(options.address)
    if options.stop is not None:
        stopped = cluster.stop(options.stop)
        tell(f"{options.stop} " + ("is asked to stop" if stopped else f"had ended: {cluster.status(options.stop)}"))
        options.finish({"job": options.stop, "status": cluster.status(options.stop), "stopped": stopped})
        return SUCCESS
    name = options.follow or cluster.submit(
        command, working_dir=options.working_dir, environment=variables, name=options.name
    )
    if options.follow is None:
        tell(f"submitted {name} to {cluster.address}")
    if options.detach:
        sys.stdout.write("" if options.json else f"{name}\n")
        options.finish({"job": name, "status": cluster.status(name)})
        return SUCCESS
    return _followed(cluster, name, options)


def _followed(cluster: "Jobs", name: str, options: SubmitOptions) -> int:
    """Show a job's log until it ends; Ctrl-C leaves the job running."""
    out = sys.stderr if options.json else sys.stdout
    try:
        for text in cluster.follow(name):
            out.write(text)
            out.flush()
        status = cluster.ended(name)
    except KeyboardInterrupt:
        again = f"prism submit --address {cluster.address}"
        tell(f"{name} goes on; watch it: {again} --follow {name}    stop it: {again} --stop {name}")
        return INTERRUPTED
    code = cluster.exit_status(name)
    tell(f"{name} {status}" + (f", exit status {code}: {cluster.message(name)}" if status != "SUCCEEDED" else ""))
    options.finish({"job": name, "status": status, "exit_status": code})
    return code
