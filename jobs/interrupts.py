"""SIGINT and SIGTERM as something to look at, for code that must not be torn apart by an exception."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def counted_interrupts() -> Iterator[list[int]]:
    """Inside the block SIGINT and SIGTERM are only counted; outside the main thread they are left alone."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {
        kind: signal.signal(kind, lambda number, _: seen.append(number)) for kind in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield seen
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
