"""Early ends of training: the driver's request to stop, and notice of a node that is about to be preempted.

An actor on the driver's node holds the request, rank 0 polls it, and all ranks agree. Ray Train reports preemptions.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import ray
import ray.train

ASK_EVERY_S = 1.0  # for the driver's request
CHECK_EVERY_S = 2.0  # for nodes: asking is a barrier over the ranks


class _Flag:
    """The actor that holds the request."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set


def new_flag() -> Any:
    """Start the actor for the stop request on the driver's node; it takes no CPU."""
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(_Flag).remote()


class StopRequest:
    """One rank's view of the flag.

    Args:
        flag: From `new_flag`.
        rank: This rank. Rank 0 polls in the background; the others learn of it from the step's sums.
    """

    def __init__(self, flag: Any, rank: int) -> None:
        self._flag, self._rank = flag, rank
        self._ended = threading.Event()
        self.seen = 0.0
        """1 on rank 0 once the flag was seen set; added to the sums of a step."""
        self.is_agreed = False
        """Whether the ranks have agreed to stop, on all of them after the same step."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Poll the flag every second, on rank 0."""
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


class Notice:
    """Notice that a node of this run is about to be preempted; every rank must ask at the same steps.

    Time is counted from the steps' duration over all ranks, which is the same number everywhere.
    """

    def __init__(self) -> None:
        self._since_s = 0.0
        self._known: frozenset[str] = frozenset()

    def has_come(self, step_s: float) -> bool:
        """Ask Ray Train every few seconds; return true once for each set of nodes. Collective.

        Args:
            step_s: Duration of the step, the same on all ranks.
        """
        self._since_s += step_s
        if self._since_s < CHECK_EVERY_S:
            return False
        self._since_s = 0.0
        found = ray.train.get_preemption_info()
        nodes = frozenset(found.preempted_node_ids) if found is not None else frozenset()
        is_new = not nodes <= self._known
        self._known |= nodes
        return is_new
