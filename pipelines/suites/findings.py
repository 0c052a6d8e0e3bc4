"""What statistics find: differences, summaries, win rates and agreement, and a sentence for a report."""

import math
from dataclasses import dataclass

from pipelines.suites.resampling import NORMAL

CONFIDENCE, POWER = 0.95, 0.8
MAX_DIGITS = 6
"""Digits before or after the point, beyond which numbers are written with an exponent."""


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over prompts, with its interval."""

    difference: float
    low: float
    high: float
    n: int
    """Number of prompts."""
    p_value: float
    """Two-sided, for no difference; below 0.05 where the 95 % interval leaves out 0, unless all values are equal."""
    standard_error: float
    """inf for one prompt."""
    num_runs: int = 1
    """Number of trainings compared."""

    @property
    def is_shown(self) -> bool:
        """Whether there is a difference, at 95 %."""
        return self.p_value < 1 - CONFIDENCE

    @property
    def detectable(self) -> float:
        """The smallest true difference that 80 % of such runs show at 95 %; see `detectable_difference`."""
        return detectable(self.standard_error, CONFIDENCE, POWER)


@dataclass(frozen=True)
class Summary:
    """Mean and median of one model's values; low and high are the mean's."""

    mean: float
    low: float
    high: float
    n: int
    """Number of prompts."""
    median: float
    median_low: float
    median_high: float


@dataclass(frozen=True)
class WinRate:
    """Share of prompts on which a beats b, ties counting half."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    p_value: float
    """Two-sided sign test of wins against losses."""


@dataclass(frozen=True)
class Agreement:
    """Share of human pairs on which a judge agrees with the label."""

    rate: float
    low: float
    high: float
    n: int
    """Number of pairs."""
    ceiling: float
    """Rate of the best possible judge: 1 unless labels are vote shares."""


def detectable(standard_error: float, confidence: float, power: float) -> float:
    """Return the smallest true difference that a share `power` of experiments with this standard error shows."""
    return (NORMAL.inv_cdf(0.5 + confidence / 2) + NORMAL.inv_cdf(power)) * standard_error


def in_words(difference: Difference, *, name: str) -> str:
    """Return a sentence for a report, without a full stop.

    Numbers are rounded to two significant digits of the interval's width.

    Args:
        difference: With a 95 % interval; of `name` minus the model that it is compared with.
        name: Name of the first model.
    """
    width = difference.high - difference.low or abs(difference.difference) or 1.0
    digits = max(0, 1 - math.floor(math.log10(width)))

    def write(value: float) -> str:
        if digits > MAX_DIGITS or width >= 10.0**MAX_DIGITS:
            return f"{value:.1e}"
        return f"{round(value, digits) + 0.0:.{digits}f}"

    middle, ends = difference.difference, (difference.low, difference.high)
    if difference.n == 1 or difference.standard_error == 0:
        reason = "one prompt" if difference.n == 1 else f"no spread over {difference.n} prompts"
        return f"{reason}, so no interval: {name} differs by {write(middle)}"
    if not difference.is_shown:
        low, high = map(write, ends)
        return (
            f"no difference shown: {write(middle)} ({low} to {high}); "
            f"this run can see differences from {write(difference.detectable)} on"
        )
    low, high = map(write, sorted(map(abs, ends)))
    return f"{name} is {'higher' if middle > 0 else 'lower'} by {write(abs(middle))} ({low} to {high})"
