"""Following the registry: when an alias moves, the new artifact is loaded beside the old one and takes its place.

The old one answers until the new one has been loaded and has answered the endpoint's own example; then the next batch
is the new one's. A new artifact that is corrupt, foreign or broken is refused: the old one stays, the log and /info
say why, and it is tried again after RETRY_S seconds or when the alias moves on.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from pydantic import BaseModel, Field

from cluster.registry import artifact_version, resolve
from library.artifact import Artifact, open_artifact
from library.errors import InputError, PrismError
from serving.endpoint import Endpoint

LOG = logging.getLogger("ray.serve")
RETRY_S = 60.0


@dataclass(frozen=True)
class Loaded:
    """A model and the artifact that it came from."""

    endpoint: Endpoint
    artifact: Artifact

    @cached_property
    def label(self) -> str:
        """What X-Prism-Model says: the method and the artifact's version."""
        return f"{self.artifact.kind}/{self.artifact.version}"


class Refusal(BaseModel):
    """A new artifact that was not taken."""

    version: str = Field(description="The artifact's version.")
    reason: str
    at: str = Field(description="When it was tried last.")


def load(kind: type[Endpoint], reference: str, device: str) -> Loaded:
    """Load what a reference means now. Raises ArtifactError, InputError or PrismError."""
    artifact = open_artifact(resolve(reference, kind=kind.kind), verify=False)  # resolve has verified it
    return Loaded(kind.load(artifact, device), artifact)


def load_proven(kind: type[Endpoint], reference: str, device: str) -> Loaded:
    """Likewise, and let the model answer the endpoint's first example, which also warms it up."""
    found = load(kind, reference, device)
    example = kind.Request.model_validate(next(iter(kind.examples.values())))
    with suppress(InputError):  # the example is of another data set
        answer = found.endpoint.answer([example])
        if not isinstance(answer, list):
            next(answer, None)
            answer.close()
    return found


class Follower:
    """Looks at a registry reference every `period_s` seconds, in a thread, and hands over what it newly means.

    load     makes the model of the reference; it may fail
    current  the version that is in use
    take     puts a new model in its place
    """

    def __init__(
        self,
        reference: str,
        *,
        load: Callable[[], Loaded],
        current: Callable[[], str],
        take: Callable[[Loaded], None],
        period_s: float,
        told: Callable[[str], None],
    ):
        self.reference, self.load, self.current, self.take, self.told = reference, load, current, take, told
        self.period_s = period_s
        self.refused: Refusal | None = None
        self._tried = -RETRY_S
        self._silent = False  # the registry's absence has been logged
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="updates", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End after the present look."""
        self._stop.set()

    def look(self) -> None:
        """Look once."""
        try:
            meant = artifact_version(self.reference)
        except PrismError as error:
            if not self._silent:
                LOG.warning("updates of %s are not seen: %s", self.reference, error)
            self._silent = True
            return
        self._silent = False
        if meant == self.current():
            self.refused = None
            return
        if self.refused and self.refused.version == meant and time.monotonic() < self._tried + RETRY_S:
            return
        self._tried = time.monotonic()
        try:
            new = self.load()
        except Exception as error:
            reason = " ".join(str(error).split()) if isinstance(error, PrismError) else "it cannot be loaded or used"
            self.refused = Refusal(version=meant, reason=reason, at=datetime.now(UTC).isoformat(timespec="seconds"))
            LOG.error("%s now means %s, refused: %s", self.reference, meant, reason, exc_info=error)
            self.told("refused")
            return
        LOG.info("%s now means %s, in place of %s", self.reference, new.artifact.version, self.current())
        self.take(new)
        self.refused = None
        self.told("taken")

    def _follow(self) -> None:
        while not self._stop.wait(self.period_s):
            self.look()
