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

from pipelines.dataset.pair import JUDGED, PRIOR
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject
from training.image_losses import ImageErrors
from training.losses import PairErrors
from training.run_progress import RunProgress
from training.tracking.trackers import Tracker

NUM_QUARTERS = 4  # of the timesteps; q1 has the least noise
_COUNTED = (
    "records", "loss", "weighted", "mse_weighted",
    "pairs", "ties", "mse_chosen", "mse_rejected", "implicit", "reward_pairs", "reward",
    "alone", "mse_alone",  # chosen images of pairs whose other image was not looked at
    "good", "mse_good", "bad", "mse_bad", "prior", "mse_prior", "judged", "judged_right",
)  # fmt: skip
NUM_SUMS = len(_COUNTED) + 2 * NUM_QUARTERS
"""Length of what `pair_sums` and `image_sums` give: _COUNTED, then for each quarter its pairs, then the right ones."""

SHARES = (
    ("reward_accuracy", "reward", "reward_pairs"), ("mse_weighted", "mse_weighted", "weighted"),
    ("mse_good", "mse_good", "good"), ("mse_bad", "mse_bad", "bad"), ("mse_prior", "mse_prior", "prior"),
    ("judged_accuracy", "judged_right", "judged"),
)  # fmt: skip
"""Metric, its sum, and the sum of what counts for it."""

WRITE_EVERY_S = 5.0
NO_CURVE = ("step", "num_pairs", "num_images", "num_compared")  # the axis, and a constant


def pair_sums(
    losses: Tensor,
    errors: PairErrors,
    preference_B: Tensor,
    timesteps_B: Tensor,
    num_train_timesteps: int,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Return the sums that the metrics of a batch are computed from; they add up over micro-batches, steps and ranks.

    Stays on the errors' device and never waits for it: add up there, and move the sum to the CPU once per step.

    Args:
        losses: One value per pair.
        errors: The denoising errors that the losses were made of.
        preference_B: Probability that `chosen` is preferred; exactly 0.5 is a tie.
        timesteps_B: int64 in [0, num_train_timesteps).
        num_train_timesteps: Length of the noise schedule.
        weights_B: The weights of the timesteps, if `train.snr_weighting` is on.

    Returns:
        float64, NUM_SUMS long; `means_of` reads it.
    """
    with torch.no_grad():
        device = errors.chosen.device
        chosen, rejected = errors.chosen.double(), errors.rejected.double()
        is_tie = preference_B.to(device, non_blocking=True) == 0.5
        implicit = _right(chosen, rejected, is_tie)
        found = {
            **_of_losses(losses, chosen, weights_B),
            "pairs": torch.ones_like(chosen),
            "ties": is_tie.double(),
            "mse_chosen": chosen,
            "mse_rejected": rejected,
            "implicit": implicit,
        }
        if errors.ref_chosen is not None and errors.ref_rejected is not None:
            found["reward_pairs"] = torch.ones_like(chosen)
            found["reward"] = _right(
                chosen - errors.ref_chosen.double(), rejected - errors.ref_rejected.double(), is_tie
            )
        quarter_B = timesteps_B.to(device, non_blocking=True) * NUM_QUARTERS // num_train_timesteps
        in_quarter = (quarter_B == torch.arange(NUM_QUARTERS, device=device)[:, None]).double()
        return torch.cat([_rows(found), in_quarter, in_quarter * implicit]).sum(dim=1)


def image_sums(
    losses: Tensor, errors: ImageErrors, kind: str, is_good_B: Tensor, weights_B: Tensor | None = None
) -> Tensor:
    """Return the sums of a batch of images, as `pair_sums` does for pairs.

    Args:
        losses: One value per image.
        errors: The denoising errors that the losses were made of.
        kind: pair for chosen images whose pair is not compared; judged or prior.
        is_good_B: Whether a judged image is good.
        weights_B: The weights of the timesteps, if `train.snr_weighting` is on.
    """
    with torch.no_grad():
        error = errors.error.double()
        found = _of_losses(losses, error, weights_B)
        if kind == JUDGED:
            good = is_good_B.to(error.device, non_blocking=True).double()
            found |= {"good": good, "mse_good": good * error, "bad": 1 - good, "mse_bad": (1 - good) * error}
            if errors.reference is not None:
                gain = errors.reference.double() - error
                found["judged"] = torch.ones_like(error)
                found["judged_right"] = torch.where(gain == 0, 0.5, ((gain > 0) == (good > 0)).double())
        else:
            name = "prior" if kind == PRIOR else "alone"
            found |= {name: torch.ones_like(error), f"mse_{name}": error}
        quarters = error.new_zeros(2 * NUM_QUARTERS, len(error))
        return torch.cat([_rows(found), quarters]).sum(dim=1)


def _of_losses(losses: Tensor, error: Tensor, weights_B: Tensor | None) -> dict[str, Tensor]:
    """Return the rows that pairs and images have alike; `error` is that of the image to be learned from."""
    found = {"records": torch.ones_like(error), "loss": losses.double()}
    if weights_B is not None:
        found |= {"weighted": torch.ones_like(error), "mse_weighted": weights_B.to(error.device).double() * error}
    return found


def _rows(found: Mapping[str, Tensor]) -> Tensor:
    nothing = torch.zeros_like(found["records"])
    return torch.stack([found.get(name, nothing) for name in _COUNTED])


def _right(chosen: Tensor, rejected: Tensor, is_tie: Tensor) -> Tensor:
    """Return 1 where the chosen image has the smaller error, 0 where the other has, 0.5 for equal errors and ties."""
    return torch.where(is_tie | (chosen == rejected), 0.5, (chosen < rejected).double())


def means_of(sums: Tensor) -> dict[str, float]:
    """Return the metrics by name, from any sum of `pair_sums` and `image_sums`; weighted sums give weighted means.

    A key is absent where nothing counts for it: `implicit_accuracy_qN` of a quarter without timesteps,
    `reward_accuracy` of a method without a reference, `num_ties` without ties, `mse_rejected`, `margin` and
    `implicit_accuracy` without compared pairs, `mse_good` and its like without such images.
    """
    values = sums.tolist()
    assert len(values) == NUM_SUMS, f"{len(values)} sums, not {NUM_SUMS}"
    total = dict(zip(_COUNTED, values, strict=False))
    pairs, alone = total["pairs"], total["alone"]
    if not total["records"]:
        return {"num_pairs": 0.0}
    means = {"loss": total["loss"] / total["records"], **_of_pairs(total)}
    means |= {name: total[part] / total[whole] for name, part, whole in SHARES if total[whole]}
    per_quarter = values[len(_COUNTED) :]
    quarters = zip(per_quarter[:NUM_QUARTERS], per_quarter[NUM_QUARTERS:], strict=True)
    means |= {f"implicit_accuracy_q{n}": right / of for n, (of, right) in enumerate(quarters, start=1) if of}
    images = total["good"] + total["bad"] + total["prior"]
    counts = {"num_ties": total["ties"], "num_compared": pairs if alone else 0.0, "num_images": images}
    means |= {name: count for name, count in counts.items() if count}
    return means | {"num_pairs": pairs + alone}


def _of_pairs(total: Mapping[str, float]) -> dict[str, float]:
    """Return the means over pairs: the chosen error over all, the others over those with both errors."""
    pairs, alone = total["pairs"], total["alone"]
    means = {}
    if pairs or alone:
        means["mse_chosen"] = (total["mse_chosen"] + total["mse_alone"]) / (pairs + alone)
    if pairs:
        means |= {
            "mse_rejected": total["mse_rejected"] / pairs,
            "margin": (total["mse_rejected"] - total["mse_chosen"]) / pairs,
            "implicit_accuracy": total["implicit"] / pairs,
        }
    return means


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
