"""Work that tells its progress by calling back, as the generator that an endpoint's `answer` may be."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue
from threading import Event
from typing import TypeVar

from serving.endpoint import Abandoned, Progress

T = TypeVar("T")

_THREAD = ThreadPoolExecutor(1, thread_name_prefix="steps")  # one for all: malloc gives each new one a heap of its own


def in_steps(work: Callable[[Callable[[int, int], None]], T]) -> Generator[Progress, None, T]:
    """Run `work(told)` in another thread, yield what it tells, `told(done, total)`, and return what it returns.

    What `work` raises is raised here. When the generator is closed, the next `told` raises Abandoned in the work, and
    closing waits for its end. All work goes through one thread, in its order: the heap that one call has filled serves
    the next, where a thread for each call filled one heap after the other.

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

    result = _THREAD.submit(work, told)
    result.add_done_callback(lambda _: tells.put(None))
    try:
        while (progress := tells.get()) is not None:
            yield progress
        return result.result()
    finally:
        closed.set()
        wait([result])
