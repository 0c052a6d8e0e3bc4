"""The wait for the GPUs of a training's workers: says what is missing, and fails if it cannot arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.units.waiting import Shortage, Wait

if TYPE_CHECKING:
    from training.spec import TrainSpec

WAY_OUT = (
    "add GPU nodes, lower `train.num_workers` (a range such as 2..8 takes as many as there are), or set "
    "`train.device: cpu`; `train.start_timeout_s` allows a longer wait"
)


class GpuWait:
    """A wait for the minimum number of GPUs that the workers need; Ray Train itself would request them forever.

    Args:
        spec: The training.
    """

    def __init__(self, spec: TrainSpec) -> None:
        self._wanted, _ = spec.config.worker_range
        timeout_s = spec.config.start_timeout_s
        is_set = "start_timeout_s" in spec.config.model_fields_set
        self._first = self._wait("waiting for free GPUs", timeout_s if is_set else None)
        self._later = self._wait(None, timeout_s)  # workers that have lost nodes, which may come back

    def look(self, has_begun: bool) -> None:
        """Report if it is time to; called about once a second before and while workers train.

        Args:
            has_begun: Whether workers of this training have started before.

        Raises:
            ClusterError: The GPUs did not arrive within the time limit.
        """
        (self._later if has_begun else self._first).look()

    def _wait(self, in_use: str | None, timeout_s: int | None) -> Wait:
        return Wait(
            "train", self._find_shortage, in_use, timeout_s=timeout_s, way_out=WAY_OUT, is_waiting=_has_pending_workers
        )

    def _find_shortage(self) -> Shortage | None:
        from pipelines.resources import total_of

        there = int(total_of("GPU", {}))
        if there >= self._wanted:
            return None
        found = f"the cluster has {there} GPU{'' if there == 1 else 's'}, but training needs {self._wanted}"
        return Shortage(f"{found}; waiting for {self._wanted - there} more", found)


def _has_pending_workers() -> bool:
    """Return whether a group of workers of this process waits in Ray for resources."""
    import ray

    job = ray.get_runtime_context().get_job_id()
    groups = ray.util.placement_group_table().values()  # an id ends with its job's
    return any(group["state"] == "PENDING" and group["placement_group_id"].endswith(job) for group in groups)
