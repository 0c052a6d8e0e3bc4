"""The metrics of a run in one history, per step and per validation, and the writer that shows them.

Letters: B pairs. See docs/concepts/metrics.md for what each number means.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject
from training.losses import PairErrors
from training.run_progress import RunProgress
from training.tracking.trackers import Tracker

NUM_QUARTERS = 4  # of the timesteps; q1 has the least noise
_COUNTED = ("pairs", "ties", "loss", "mse_chosen", "mse_rejected", "implicit", "reward_pairs", "reward")
NUM_SUMS = len(_COUNTED) + 2 * NUM_QUARTERS
"""Length of what `pair_sums` gives: _COUNTED, then for each quarter its pairs, then for each the right ones."""

WRITE_EVERY_S = 5.0
NO_CURVE = ("step", "num_pairs")  # the axis, and a constant


def pair_sums(
    losses: Tensor, errors: PairErrors, preference_B: Tensor, timesteps_B: Tensor, num_train_timesteps: int
) -> Tensor:
    """Return the sums that the metrics of a batch are computed from; they add up over micro-batches, steps and ranks.

    Stays on the errors' device and never waits for it: add up there, and move the sum to the CPU once per step.

    Args:
        losses: One value per pair.
        errors: The denoising errors that the losses were made of.
        preference_B: Probability that `chosen` is preferred; exactly 0.5 is a tie.
        timesteps_B: int64 in [0, num_train_timesteps).
        num_train_timesteps: Length of the noise schedule.

    Returns:
        float64, NUM_SUMS long; `means_of` reads it.
    """
    with torch.no_grad():
        device = errors.chosen.device
        chosen, rejected = errors.chosen.double(), errors.rejected.double()
        is_tie = preference_B.to(device, non_blocking=True) == 0.5
        implicit = _right(chosen, rejected, is_tie)
        nothing = torch.zeros_like(chosen)
        reward_pairs, reward = nothing, nothing
        if errors.ref_chosen is not None and errors.ref_rejected is not None:
            reward_pairs = torch.ones_like(chosen)
            reward = _right(chosen - errors.ref_chosen.double(), rejected - errors.ref_rejected.double(), is_tie)
        rows = torch.stack(
            [
                torch.ones_like(chosen),
                is_tie.double(),
                losses.double(),
                chosen,
                rejected,
                implicit,
                reward_pairs,
                reward,
            ]
        )
        quarter_B = timesteps_B.to(device, non_blocking=True) * NUM_QUARTERS // num_train_timesteps
        in_quarter = (quarter_B == torch.arange(NUM_QUARTERS, device=device)[:, None]).double()
        return torch.cat([rows, in_quarter, in_quarter * implicit]).sum(dim=1)


def _right(chosen: Tensor, rejected: Tensor, is_tie: Tensor) -> Tensor:
    """Return 1 where the chosen image has the smaller error, 0 where the other has, 0.5 for equal errors and ties."""
    return torch.where(is_tie | (chosen == rejected), 0.5, (chosen < rejected).double())


def means_of(sums: Tensor) -> dict[str, float]:
    """Return the metrics by name, from any sum of `pair_sums`; weighted sums give weighted means.

    A key is absent where no pair counts for it: `implicit_accuracy_qN` of a quarter without timesteps,
    `reward_accuracy` of a method without a reference, `num_ties` without ties.
    """
    values = sums.tolist()
    assert len(values) == NUM_SUMS, f"{len(values)} sums, not {NUM_SUMS}"
    total = dict(zip(_COUNTED, values, strict=False))
    pairs = total["pairs"]
    if not pairs:
        return {"num_pairs": 0.0}
    means = {
        "loss": total["loss"] / pairs,
        "mse_chosen": total["mse_chosen"] / pairs,
        "mse_rejected": total["mse_rejected"] / pairs,
        "margin": (total["mse_rejected"] - total["mse_chosen"]) / pairs,
        "implicit_accuracy": total["implicit"] / pairs,
    }
    if total["reward_pairs"]:
        means["reward_accuracy"] = total["reward"] / total["reward_pairs"]
    per_quarter = values[len(_COUNTED) :]
    for quarter, (pairs_of, right) in enumerate(
        zip(per_quarter[:NUM_QUARTERS], per_quarter[NUM_QUARTERS:], strict=True), start=1
    ):
        if pairs_of:
            means[f"implicit_accuracy_q{quarter}"] = right / pairs_of
    if total["ties"]:
        means["num_ties"] = total["ties"]
    return means | {"num_pairs": pairs}


@dataclass
class History:
    """All metrics so far; saved in the checkpoints, so that a resumed run has no step twice."""

    steps: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> JsonObject:
        """Return it as plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "History":
        """Read the output of `to_dict`."""
        return History(list(data["steps"]), list(data["validations"]))

    def last(self) -> dict[str, float]:
        """Return the newest metrics, those of validations with a prefix."""
        newest = dict(self.steps[-1]) if self.steps else {}
        if self.validations:
            newest |= {f"validation_{k}": v for k, v in self.validations[-1].items() if k != "step"}
        return newest


class MetricsWriter:
    """Rank 0's writer: `progress.json` on the storage every few seconds, and the trackers.

    Args:
        storage: The storage of the run.
        folder: The run's folder.
        trackers: From `training.tracking.trackers.open_trackers`; closed with the writer.
    """

    def __init__(self, storage: Storage, folder: str, trackers: Sequence[Tracker]) -> None:
        self._storage, self._folder, self._trackers = storage, folder, trackers
        self._written = 0.0

    def __enter__(self) -> "MetricsWriter":
        return self

    def step(self, metrics: Mapping[str, float], progress: RunProgress) -> None:
        """Record one optimizer step."""
        self._log("train", metrics)
        if time.monotonic() - self._written >= WRITE_EVERY_S:
            self.progress(progress)

    def validation(self, metrics: Mapping[str, float]) -> None:
        """Record one validation."""
        self._log("validation", metrics)

    def _log(self, group: str, metrics: Mapping[str, float]) -> None:
        named = {f"{group}/{name}": float(value) for name, value in metrics.items() if name not in NO_CURVE}
        for tracker in self._trackers:
            tracker.log(named, int(metrics["step"]))

    @property
    def warnings(self) -> list[str]:
        """Return what went wrong with the trackers, at most one warning each."""
        return [tracker.warning for tracker in self._trackers if tracker.warning]

    def image(self, name: str, image: Image | Path, step: int) -> None:
        """Send an image, such as a grid of samples, to every tracker."""
        for tracker in self._trackers:
            tracker.image(name, image, step)

    def progress(self, progress: RunProgress) -> None:
        """Write the progress of the run, for `mapo status` and the driver's bar."""
        self._written = time.monotonic()
        self._storage.write(f"{self._folder}/progress.json", progress.to_json())

    def flush(self) -> None:
        """Flush the trackers; called before a checkpoint, so that a resumed run has no gaps."""
        for tracker in self._trackers:
            tracker.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)
