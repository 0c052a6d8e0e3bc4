"""Detects numbers that go wrong in training, and warns or stops the run with the reason."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pipelines.dataset.errors import TrainingError
from training.config import TroubleConfig

Metrics = Mapping[str, float]
CHANCE_DEVIATIONS = 2.0  # an accuracy farther from 0.5 than this many standard deviations is no chance (95 %)
FINITE = ("loss", "mse_chosen", "mse_rejected", "mse_good", "mse_bad", "mse_prior")


@dataclass(frozen=True)
class Trouble:
    """One thing that went wrong."""

    action: Literal["stop", "warn", "ignore"]
    message: str
    hint: str


class Watch:
    """Watches the metrics of each step.

    Its state is a function of the steps it has seen, so a resumed run reacts like one that was never interrupted; and
    the metrics are the same on every rank, so all ranks stop together.

    Args:
        config: What to do about each kind of trouble.
        history_steps: The metrics of the steps so far.
        learns_preference: False for a method that never looks at the rejected image (sft), whose accuracy may stay at
            chance.
    """

    def __init__(
        self, config: TroubleConfig, history_steps: Iterable[Metrics] = (), *, learns_preference: bool = True
    ) -> None:
        self._config = config
        self._explosion = _Explosion(config)
        self._preference = _Preference(config) if learns_preference else None
        self._skipping = _Skipping(config)
        for metrics in history_steps:
            list(self._troubles(metrics))

    def see(self, metrics: Metrics) -> list[str]:
        """Look at one more step; return the warnings.

        Args:
            metrics: From `means_of` over the global batch, with `step`, `learning_rate` and `skipped_steps`.

        Raises:
            TrainingError: Something went wrong whose reaction is to stop.
        """
        _check_finite(metrics)
        found = [trouble for trouble in self._troubles(metrics) if trouble.action != "ignore"]
        for trouble in found:
            if trouble.action == "stop":
                raise TrainingError(trouble.message, trouble.hint)
        return [f"{trouble.message} (hint: {trouble.hint})" for trouble in found]

    def _troubles(self, metrics: Metrics) -> Iterator[Trouble]:
        for part in (self._explosion, self._preference, self._skipping):
            if part is not None and (trouble := part.see(metrics)) is not None:
                yield trouble


def _check_finite(metrics: Metrics) -> None:
    wrong = [name for name in FINITE if not math.isfinite(metrics.get(name, 0.0))]
    if wrong:
        raise TrainingError(
            f"the {'loss' if 'loss' in wrong else 'error'} of step {metrics['step']:.0f} is {metrics[wrong[0]]} "
            f"({_errors(metrics)}, "
            f"learning rate {metrics.get('learning_rate', math.nan):.3g})",
            "lower `train.learning_rate`, or set `train.precision: fp32` to see whether the precision is the cause",
        )


def _errors(metrics: Metrics) -> str:
    """Return the errors that a step has, in words."""
    names = {"mse_chosen": "chosen error", "mse_rejected": "rejected"} | {
        f"mse_{kind}": f"{kind} images" for kind in ("good", "bad", "prior")
    }
    return ", ".join(f"{words} {metrics[name]:.4g}" for name, words in names.items() if name in metrics)


class _Explosion:
    """Compares the mean chosen error of the newest window with the first window's; reports once per window.

    In a training without pairs, the error is that of good images.
    """

    def __init__(self, config: TroubleConfig) -> None:
        self._config = config
        self._newest: deque[float] = deque(maxlen=config.window)
        self._first: float | None = None
        self._quiet = 0

    def see(self, metrics: Metrics) -> Trouble | None:
        window, ratio = self._config.window, self._config.max_error_ratio
        error = metrics.get("mse_chosen", metrics.get("mse_good"))
        if error is None:
            return None
        self._newest.append(error)
        self._quiet = max(0, self._quiet - 1)
        if len(self._newest) < window:
            return None
        newest = sum(self._newest) / window
        if self._first is None:
            self._first = newest
        if newest <= ratio * self._first or self._quiet:
            return None
        self._quiet = window
        return Trouble(
            self._config.error_explosion,
            f"the chosen error of the {window} steps up to step {metrics['step']:.0f} is {newest:.4g} on average, "
            f"{newest / self._first:.1f} times that of the first {window} ({self._first:.4g}; limit {ratio:g} times)",
            "lower `train.learning_rate`, or choose a loss that holds the chosen error down (mapo_paper with a larger "
            "beta); raise `train.trouble.max_error_ratio` to accept it",
        )


class _Preference:
    """Checks whether `patience` steps in a row have an accuracy above chance; reports once per `patience` steps.

    The accuracy is the one that the method raises: `reward_accuracy` with a reference, else `implicit_accuracy`. With n
    pairs that are not ties, chance gives 0.5 +- 0.5 / sqrt(n). Ties do not count: with ties only, there is no verdict.
    """

    def __init__(self, config: TroubleConfig) -> None:
        self._config = config
        self._counts: deque[tuple[float, float]] = deque(maxlen=config.patience)

    def see(self, metrics: Metrics) -> Trouble | None:
        name = "reward_accuracy" if "reward_accuracy" in metrics else "implicit_accuracy"
        if name not in metrics:
            return None
        all_pairs, ties = metrics.get("num_compared", metrics["num_pairs"]), metrics.get("num_ties", 0.0)
        self._counts.append((all_pairs - ties, metrics[name] * all_pairs - 0.5 * ties))
        pairs, right = (sum(column) for column in zip(*self._counts, strict=True))
        if len(self._counts) < self._config.patience or not pairs:
            return None
        by_chance = CHANCE_DEVIATIONS * 0.5 / math.sqrt(pairs)
        if abs(right / pairs - 0.5) > by_chance:
            return None
        self._counts.clear()
        return Trouble(
            self._config.no_preference,
            f"no preference learned: over the {self._config.patience} steps up to step {metrics['step']:.0f} the "
            f"{name.replace('_', ' ')} is {right / pairs:.4f}, and chance alone gives 0.5 ± {by_chance:.4f} for "
            f"{pairs:.0f} pairs",
            "raise `train.learning_rate`; check the labels (`mapo data show`), because noisy labels look the same; or "
            "raise `train.trouble.patience` to wait longer",
        )


class _Skipping:
    """Counts steps in a row that the engine skipped because a gradient was not finite; reports once per window."""

    def __init__(self, config: TroubleConfig) -> None:
        self._config = config
        self._in_a_row = 0
        self._so_far = 0.0

    def see(self, metrics: Metrics) -> Trouble | None:
        before, self._so_far = self._so_far, metrics.get("skipped_steps", 0.0)
        if self._so_far < before:
            before = 0.0  # counted since the workers' start, and they have started again
        self._in_a_row = self._in_a_row + 1 if self._so_far > before else 0
        window = self._config.window
        if not self._in_a_row or self._in_a_row % window:
            return None
        return Trouble(
            self._config.skipped_steps,
            f"the gradient was not finite for {self._in_a_row} steps in a row up to step {metrics['step']:.0f}, so no "
            f"weight has changed, whatever the loss scale (learning rate "
            f"{metrics.get('learning_rate', math.nan):.3g})",
            "set `train.precision: bf16`, which needs no loss scale, or lower `train.learning_rate`",
        )
