"""What all verbs of the command line share, and the verbs that run jobs."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import JOBS, job_class
from library.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cluster import Connection
    from jobs.job import Job

SUCCESS, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, kw_only=True)
class Output:
    """Flags of every verb that has a result."""

    json: bool = False
    """Print one JSON object as the last line of standard output; everything else goes to standard error."""

    def console(self) -> "Console":
        """Where that goes which people read."""
        from rich.console import Console

        return Console(stderr=self.json)

    def finish(self, result: Any) -> None:
        """Print the result when it is wanted as JSON."""
        if self.json:
            sys.stdout.write(f"{json.dumps(result)}\n")
            sys.stdout.flush()


@dataclass(frozen=True, kw_only=True)
class OnCluster(Output):
    """Flags of every verb that works on a Ray cluster."""

    address: str | None = None
    """The Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT. None is the cluster that RAY_ADDRESS names; without
    it Ray is started on this machine for as long as the command runs."""

    @contextlib.contextmanager
    def connected(self) -> "Iterator[Connection]":
        """A connection to that cluster, which ends with the block."""
        from cluster import connect

        connection = connect(self.address)
        tell(str(connection))
        try:
            yield connection
        finally:
            connection.disconnect()


@dataclass(frozen=True, kw_only=True)
class RunOptions(OnCluster):
    """Flags of `prism run` beside those of the job."""

    config: Path | None = None
    """Start from a job's record (job.json in a run's folder, report.json, the registry's config.json); flags given
    here change it."""


def run(args: Sequence[str]) -> int:
    """Run a job: prism run JOB [flags], or repeat one: prism run --config FILE [flags]."""
    if args[:1] in (["-h"], ["--help"]):
        sys.stdout.write("\n".join([run.__doc__ or "", "", *(f"  {n:<16} {e.summary}" for n, e in JOBS.items()), ""]))
        return SUCCESS
    job, options = _job(args)
    from jobs.training import TrainingJob

    with options.connected():
        report = job.run()
    report.show(options.console())
    options.finish(report.summary())
    stopped = isinstance(job, TrainingJob) and report.artifact is None
    return INTERRUPTED if stopped else SUCCESS


def tell(text: str) -> None:
    """One line of progress, on standard error."""
    sys.stderr.write(f"prism: {text}\n")
    sys.stderr.flush()


def rows(*columns: str, title: str | None = None) -> "Table":
    """An empty table with these columns, for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)


def _job(args: Sequence[str]) -> "tuple[Job, RunOptions]":
    from jobs import flags

    named, rest = (args[:1], args[1:]) if args and not args[0].startswith("-") else ([], args)
    file = _value(rest, "--config")
    record = flags.load_record(Path(file)) if file else {}
    name = named[0] if named else record.get("job")
    if name is None:
        raise InputError(f"name a job, as in `prism run send`; there are {', '.join(JOBS)}")
    job = job_class(name)
    default = flags.from_record(job, record, source=Path(file)) if file else None
    return flags.parse_job(job, RunOptions, rest, prog=f"prism run {name}", default=default)


def _value(args: Sequence[str], flag: str) -> str | None:
    """What follows a flag on a command line that is not parsed yet."""
    for i, argument in enumerate(args):
        if argument == flag and i + 1 < len(args):
            return args[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None
