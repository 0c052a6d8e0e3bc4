"""The driver's request to end training early: an actor beside the driver holds it, rank 0 asks, all ranks agree."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import ray

ASK_EVERY_S = 1.0
WAITS_IN_RAY = "ray-train"
"""The name of the driver's thread that is in Ray Train: Ray must not be shut down under it."""


class _Flag:
    """What the actor holds."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set


def new_flag() -> Any:
    """An actor on the driver's node that is set once; needs no CPU."""
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(_Flag).remote()


class StopRequest:
    """One rank's view of the flag.

    Args:
        flag: From `new_flag`.
        rank: Rank 0 asks in the background; the others hear of it with the step's sums.
    """

    def __init__(self, flag: Any, rank: int) -> None:
        self._flag, self._rank = flag, rank
        self._ended = threading.Event()
        self.seen = 0.0
        """1 on rank 0 once the flag was seen set: an addend to the sums of a step."""
        self.is_agreed = False
        """Whether the ranks have agreed to stop, on all of them after the same step."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Ask every second, on rank 0."""
        thread = threading.Thread(target=self._ask, name="stop-request", daemon=True)
        if self._rank == 0:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()

    def _ask(self) -> None:
        while not self.seen and not self._ended.wait(ASK_EVERY_S):
            with contextlib.suppress(ray.exceptions.RayError):  # the driver is gone, and takes the workers with it
                self.seen = float(ray.get(self._flag.is_set.remote()))
