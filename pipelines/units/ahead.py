"""`map` in threads and in order, a bounded number of calls ahead of the consumer."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Ahead(Generic[T, R]):
    """Results in order of the items. The first calls begin at once, before anyone asks for a result.

    Args:
        function: Called in a thread for each item.
        items: What it is called with.
        threads: Where it is called.
        num_ahead: Calls that run or have ended before the consumer takes their result, at most.
    """

    def __init__(self, function: Callable[[T], R], items: Iterable[T], threads: Executor, num_ahead: int) -> None:
        self._function, self._items, self._threads = function, iter(items), threads
        self._waiting: deque[Future[R]] = deque(map(self._submit, islice(self._items, num_ahead)))

    def _submit(self, item: T) -> Future[R]:
        return self._threads.submit(self._function, item)

    def __iter__(self) -> Iterator[R]:
        while self._waiting:
            result = self._waiting.popleft().result()
            self._waiting.extend(map(self._submit, islice(self._items, 1)))
            yield result

    def close(self) -> None:
        """Nothing is begun any more; what runs is not waited for."""
        self._items = iter(())
        while self._waiting:
            self._waiting.popleft().cancel()
