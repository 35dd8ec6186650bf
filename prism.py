"""The front door: the `prism` command. Each verb is a dataclass whose fields are its flags; the work is elsewhere."""

import os
import sys

if (hook := sys.excepthook) is sys.__excepthook__:  # Ctrl-C in the imports below has no `main` to take it
    sys.excepthook = lambda kind, *rest: (
        os._exit(130) if issubclass(kind, KeyboardInterrupt) else sys.__excepthook__(kind, *rest)
    )

import atexit
import contextlib
import json
import logging
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tyro.conf import Positional

from cluster.ports import free_port
from jobs import cluster_commands, commands, plan_command, registry_commands
from jobs.commands import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    SUCCESS,
    OnCluster,
    Output,
    interruptible,
    readable,
    rows,
    tell,
    terminate_like_interrupt,
)
from library.errors import ArtifactError, InputError, PrismError
from serving.ingress import Ingress

if TYPE_CHECKING:
    from serving.app import Served


@dataclass(frozen=True)
class List(Output):
    """What there is: methods, and for each its jobs, searches, endpoints and reproduction."""

    def __call__(self) -> int:
        from jobs import JOBS, METHODS, SEARCHES
        from jobs.reproduce import REPRODUCTIONS
        from serving.app import ENDPOINTS

        offers = [("run", name, entry.method, entry.summary) for name, entry in JOBS.items()]
        offers += [("tune", name, name, summary) for name, summary in SEARCHES.items()]
        offers += [
            ("serve, ask", name, endpoint.kind or endpoint.model, endpoint.summary)
            for name, endpoint in ENDPOINTS.items()
        ]
        offers += [("reproduce", name, name, "the paper's claims, measured again") for name in REPRODUCTIONS]
        console = self.console()
        for method, (summary, paper) in METHODS.items():
            table = rows("prism", "NAME", "what it does", title=f"{method}: {summary} ({paper})")
            for verb, name, of, what in offers:
                if of == method:
                    table.add_row(verb, name, what)
            console.print(table)
        keys = ("verb", "name", "method", "summary")
        methods = {name: method._asdict() for name, method in METHODS.items()}
        self.finish({"methods": methods, "offers": [dict(zip(keys, offer, strict=True)) for offer in offers]})
        return SUCCESS


@dataclass(frozen=True)
class Serve(OnCluster):
    """Deploy endpoints on Ray Serve until Ctrl-C."""

    endpoints: Positional[tuple[str, ...]] = ()
    """Which; none are those whose model has a champion in the registry."""
    artifact: tuple[str, ...] = ()
    """What an endpoint serves instead of its champion, as ENDPOINT=REFERENCE: models:/NAME/VERSION, a folder, a URI."""
    host: str = "127.0.0.1"
    """Interface to listen on; 0.0.0.0 for all, and then set PRISM_TOKEN, which clients must present."""
    port: int = 8000
    """Port to listen on."""
    ingress: Ingress = "auto"
    """Who takes requests in: proxy, Serve's own; haproxy, compiled and many times faster, which hands them straight to
    the replicas; fast, haproxy with Serve's throughput options; auto, haproxy where this command starts Ray and Ray
    has it, else what Ray was started with."""
    replicas: int = 1
    """Processes that serve each endpoint: more answer more at once, and go on when one is lost."""

    def __call__(self) -> int:
        with self.deployed() as served:
            lines = [
                f"{name} serves {reference}\n  POST {served.url}/{name}/predict\n  page {served.url}/{name}/docs"
                for name, reference in served.endpoints.items()
            ]
            lines += [f"{name} is left out: {reason}" for name, reason in served.left_out.items()]
            metrics = served.metrics()
            lines += [f"metrics for Prometheus at {', '.join(metrics)}"]
            lines.append(f"try: prism ask {next(iter(served.endpoints))} --url {served.url}    stop: Ctrl-C")
            self.console().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
            facts = {"url": served.url, "endpoints": served.endpoints, "left_out": served.left_out, "metrics": metrics}
            self.finish(facts)
            served.wait()
        return SUCCESS

    @contextlib.contextmanager
    def deployed(self) -> "Iterator[Served]":
        """The endpoints that the flags name, until the block ends."""
        from serving.app import serve_endpoints

        pairs = [pair.partition("=") for pair in self.artifact]
        if wrong := [name for name, equals, reference in pairs if not (equals and reference)]:
            raise InputError(f"--artifact {wrong[0]}: give ENDPOINT=REFERENCE, such as hallucination=models:/send/1")
        artifacts = {name: reference for name, _, reference in pairs}
        names = list(dict.fromkeys([*self.endpoints, *artifacts])) if self.endpoints else None
        where = {"host": self.host, "port": self.port, "address": self.address}
        with serve_endpoints(names, artifacts, **where, ingress=self.ingress, replicas=self.replicas) as served:
            terminate_like_interrupt()
            try:
                yield served
            except KeyboardInterrupt:
                tell("stopping: requests in flight are answered first")
                raise


@dataclass(frozen=True)
class Console(Serve):
    """Deploy endpoints and a web page to try them on, until Ctrl-C."""

    def __call__(self) -> int:
        from serving.app import ENDPOINTS
        from serving.console import serve_console
        from serving.ingress import prepare

        prepare(self.ingress, self.address)
        with self.connected(room=len(ENDPOINTS)), self.deployed() as served, serve_console(served) as page:
            lines = [f"{name} serves {reference}" for name, reference in served.endpoints.items()]
            lines.append(f"open {page} in a browser    stop: Ctrl-C")
            self.console().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
            self.finish({"url": page, "endpoints": served.endpoints})
            served.wait()
        return SUCCESS


@dataclass(frozen=True)
class Ask(Output):
    """Call a running endpoint and print its answer as JSON."""

    endpoint: Positional[str]
    """Name of the endpoint, such as hallucination."""
    example: bool = False
    """Send the endpoint's own example; it is also sent when there is no --data."""
    data: str | None = None
    """The request: a JSON file, - for standard input, or the JSON itself."""
    url: str = "http://127.0.0.1:8000"
    """Where the endpoint runs, as `prism serve` printed it."""

    def __call__(self) -> int:
        from serving.client import ask

        if self.example and self.data is not None:
            raise InputError("--example and --data are two requests; give one of them")
        answer = ask(self.endpoint, None if self.data is None else json_object(self.data), self.url)
        print(json.dumps(answer) if self.json else readable(answer))
        return SUCCESS


@dataclass(frozen=True)
class Demo(OnCluster):
    """The main line end to end: train with SeND and without it, register, serve, ask."""

    steps: int = 240
    """Optimiser steps of each training."""

    def __call__(self) -> int:
        from jobs import demo
        from serving.app import serve_endpoints
        from serving.client import ask

        if self.steps < 1:
            raise InputError(f"--steps {self.steps}: at least 1")
        console = self.console()
        prompt = demo.held_out_prompt()
        with self.connected():
            reports = {}
            for name, job in demo.arms(self.steps).items():
                tell(f"training {name}, {self.steps} steps on 2 workers with ZeRO-2")
                reports[name] = job.run()
                if reports[name].artifact is None:
                    return INTERRUPTED
            tell("serving hallucination")
            with serve_endpoints(["hallucination"], port=free_port()) as served:
                address = f"{served.url}/hallucination/predict"
                answer = ask("hallucination", {"prompt": prompt, "seed": 0}, served.url)["results"][0]
        console.print(demo.comparison(reports))
        risk = answer["no_risk"] if answer["risk"] is None else f"risk of a hallucination {answer['risk']:.2f}"
        lines = [
            "One seed of a small model shows that the line works, not which arm is better: see prism reproduce send.",
            f"Asked {address}",
            f"  prompt  {prompt}",
            f"  answer  {answer['answer']}",
            f"  EigenScore {answer['eigenscore']:.3f}, EES {answer['ees']:.3f} ({answer['method']}), {risk}",
            "Go on: prism serve hallucination, prism registry show send, prism run send --help",
        ]
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
        summaries = {name: report.summary() for name, report in reports.items()}
        self.finish({"arms": summaries, "url": address, "prompt": prompt, "answer": answer})
        return SUCCESS


VERBS: dict[str, type | Callable[[Sequence[str]], int]] = {
    "list": List,
    "run": commands.run,
    "tune": commands.tune,
    "plan": plan_command.plan,
    "serve": Serve,
    "console": Console,
    "ask": Ask,
    "reproduce": commands.reproduce,
    "registry list": registry_commands.RegistryList,
    "registry show": registry_commands.RegistryShow,
    "registry push": registry_commands.RegistryPush,
    "registry promote": registry_commands.RegistryPromote,
    "registry rollback": registry_commands.RegistryRollback,
    "cluster local": cluster_commands.ClusterLocal,
    "cluster up": cluster_commands.ClusterUp,
    "cluster status": cluster_commands.ClusterStatus,
    "cluster down": cluster_commands.ClusterDown,
    "cluster render": cluster_commands.ClusterRender,
    "submit": cluster_commands.submit,
    "demo": Demo,
}
MISUNDERSTOOD = (InputError, ArtifactError)


def entry() -> NoReturn:
    """What the shell starts: `main`, and then the end of the process."""
    statuses: list[int] = []
    atexit.register(_end, statuses)  # the first that is registered is the last that is called
    statuses.append(main())
    sys.exit(statuses[0])


def _end(statuses: list[int]) -> None:
    """Leave out the exit handlers of C: where a signal cut Ray's start short, those of its driver crash."""
    if statuses == [INTERRUPTED]:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(INTERRUPTED)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    with interruptible() as heard:
        return _main(list(sys.argv[1:] if args is None else args), heard)


def _main(args: list[str], heard: list[int]) -> int:
    try:
        return _dispatch(args)
    except SystemExit as stop:
        if stop.code == signal.SIGTERM:  # Ray puts a handler of its own in our handler's place
            tell("interrupted")
            return INTERRUPTED
        return int(stop.code or SUCCESS)  # a verb's --help
    except KeyboardInterrupt:
        tell("interrupted")
        return INTERRUPTED
    except PrismError as error:
        tell(" ".join(str(error).split()))
        if heard or isinstance(error.__context__, KeyboardInterrupt):
            return INTERRUPTED
        return BAD_INPUT if isinstance(error, MISUNDERSTOOD) else FAILED
    except BrokenPipeError:
        sys.stdout = None  # whoever read the output has gone; nothing is left to flush
        return FAILED
    except Exception as error:
        if heard:  # and what was cut off by it is broken
            tell("interrupted")
            return INTERRUPTED
        first = " ".join(traceback.format_exception_only(error)[-1].split())
        tell(f"unexpected {first}; the traceback is in {_keep_traceback()}")
        return FAILED


def _dispatch(args: list[str]) -> int:
    from jobs import flags

    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return SUCCESS
    verb = next((" ".join(args[:n]) for n in (2, 1) if " ".join(args[:n]) in VERBS), None)
    if verb is None:
        within = [name for name in VERBS if name.startswith(f"{args[0]} ")]
        if within and (not args[1:] or args[1] in ("-h", "--help")):
            print(usage(within))
            return SUCCESS if args[1:] else BAD_INPUT
        raise InputError(f"there is no verb {' '.join(args[: 2 if within else 1])!r}; there are {', '.join(VERBS)}")
    rest = args[len(verb.split()) :]
    command = VERBS[verb]
    if not isinstance(command, type):
        return command(rest)
    return flags.parse(command, rest, prog=f"prism {verb}")()


def usage(verbs: Sequence[str] = tuple(VERBS)) -> str:
    """The verbs, with one line each."""
    lines = [f"  prism {name:<18} {VERBS[name].__doc__.partition(chr(10))[0]}" for name in verbs]
    return "\n".join(["Spectral deep learning on Ray. `prism VERB --help` explains a verb.", "", *lines])


def json_object(given: str) -> dict[str, Any]:
    """The JSON object in a file, on standard input (-), or given itself."""
    source = "--data" if given.lstrip().startswith("{") else "standard input" if given == "-" else given
    try:
        text = given if source == "--data" else sys.stdin.read() if given == "-" else Path(given).read_text("utf-8")
        found = json.loads(text)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{source} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{source} holds {type(found).__name__}, not a JSON object")
    return found


def _keep_traceback() -> Path:
    from cluster.registry_session import home

    file = home() / "tracebacks" / f"{datetime.now():%Y%m%d-%H%M%S-%f}.txt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        traceback.print_exc()
    return file


sys.excepthook = hook

if __name__ == "__main__":
    entry()
