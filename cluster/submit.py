"""Jobs on a cluster from anywhere, through Ray Jobs: send this project along, follow the log, stop, exit status."""

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import probe
from cluster.connection import NOT_SHIPPED, ROOT
from library.errors import InputError, PrismError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

HERE = "http://127.0.0.1:8265"
TOKEN = Path("~/.ray/auth_token")  # where Ray keeps it
DASHBOARD = "dashboard of a Ray cluster"
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
POLL_S = 0.5
NO_AGENT = "No available agent"
AGENT_S = 90.0  # that the head's agent may take to come up
TALKATIVE = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Jobs:
    """The jobs of the cluster behind a dashboard.

    `address` is the dashboard's, such as http://HOST:8265; None is that of RAY_API_SERVER_ADDRESS, or of RAY_ADDRESS
    when that is one, else this machine's. Raises InputError for another kind of address, PrismError within 10 seconds
    when nothing answers.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = _dashboard(address)
        probe.web_service(self.address, what=DASHBOARD)
        self._client = _client(self.address)

    def submit(
        self,
        command: Sequence[str],
        *,
        working_dir: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> str:
        """Start a command line on the cluster's head and return the job's name.

        `working_dir` is sent along and is where the command runs, without what git ignores, tests, documents and
        outputs; None is this checkout, and nothing for an installed package. Raises InputError for a folder that is
        not there and a name that is taken.
        """
        folder = working_dir if working_dir is not None else ROOT if (ROOT / "pyproject.toml").is_file() else None
        if not command:
            raise InputError("name a command after --, as in `prism submit -- prism run send`")
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"--working-dir {folder}: there is no such folder")
        shipped: dict[str, Any] = {}
        if folder is not None:
            shipped = {"working_dir": str(Path(folder).resolve()), "excludes": ["/.git/", "/.venv/", *NOT_SHIPPED]}
        with _clear_errors(f"cannot submit to {self.address}"):
            if name is not None and name in {job.submission_id for job in self._client.list_jobs()}:
                raise InputError(f"--name {name}: there is a job of that name already")
            return self._submit(
                entrypoint=entrypoint(command, shipped=folder is not None and (Path(folder) / "prism.py").is_file()),
                runtime_env={**shipped, "env_vars": dict(environment or {})},
                submission_id=name,
            )

    def _submit(self, **job: Any) -> str:
        """Submit to a cluster whose head may have started only now: its agent comes up after its dashboard."""
        deadline = time.monotonic() + AGENT_S
        while True:
            try:
                return self._client.submit_job(**job)
            except RuntimeError as error:
                if NO_AGENT not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)

    def follow(self, name: str) -> Iterator[str]:
        """The job's log from its beginning, as it grows, until the job ends."""
        self.status(name)
        with asyncio.Runner() as runner, _clear_errors(f"cannot follow {name}"):
            log = self._client.tail_job_logs(name)
            while (text := runner.run(_next(log))) is not None:
                yield text

    def status(self, name: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. Raises InputError when there is no job of that name."""
        return str(self._info(name).status.value)

    def ended(self, name: str) -> str:
        """How the job ended, once it has: its log may close a moment earlier."""
        while (status := self.status(name)) not in ENDED:
            time.sleep(POLL_S)
        return status

    def exit_status(self, name: str) -> int:
        """The exit status of the job's command, which has ended; 130 when it was stopped, 1 when Ray failed it."""
        info = self._info(name)
        if info.status == "STOPPED":
            return 130
        if info.driver_exit_code is not None:
            return info.driver_exit_code
        return 0 if info.status == "SUCCEEDED" else 1

    def message(self, name: str) -> str:
        """What Ray says about the job, in one line, without the log that it repeats."""
        return " ".join((self._info(name).message or "").partition(", last available logs")[0].split())

    def stop(self, name: str) -> bool:
        """Ask the job to end, as Ctrl-C does; false when it had ended already."""
        if self.status(name) in ENDED:
            return False
        with _clear_errors(f"cannot stop {name}"):
            return self._client.stop_job(name)

    def _info(self, name: str) -> Any:
        with _clear_errors(f"no answer from {self.address}"):
            try:
                return self._client.get_job_info(name)
            except RuntimeError as error:
                if "does not exist" not in str(error):
                    raise
                names = [job.submission_id for job in self._client.list_jobs() if job.submission_id]
                raise InputError(f"there is no job {name!r}; there are {', '.join(names) or 'none'}") from error


def entrypoint(command: Sequence[str], *, shipped: bool) -> str:
    """The command line that the head runs: of a shipped checkout the shipped code, of an image the installed.

    >>> entrypoint(["prism", "run", "send", "--name", "a b"], shipped=True)
    "python -m prism run send --name 'a b'"
    """
    if shipped and command[0] == "prism":
        command = ["python", "-m", *command]
    return shlex.join(command)


def environment(given: Sequence[str]) -> dict[str, str]:
    """Variables from NAME=VALUE, and from NAME alone that of this process. Raises InputError for what is neither.

    >>> environment(["A=1", "B=x=y"])
    {'A': '1', 'B': 'x=y'}
    """
    made = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not name.isidentifier():
            raise InputError(f"--env {entry}: give NAME=VALUE, or NAME to pass on what it is here")
        if not equals and name not in os.environ:
            raise InputError(f"--env {name}: there is no such variable here; give {name}=VALUE")
        made[name] = value if equals else os.environ[name]
    return made


def _dashboard(address: str | None) -> str:
    if address is None:
        named = [os.environ.get(name, "") for name in ADDRESSES]
        return next((url for url in named if url.startswith(("http://", "https://"))), HERE)
    if not address.startswith(("http://", "https://")):
        raise InputError(f"--address {address}: give the dashboard's, such as http://HOST:8265")
    return address.rstrip("/")


def _client(address: str) -> "JobSubmissionClient":
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    token = _token(address)
    try:
        with _clear_errors(f"cannot use the {DASHBOARD} at {address}"):
            return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except AuthenticationError as error:
        raise PrismError(
            f"the {DASHBOARD} at {probe.shown(address)} wants {'another token' if token else 'a token'}: "
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what ~/.ray/auth_token holds on the cluster's head"
        ) from error


def _token(address: str) -> str | None:
    """Ray's token, when one was given or the cluster is this machine's and the user has its file; else None.

    `ray start` takes that file for granted, Ray's clients of its dashboard do not. Where RAY_AUTH_MODE is set, they
    send it themselves. The environment is left alone: a Ray that this process starts would read it.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return None
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path is None and not probe.on_this_machine(address):
        return None
    try:
        return Path(path or TOKEN).expanduser().read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


async def _next(log: Any) -> str | None:
    return await anext(log, None)


@contextmanager
def _clear_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, ConnectionError, OSError) as error:
        if isinstance(error, PrismError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[-1] if "Traceback" in lines[0] else lines[0]
        raise PrismError(probe.shown(f"{what}: {reason}")) from error
