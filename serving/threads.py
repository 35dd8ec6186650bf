"""Work that tells its progress by calling back, as the generator that an endpoint's `answer` may be."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import TypeVar

from serving.endpoint import Abandoned, Progress

T = TypeVar("T")


def in_steps(work: Callable[[Callable[[int, int], None]], T]) -> Generator[Progress, None, T]:
    """Run `work(told)` in a thread of its own, yield what it tells, `told(done, total)`, and return what it returns.

    What `work` raises is raised here. When the generator is closed, the next `told` raises Abandoned in the work, and
    closing waits for its end.

    >>> steps = in_steps(lambda told: [told(step, 2) for step in (1, 2)] and "made")
    >>> [progress.done for progress in steps]
    [1, 2]
    """
    tells: SimpleQueue[Progress | None] = SimpleQueue()
    closed = Event()

    def told(done: int, total: int) -> None:
        if closed.is_set():
            raise Abandoned
        tells.put(Progress(done=done, total=total))

    with ThreadPoolExecutor(1, thread_name_prefix="steps") as pool:
        result = pool.submit(work, told)
        result.add_done_callback(lambda _: tells.put(None))
        try:
            while (progress := tells.get()) is not None:
                yield progress
            return result.result()
        finally:
            closed.set()
