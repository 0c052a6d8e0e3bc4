"""The share of simulated experiments whose 95 % interval covers the truth."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from pipelines.suites.statistics import (
    detectable_difference,
    hierarchical_bootstrap,
    mean_interval,
    paired_bootstrap,
    win_rate,
)

Vector = NDArray[np.float64]
DRAWS = 199
"""Draws of an experiment, of which there are thousands; a report has 10,000."""
TOLERANCE = 1.5
"""Points that a measured coverage may be off 95 %; its own standard error is 0.4 to 0.7."""
SHAPES: dict[str, Callable[[np.random.Generator, int], Vector]] = {
    "normal": lambda generator, n: generator.normal(0.0, 1.0, n),
    "skewed": lambda generator, n: generator.gamma(4.0, 0.5, n) - 2.0,  # skewness 1
}


def coverage(experiment: Callable[[np.random.Generator], bool], times: int) -> float:
    """The percentage of experiments whose interval covers the truth."""
    generator = np.random.default_rng(20261130)
    return 100 * sum(experiment(generator) for _ in range(times)) / times


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "times"), [(30, 3000), (100, 3000), (487, 1000)])
def test_ninety_five_per_cent_intervals_cover_the_truth(shape: str, n: int, times: int) -> None:
    def experiment(generator: np.random.Generator) -> bool:
        base = generator.normal(22.0, 3.0, n)
        aligned = base + 0.25 + SHAPES[shape](generator, n)
        found = paired_bootstrap(aligned, base, seed=int(generator.integers(2**32)), num_draws=DRAWS)
        return found.low <= 0.25 <= found.high

    assert coverage(experiment, times) == pytest.approx(95, abs=TOLERANCE)


def test_a_stratified_interval_covers_the_mean_over_tags() -> None:
    sizes, shifts = (8, 20, 40), (0.0, 2.0, -1.0)
    tags = [tag for tag, size in zip("abc", sizes, strict=True) for _ in range(size)]

    def experiment(generator: np.random.Generator) -> bool:
        gains = np.concatenate([generator.normal(each, 1.0, n) for each, n in zip(shifts, sizes, strict=True)])
        seed = int(generator.integers(2**32))
        found = paired_bootstrap(gains, 0 * gains, seed=seed, num_draws=DRAWS, strata=tags, macro=True)
        return found.low <= sum(shifts) / 3 <= found.high

    assert coverage(experiment, 1500) == pytest.approx(95, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("num_runs", "between_runs", "least"), [(3, 0.0, 94.0), (3, 0.3, 89.0), (8, 0.0, 94.0), (8, 0.3, 93.5)]
)
def test_a_hierarchical_interval_covers_the_method(num_runs: int, between_runs: float, least: float) -> None:
    def experiment(generator: np.random.Generator) -> bool:
        gains = 0.25 + generator.normal(0, 1.0, 100) + generator.normal(0, 0.5, (num_runs, 100))
        gains += generator.normal(0, between_runs, (num_runs, 1))
        found = hierarchical_bootstrap(gains, np.zeros(100), seed=int(generator.integers(2**32)), num_draws=DRAWS)
        return found.low <= 0.25 <= found.high

    assert least <= coverage(experiment, 500) <= 99


@pytest.mark.parametrize("n", [30, 100, 487])
def test_wilson_covers_the_win_rate(n: int) -> None:
    """Exactly, from the probability of every outcome, and on average over true rates: single ones swing."""
    ends = [win_rate(each := np.arange(n) < wins, ~each, tolerance=0) for wins in range(n + 1)]
    covered = [
        sum(stats.binom.pmf(wins, n, rate) for wins, end in enumerate(ends) if end.low <= rate <= end.high)
        for rate in np.linspace(0.2, 0.8, 61)
    ]
    assert 100 * float(np.mean(covered)) == pytest.approx(95, abs=TOLERANCE)


def test_wilson_is_too_wide_with_ties_never_too_narrow() -> None:
    def experiment(generator: np.random.Generator) -> bool:
        gains = generator.choice([-1.0, 0.0, 1.0], 200, p=[0.2, 0.5, 0.3])
        found = win_rate(gains, 0 * gains, tolerance=0)
        return found.low <= 0.55 <= found.high

    assert 98 <= coverage(experiment, 1000) <= 100


def test_the_medians_interval_covers_the_median() -> None:
    def experiment(generator: np.random.Generator) -> bool:
        found = mean_interval(generator.exponential(1.0, 30), seed=0, num_draws=100)
        return found.median_low <= math.log(2) <= found.median_high

    assert 95 <= coverage(experiment, 1000) <= 98


def test_a_true_difference_as_large_as_the_detectable_is_shown_four_times_in_five() -> None:
    size = detectable_difference(np.arange(100) % 2, np.zeros(100))  # standard deviation 0.5

    def experiment(generator: np.random.Generator) -> bool:
        gains = generator.normal(size, 0.5, 100)
        return paired_bootstrap(gains, 0 * gains, seed=int(generator.integers(2**32)), num_draws=DRAWS).is_shown

    assert coverage(experiment, 1000) == pytest.approx(80, abs=3)
