"""What all verbs of the command line share, and the verbs that run jobs."""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs import JOBS, METHODS, SEARCHES, job_class
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
    """The Ray cluster: local, auto, HOST:PORT, ray://HOST:PORT. None: that of RAY_ADDRESS, else one started here."""

    @contextlib.contextmanager
    def connected(self, room: int = 1) -> "Iterator[Connection]":
        """A connection to that cluster, which ends with the block.

        A Ray that is started here gets no fewer logical CPUs than `room`: many endpoints that wait share a machine.
        """
        from cluster import connect

        here = self.address == "local" or not (self.address or os.environ.get("RAY_ADDRESS"))
        connection = connect(self.address, cpus=max(room, os.cpu_count() or 1) if here and room > 1 else None)
        terminate_like_interrupt()
        tell(str(connection))
        try:
            yield connection
        finally:
            connection.disconnect()


@dataclass(frozen=True, kw_only=True)
class RunOptions(OnCluster):
    """Flags of `prism run` beside those of the job."""

    config: str | None = None
    """A job's record to start from (job.json or report.json of a run, config.json in the registry); flags change it."""


def run(args: Sequence[str]) -> int:
    """Run a job: prism run JOB [flags], or repeat one: prism run --config FILE [flags]."""
    if _asks_for_help(args):
        return _explain(run, {name: entry.summary for name, entry in JOBS.items()})
    given = understood(args)
    name = given.name or given.record.get("job")
    if name is None:
        raise InputError(f"name a job, as in `prism run send`; there are {', '.join(JOBS)}")
    return _run(job_class(name), given, prog=f"prism run {name}")


def tune(args: Sequence[str]) -> int:
    """Search for a job's best settings: prism tune SPACE [--samples N] [flags]."""
    if _asks_for_help(args):
        return _explain(tune, SEARCHES)
    given = understood(args)
    name = given.name or given.record.get("space")
    if name is None:
        raise InputError(f"name a space, as in `prism tune send`; there are {', '.join(SEARCHES)}")
    from jobs.tuning import tune_job

    return _run(tune_job(name), given, prog=f"prism tune {name}")


def reproduce(args: Sequence[str]) -> int:
    """Measure a paper's claims and write docs/results: prism reproduce METHOD|all [flags]."""
    from jobs.reproduce import REPRODUCTIONS, reproduction_class

    if _asks_for_help(args):
        return _explain(reproduce, {name: METHODS[name].summary for name in REPRODUCTIONS})
    given = understood(args)
    if given.name is None:
        raise InputError(f"name a method, as in `prism reproduce send`; there are all, {', '.join(REPRODUCTIONS)}")
    for method in REPRODUCTIONS if given.name == "all" else [given.name]:
        status = _run(reproduction_class(method), given, prog=f"prism reproduce {method}")
        if status != SUCCESS:
            return status
    return SUCCESS


LOCKING = ("_acquireLock", "_releaseLock")  # of logging, which Python calls around every fork
HEARD: list[int] = []  # signals since the command began: an import that they cut off may swallow the exception


def terminate_like_interrupt() -> None:
    """Let SIGTERM end a command as cleanly as Ctrl-C; outside the main thread nothing is changed.

    Starting or joining Ray installs a handler that aborts the process, so this is called again after it.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored, in the background
            signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise; a moment later where the exception would be swallowed and leave the lock of all loggers locked."""
    HEARD.append(number)
    while frame is not None:
        if frame.f_code.co_filename == logging.__file__ and frame.f_code.co_name in LOCKING:
            again = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Inside the block SIGINT and SIGTERM raise KeyboardInterrupt, and are kept in the list that it gives."""
    HEARD.clear()
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    terminate_like_interrupt()
    try:
        yield HEARD
    finally:
        if threading.current_thread() is threading.main_thread():
            for kind, handler in before.items():
                signal.signal(kind, signal.SIG_DFL if handler is None else handler)


def tell(text: str) -> None:
    """One line of progress, on standard error."""
    sys.stderr.write(f"prism: {text}\n")
    sys.stderr.flush()


def readable(answer: Any) -> str:
    """Indented JSON whose lists of numbers are on one line each.

    >>> print(readable({"alpha": 2.5, "counts": [1, 2, 3]}))
    {
     "alpha": 2.5,
     "counts": [1, 2, 3]
    }
    """
    text = json.dumps(answer, indent=1, ensure_ascii=False)
    return re.sub(r"\[\n([-+\d.eE, \n]+)\n *\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def rows(*columns: str, title: str | None = None) -> "Table":
    """An empty table with these columns, for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)


class Given(NamedTuple):
    """A command line before its flags are parsed: what it names, its flags, and the record that these change."""

    name: str | None
    flags: Sequence[str]
    record: dict[str, Any]
    source: str | None


def understood(args: Sequence[str]) -> Given:
    """A command line's parts; the record is that of --config, or that of the run which --resume goes on with."""
    from jobs import flags

    name, rest = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    source = _value(rest, "--config") or _resumed(rest)
    return Given(name, rest, flags.load_record(source) if source else {}, source)


def _resumed(args: Sequence[str]) -> str | None:
    """The record of the run that a command line goes on with; None when it starts one, or names none that there is."""
    from cluster import storage
    from jobs.folders import RUN, root_of

    name = _value(args, "--name")
    if "--resume" not in args or name is None:
        return None
    place = storage.join(root_of(RUN, _value(args, "--storage")), name, RUN.record)
    return place if storage.exists(place) else None


def _run(job: "type[Job]", given: Given, *, prog: str) -> int:
    from jobs import flags

    default = flags.from_record(job, given.record, source=given.source) if given.source else None
    made, options = flags.parse_job(job, RunOptions, given.flags, prog=prog, default=default)
    with options.connected():
        report = made.run()
    report.show(options.console())
    options.finish(report.summary())
    return INTERRUPTED if report.artifact is None and made.leaves_artifact() else SUCCESS


def _asks_for_help(args: Sequence[str]) -> bool:
    return list(args) in (["-h"], ["--help"])


def _explain(verb: Callable[[Sequence[str]], int], names: Mapping[str, str]) -> int:
    sys.stdout.write("\n".join([verb.__doc__ or "", "", *(f"  {name:<16} {what}" for name, what in names.items()), ""]))
    return SUCCESS


def _value(args: Sequence[str], flag: str) -> str | None:
    """What follows a flag on a command line that is not parsed yet."""
    for i, argument in enumerate(args):
        if argument == flag and i + 1 < len(args):
            return args[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None
