"""Shares of n trials: Wilson's interval, and the exact tail of a fair coin for sign tests and medians."""

import math
from collections.abc import Iterator
from itertools import islice, takewhile

from pipelines.suites.resampling import NORMAL


def wilson(share: float, trials: float, confidence: float) -> tuple[float, float]:
    """Return Wilson's score interval of a share of successes.

    Args:
        share: In 0..1; share * trials need not be whole.
        trials: Number of independent trials, > 0; may be an effective number.
        confidence: In (0, 1).

    Source: Wilson 1927; equals scipy's `proportion_ci(method="wilson")` for whole successes.
    """
    z = NORMAL.inv_cdf(0.5 + confidence / 2)
    shrunk = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    return max(0.0, (shrunk - half) / scale), min(1.0, (shrunk + half) / scale)


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p value of wins against losses under a fair coin; 1 if there are none."""
    return min(1.0, 2 * next(islice(_coin_tails(wins + losses), min(wins, losses), None)))


def median_place(size: int, confidence: float) -> int:
    """Return the place, from either end of the sorted values, at which the interval of their median ends; 0 is the end.

    The interval of all values is all there is for fewer values than the confidence asks for: 6 for 95 %.
    """
    return max(0, sum(1 for _ in takewhile(lambda tail: tail <= (1 - confidence) / 2, _coin_tails(size))) - 1)


def _coin_tails(num_tosses: int) -> Iterator[float]:
    """Yield P(heads <= k) of a fair coin for k = 0, 1, ...; the sums are exact integers."""
    ways, total, whole = 1, 0, 2**num_tosses
    for heads in range(num_tosses + 1):
        total += ways
        yield total / whole
        ways = ways * (num_tosses - heads) // (heads + 1)
