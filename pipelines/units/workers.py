"""The workers of an execution, where they do not have a configuration section of their own."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.dataset.config import Device, worker_range


@dataclass(frozen=True)
class Workers:
    """The workers of an execution; a `WorkerSettings` of `pipelines.units.pool`.

    Args:
        stage: The stage's name in progress lines and errors, such as `evaluate`.
        batch_size: Samples, or images, in one pass.
        num_workers: A number, or a range such as `2..8`.
        device: auto, cpu or gpu.
        resources: Custom Ray resources that each requests as well.
        start_timeout_s: Seconds to wait for a node; None for the default of `wait_for`.
    """

    stage: str
    batch_size: int = 16
    num_workers: int | str = 1
    device: Device = "auto"
    resources: Mapping[str, float] = field(default_factory=dict)
    start_timeout_s: int | None = None

    @property
    def worker_range(self) -> tuple[int, int]:
        """The smallest and the largest number of workers."""
        return worker_range(self.num_workers)
