"""Maps a function over many items, in order and a bounded number of calls ahead: in threads or as Ray tasks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Generic, TypeVar

from pipelines.dataset.errors import unwrap

T = TypeVar("T")
R = TypeVar("R")

THREADS = 8  # what `in_parallel` does waits for a storage, and digests release the interpreter lock
AHEAD_OF_THREADS = 8 * THREADS  # one slow item does not leave the other threads idle
AHEAD_OF_A_CPU = 2  # calls for each CPU of the cluster, so that none is idle and none holds many results


class Prefetch(Generic[T, R]):
    """Results in the order of the items. The first calls start at once, before anyone asks for a result.

    Args:
        submit: Start the call for an item; return a handle to it.
        result: Wait for a call; return its result.
        cancel: Cancel a call that has not started.
        items: Arguments of the calls.
        num_ahead: Maximum number of calls that are running, or done, before the consumer takes their result.
    """

    def __init__(
        self, submit: Callable[[T], Any], result: Callable[[Any], R], cancel: Callable[[Any], object],
        items: Iterable[T], num_ahead: int,
    ) -> None:  # fmt: skip
        self._submit, self._result, self._cancel, self._items = submit, result, cancel, iter(items)
        self._waiting: deque[Any] = deque(map(submit, islice(self._items, num_ahead)))

    def __iter__(self) -> Iterator[R]:
        while self._waiting:
            result = self._result(self._waiting.popleft())
            self._waiting.extend(map(self._submit, islice(self._items, 1)))
            yield result

    def close(self) -> None:
        """Start no further calls; does not wait for running ones."""
        self._items = iter(())
        while self._waiting:
            self._cancel(self._waiting.popleft())


def prefetch(function: Callable[[T], R], items: Iterable[T], threads: Executor, num_ahead: int) -> Prefetch[T, R]:
    """Return the results of `function` for each item, called in threads and at most `num_ahead` calls early."""

    def submit(item: T) -> Future[R]:
        return threads.submit(function, item)

    return Prefetch(submit, Future.result, Future.cancel, items, num_ahead)


def in_parallel(function: Callable[[T], R], items: Sequence[T], *, on_cluster: bool) -> Iterator[R]:
    """Yield the results of `function` in the order of the items.

    Args:
        function: Must be safe to run again, and picklable if `on_cluster`.
        items: Each becomes one task of 1 CPU, or one call in a thread.
        on_cluster: Whether to use the Ray cluster that this process is connected to.
    """
    return _on_ray(function, items) if on_cluster else _in_threads(function, items)


def _in_threads(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    with ThreadPoolExecutor(THREADS) as threads:
        results = prefetch(function, items, threads, AHEAD_OF_THREADS)
        try:
            yield from results
        finally:
            results.close()


def _on_ray(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    import ray

    call: Any = ray.remote(num_cpus=1)(lambda item: function(item))
    num_ahead = 1 + AHEAD_OF_A_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    try:
        # Nothing is cancelled: calls that are running end by themselves, and cancelling one just as it ends would
        # abort this process.
        yield from Prefetch(call.remote, ray.get, lambda _: None, items, num_ahead)
    except Exception as error:
        raise unwrap(error) or error from error
