"""Threads that work off a queue and end before the interpreter does.

A daemon thread that is inside torch or Arrow when Python exits aborts the process; a non-daemon thread keeps a failed
process alive forever. These are daemon threads that are stopped and joined at exit.
"""

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

MAX_EXIT_S = 20.0  # a read in flight may be retried meanwhile; after this the process goes

Item = TypeVar("Item")


class Threads(Generic[Item]):
    """A number of threads that handle queued items, in order.

    A `SimpleQueue` costs a microsecond per item, an executor's future thirty.

    Args:
        number: The number of threads.
        name: Prefix of the threads' names.
        handle: Called with each item; must not raise.
    """

    def __init__(self, number: int, name: str, handle: Callable[[Item], None]) -> None:
        self._handle = handle
        self._items: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self.is_stopped = False
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(number)]
        _ALL.add(self)
        for thread in self._threads:
            thread.start()

    def put(self, item: Item) -> None:
        """Queue an item."""
        self._items.put(item)

    def stop(self, *, wait_s: float = 0.0) -> None:
        """Start no further items, and wait at most `wait_s` seconds for the running ones."""
        self.is_stopped = True
        for _ in self._threads:
            self._items.put(None)
        deadline = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (item := self._items.get()) is not None and not self.is_stopped:
            self._handle(item)
            del item  # or an idle thread would keep what it last had


_ALL: weakref.WeakSet[Threads] = weakref.WeakSet()  # type: ignore[type-arg]


@atexit.register
def _stop_all() -> None:
    for threads in list(_ALL):
        threads.stop(wait_s=MAX_EXIT_S)
