"""What a run measures, kept in one history: per step, per validation, and where both are shown."""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from pipelines.dataset.storage import Storage

PAIR_METRICS = ("loss", "mse_chosen", "mse_rejected", "margin", "implicit_accuracy")
WRITE_EVERY_S = 5.0


def pair_metrics(loss: Tensor, mse_chosen: Tensor, mse_rejected: Tensor) -> Tensor:
    """Mean of each of PAIR_METRICS over the pairs of a batch: a float32 vector.

    margin = mse_rejected - mse_chosen; implicit accuracy = share of pairs with mse_chosen < mse_rejected.
    """
    import torch

    chosen, rejected = mse_chosen.detach(), mse_rejected.detach()
    columns = (loss.detach(), chosen, rejected, rejected - chosen, (chosen < rejected).float())
    return torch.stack([column.float().mean() for column in columns])


@dataclass
class History:
    """All that was measured so far; travels in the checkpoints, so that a resumed run has no step twice."""

    steps: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "History":
        """What `to_dict` gave."""
        return History(list(data["steps"]), list(data["validations"]))

    def last(self) -> dict[str, float]:
        """The newest numbers, validation ones with a prefix."""
        newest = dict(self.steps[-1]) if self.steps else {}
        if self.validations:
            newest |= {f"validation_{k}": v for k, v in self.validations[-1].items() if k != "step"}
        return newest


class MetricsWriter:
    """Rank 0's outlet: `progress.json` on the storage every few seconds, TensorBoard events at the end of each part.

    Args:
        storage: The storage of the run.
        folder: The run's folder.
        start: The first step of this part; TensorBoard drops what an earlier part wrote beyond it.
    """

    def __init__(self, storage: Storage, folder: str, start: int) -> None:
        self._storage, self._folder, self._start = storage, folder, start
        self._written = 0.0

    def __enter__(self) -> "MetricsWriter":
        from torch.utils.tensorboard import SummaryWriter

        self._local = tempfile.TemporaryDirectory(prefix="mapo-tensorboard-")
        self._board = SummaryWriter(self._local.name, purge_step=self._start)
        return self

    def step(self, metrics: Mapping[str, float], progress: Mapping[str, Any]) -> None:
        """One optimizer step."""
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, int(metrics["step"]))
        if time.monotonic() - self._written >= WRITE_EVERY_S:
            self.progress(progress)

    def validation(self, metrics: Mapping[str, float]) -> None:
        """One validation."""
        for name, value in metrics.items():
            if name not in ("step", "num_pairs"):
                self._board.add_scalar(f"validation/{name}", value, int(metrics["step"]))

    def progress(self, progress: Mapping[str, Any]) -> None:
        """Say where the run is, for `mapo status` and the driver's bar."""
        self._written = time.monotonic()
        self._storage.write(f"{self._folder}/progress.json", json.dumps(progress).encode())

    def flush(self) -> None:
        """Bring the events to the storage."""
        self._board.flush()
        self._storage.upload_folder(f"{self._folder}/tensorboard", Path(self._local.name))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.close()
        if kind is None:
            self.flush()
        self._local.cleanup()
