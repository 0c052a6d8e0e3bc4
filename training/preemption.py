"""The notice that a node is about to be taken away, as Ray Train passes it on."""

import ray.train

CHECK_EVERY_S = 2.0  # asking is a barrier over the ranks


class Notice:
    """Whether a node of this run is about to be taken away; every rank must ask at the same steps.

    Time is taken from the steps' length over all ranks, which is the same number everywhere.
    """

    def __init__(self) -> None:
        self._since_s = 0.0
        self._known: frozenset[str] = frozenset()

    def has_come(self, step_s: float) -> bool:
        """Ask, now and then; true once for each set of nodes. Collective.

        Args:
            step_s: How long the step took, the same on all ranks.
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
