"""Conclusions from a report's numbers: change of held-out accuracy, training speed, time left."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestration.report.records import Interval, Row, TrainingSection

Point = tuple[float, float]

Z = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class Change:
    """Change of a measure."""

    before: Interval
    after: Interval

    @property
    def delta(self) -> float:
        """Difference of the means."""
        return self.after.mean - self.before.mean

    @property
    def verb(self) -> str:
        """`rose`, `fell` or `stayed`."""
        return "rose" if self.delta > 0 else "fell" if self.delta < 0 else "stayed"

    @property
    def is_clear(self) -> bool:
        """Return whether the two intervals are disjoint."""
        return self.before.high < self.after.low or self.after.high < self.before.low


@dataclass(frozen=True)
class HeldOutChange(Change):
    """Change of held-out implicit accuracy from before training to its end."""

    num_pairs: int


@dataclass(frozen=True)
class TrainingSpeed:
    """Speed of a training; numbers that no step has are None.

    Args:
        pairs_per_s: Pairs per second of all workers, median of the steps.
        step_s: Seconds per step, median.
        data_wait_ratio: Share of the time of all steps spent waiting for data.
        mfu: Model FLOPs utilization, median.
        hfu: Hardware FLOPs utilization, median.
        memory_bytes: Most memory that a worker took.
        skipped_steps: Steps skipped because of gradients that were not finite; None without one.
    """

    pairs_per_s: float | None
    step_s: float | None
    data_wait_ratio: float | None
    mfu: float | None
    hfu: float | None
    memory_bytes: float | None
    skipped_steps: float | None

    @property
    def is_known(self) -> bool:
        """Return whether any of it was measured."""
        return any(value is not None for value in vars(self).values())


def finite_points(rows: Sequence[Row], metric: str) -> list[Point]:
    """Return step and value of a metric wherever it is recorded and finite."""
    values = [(float(row["step"]), row.get(metric)) for row in rows]
    return [(step, float(value)) for step, value in values if value is not None and math.isfinite(value)]


def wilson(ratio: float, count: int) -> Interval:
    """Return a share with its 95 % interval (Wilson 1927); draws of one pair count once, to be on the safe side."""
    z2 = Z**2
    centre = (ratio + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (ratio * (1 - ratio) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return Interval(low=max(0.0, centre - half), mean=ratio, high=min(1.0, centre + half))


def held_out_change(training: TrainingSection | None) -> HeldOutChange | None:
    """Return how held-out implicit accuracy changed; None if it was not measured before training and at its end."""
    points = finite_points(training.validation, "implicit_accuracy") if training else []
    num_pairs = int(training.validation[-1]["num_pairs"]) if training and points else 0
    if len(points) < 2 or points[0][0] != 0 or num_pairs < 1:
        return None
    return HeldOutChange(wilson(points[0][1], num_pairs), wilson(points[-1][1], num_pairs), num_pairs)


def training_speed(training: TrainingSection) -> TrainingSpeed:
    """Return the speed of training, from its steps: medians, so that a few slow steps do not count."""
    return TrainingSpeed(
        pairs_per_s=_median(training, "pairs_per_s"),
        step_s=_median(training, "step_s"),
        data_wait_ratio=_data_wait_ratio(training),
        mfu=_median(training, "mfu"),
        hfu=_median(training, "hfu"),
        memory_bytes=max(_values(training, "memory_bytes"), default=None),
        skipped_steps=max(_values(training, "skipped_steps"), default=0.0) or None,
    )


def time_left(training: TrainingSection) -> float | None:
    """Return the seconds that the remaining steps take at the speed of the steps so far; None if that is unknown."""
    step_s = _median(training, "step_s")
    return None if step_s is None else step_s * (training.max_steps - training.steps)


def _data_wait_ratio(training: TrainingSection) -> float | None:
    waiting, step_s = _values(training, "data_wait_ratio"), _values(training, "step_s")
    if waiting and len(waiting) == len(step_s):
        return float(np.average(waiting, weights=step_s))
    return float(np.median(waiting)) if waiting else None


def _median(training: TrainingSection, metric: str) -> float | None:
    values = _values(training, metric)
    return float(np.median(values)) if values else None


def _values(training: TrainingSection, metric: str) -> list[float]:
    return [value for _, value in finite_points(training.history, metric)]
