"""Detects numbers that go wrong in training, and warns or stops the run with the reason."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from pipelines.dataset.errors import TrainingError
from training.config import TroubleConfig

Metrics = Mapping[str, float]
NOISE_DEVIATIONS = 6.0  # standard errors that two windows differ by: none of 500 noisy histories of 2000 steps does
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
        self._growth = _BothErrors(config) if learns_preference else None
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
        for part in (self._explosion, self._growth, self._preference, self._skipping):
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


@dataclass(frozen=True)
class _Window:
    """Mean errors of a window of steps, and the squared standard errors of these means."""

    means: tuple[float, float]
    variances: tuple[float, float]

    @staticmethod
    def of(steps: Iterable[tuple[float, float]]) -> "_Window":
        chosen, rejected = zip(*steps, strict=True)
        (mean_0, variance_0), (mean_1, variance_1) = _mean_with_error(chosen), _mean_with_error(rejected)
        return _Window((mean_0, mean_1), (variance_0, variance_1))


def _mean_with_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and its squared standard error; infinite for one value, which says nothing of the noise."""
    mean, count = fmean(values), len(values)
    if count < 2:
        return mean, math.inf
    return mean, sum((value - mean) ** 2 for value in values) / ((count - 1) * count)


class _BothErrors:
    """Compares both errors of the newest window with the first window's; reports once per window.

    Errors of steps differ by their timesteps, so a growth counts only if it is NOISE_DEVIATIONS standard errors of the
    difference. Steps without a rejected error (`margin_share`, single images) are left out.
    """

    def __init__(self, config: TroubleConfig) -> None:
        self._config = config
        self._newest: deque[tuple[float, float]] = deque(maxlen=config.window)
        self._first: _Window | None = None
        self._quiet = 0

    def see(self, metrics: Metrics) -> Trouble | None:
        if "mse_chosen" not in metrics or "mse_rejected" not in metrics:
            return None
        self._newest.append((metrics["mse_chosen"], metrics["mse_rejected"]))
        self._quiet = max(0, self._quiet - 1)
        window = self._config.window
        if len(self._newest) < window:
            return None
        newest = _Window.of(self._newest)
        if self._first is None:
            self._first = newest
        if self._quiet or not self._has_grown(self._first, newest):
            return None
        self._quiet = window
        return self._trouble(self._first, newest, step=metrics["step"])

    def _has_grown(self, first: _Window, newest: _Window) -> bool:
        pairs = zip(first.means, newest.means, first.variances, newest.variances, strict=True)
        return all(
            after >= self._config.min_error_growth * before and after - before > NOISE_DEVIATIONS * math.sqrt(old + new)
            for before, after, old, new in pairs
        )

    def _trouble(self, first: _Window, newest: _Window, *, step: float) -> Trouble:
        chosen, rejected = (after / before for before, after in zip(first.means, newest.means, strict=True))
        margin = [of_rejected - of_chosen for of_chosen, of_rejected in (first.means, newest.means)]
        wider = (
            "grows only because the rejected error grows faster" if margin[1] > margin[0] else "does not grow either"
        )
        return Trouble(
            self._config.both_errors_grow,
            f"both errors grow: in the {self._config.window} steps up to step {step:.0f} the chosen error is "
            f"{newest.means[0]:.4g} on average, {chosen:.1f} times that of the first ones, and the rejected error "
            f"{newest.means[1]:.4g}, {rejected:.1f} times; the model gets worse at both images, and the margin "
            f"({margin[0]:.3g} at first, {margin[1]:.3g} now) {wider}",
            "set `train.safeguard: 0.6` (0.9 for SD 1.5), `train.rejected_weight: 0.5` or `train.sft_weight`; or lower "
            "`train.learning_rate`, or use a larger beta (docs/guides/training.md#if-both-errors-grow)",
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
