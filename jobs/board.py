"""The notice board of a run: an actor through which the workers show progress and the driver asks them to stop."""

from typing import Any


class Board:
    """Holds what rank 0 posted since the driver last looked, and the driver's wish to stop."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = False

    def post(self, events: list[dict[str, Any]]) -> bool:
        """Add events; returns whether the run should stop at the end of its step."""
        self._events += events
        return self._stop

    def take(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """Ask the workers to save and return."""
        self._stop = True


class Poster:
    """Rank 0's end of the board: collects events and sends them a few times a second without waiting for it."""

    def __init__(self, board: Any, interval_s: float = 0.2) -> None:
        self._board, self._interval = board, interval_s
        self._events: list[dict[str, Any]] = []
        self._pending: Any = None
        self._sent = 0.0
        self.stop_requested = False

    def post(self, **event: Any) -> None:
        """Show one event to the driver, soon."""
        import time

        self._events.append(event)
        if time.monotonic() - self._sent >= self._interval:
            self.flush(wait=False)
            self._sent = time.monotonic()

    def flush(self, *, wait: bool = True) -> None:
        """Send what was collected, and read the driver's answer to the last sending if it is there."""
        import ray

        if self._board is None:
            self._events = []
            return
        if self._pending is not None and (wait or ray.wait([self._pending], timeout=0)[0]):
            self.stop_requested = bool(ray.get(self._pending)) or self.stop_requested
            self._pending = None
        if self._pending is None and self._events:
            self._pending, self._events = self._board.post.remote(self._events), []
            if wait:
                self.stop_requested = bool(ray.get(self._pending)) or self.stop_requested
                self._pending = None
