"""One function over many items, in order: on the tasks of a Ray that runs, or in threads of this process."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pipelines.dataset.errors import unwrap

T = TypeVar("T")
R = TypeVar("R")

THREADS = 8  # what is done here waits for a storage, and digests leave the interpreter to others
WAITING_A_CPU = 2  # submitted for each CPU of the cluster, so that none is idle and none holds many results


def in_parallel(function: Callable[[T], R], items: Sequence[T], *, on_cluster: bool) -> Iterator[R]:
    """What `function` gives for each item, in the order of the items.

    Args:
        function: Must be safe to run again, and picklable if `on_cluster`.
        items: Each becomes one task of 1 CPU, or one call in a thread.
        on_cluster: Whether to use the Ray that this process is connected to.
    """
    return _on_ray(function, items) if on_cluster else _in_threads(function, items)


def _in_threads(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            yield from threads.map(function, items)
        finally:
            threads.shutdown(cancel_futures=True)


def _on_ray(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    import ray

    call: Any = ray.remote(num_cpus=1)(lambda item: function(item))
    most = WAITING_A_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[Any] = deque()
    try:
        for item in items:
            waiting.append(call.remote(item))
            if len(waiting) > most:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except Exception as error:
        # The calls that are still running end by themselves: cancelling one just as it ends would abort this process.
        raise unwrap(error) or error from error
