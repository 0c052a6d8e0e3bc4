"""Resample means: from independent values to a standard error, an interval and a p value that agree.

The method is the percentile bootstrap, widened: the deviations of the draws from the estimate are stretched by
sqrt(n / (n - 1)), because resamples vary too little by that factor, and by t / z, Student's quantile over the normal
one. Of 95 % intervals of 30 values, these cover the truth in 94.8 % of experiments if values are normal, 93.8 % at a
skewness of 1.4, 94.6 % with heavy tails (t of 5 degrees); plain percentiles in 93.9, 92.3, 92.6 %; BCa in 93.5, 92.5,
91.5 %. Rare flips of a 0/1 judge, one prompt in ten, need 100 prompts (95.6 %; with 30 only 91 %).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
NORMAL = NormalDist()
MAX_CHUNK_VALUES = 2_000_000
"""Values resampled at once: about 40 MB with their indices."""
ROUNDING = 1e-12
"""Values whose range is smaller than this, relative to the largest, are equal but for rounding."""


@dataclass(frozen=True)
class Component:
    """Independent values, such as the prompts of one tag, whose weighted mean is one term of an estimate."""

    values: Vector
    """Ascending, so that no result depends on the order in which they came."""
    weight: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.sort(self.values))


@dataclass(frozen=True)
class Spread:
    """How far an estimate moves if its values are drawn anew."""

    estimate: float
    deviations: Vector
    """Deviation of each draw from the estimate, ascending; unbiased in variance, not yet stretched by t / z."""
    standard_error: float
    """Of the estimate, from the values' own variance; inf for a single value."""
    degrees: float
    """Degrees of freedom of the standard error (Satterthwaite), >= 1."""
    count: int
    """Number of values behind the estimate."""

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return low and high; both are the estimate if there is one value, or if all are equal."""
        return self._ends(NORMAL.inv_cdf(0.5 + confidence / 2))

    def p_value(self) -> float:
        """Return 1 - confidence of the widest interval that leaves out 0: p < 0.05 if the 95 % interval does.

        Never below 2 / (num_draws + 1). Equal values have no spread to compare with; they get the p of a sign test.
        """
        smallest = 2 / (len(self.deviations) + 1)
        if self.deviations[0] == self.deviations[-1]:
            return 1.0 if self.estimate == 0 else max(smallest, 2.0 ** (1 - self.count))
        outside, inside = 0.0, NORMAL.inv_cdf(1 - smallest / 2)
        if not self._has_zero(inside):
            return smallest
        for _ in range(30):
            middle = (outside + inside) / 2
            if self._has_zero(middle):
                inside = middle
            else:
                outside = middle
        return min(1.0, 2 * NORMAL.cdf(-inside))

    def _has_zero(self, z: float) -> bool:
        low, high = self._ends(z)
        return low <= 0 <= high

    def _ends(self, z: float) -> tuple[float, float]:
        """Return the ends of the interval at -z and +z of a normal distribution, z > 0."""
        stretch = student(z, self.degrees) / z
        low, high = (self.estimate + stretch * self._quantile(NORMAL.cdf(each)) for each in (-z, z))
        return low, high

    def _quantile(self, probability: float) -> float:
        """Return the deviation at a probability: draw number i of m is at i / (m + 1), linear in between."""
        rank = min(max(0.0, probability * (len(self.deviations) + 1) - 1), len(self.deviations) - 1.0)
        below = min(int(rank), len(self.deviations) - 2)
        low, high = self.deviations[below : below + 2].tolist()
        return float(low + (rank - below) * (high - low))


def spread(estimate: float, components: Sequence[Component], *, seed: int, num_draws: int) -> Spread:
    """Resample each component with replacement, by itself, and add up their means.

    Args:
        estimate: What is observed: as a rule the sum of weight * mean over the components.
        components: At least one. One of a single value adds no spread.
        seed: Seed of the draws.
        num_draws: Number of draws.
    """
    generator = np.random.default_rng(seed)
    deviations = np.zeros(num_draws)
    for component in components:
        if not _is_constant(component.values):
            deviations += _deviations(component, generator, num_draws)
    error, degrees = standard_error(components)
    count = sum(len(component.values) for component in components)
    return Spread(estimate, np.sort(deviations), error, degrees, count)


def standard_error(components: Sequence[Component]) -> tuple[float, float]:
    """Return the standard error of the sum of weighted means, and its degrees of freedom after Satterthwaite.

    The error of a single value is inf, that of equal values 0; both have one degree.
    """
    if sum(len(each.values) for each in components) == 1:
        return math.inf, 1.0
    varying = [each for each in components if not _is_constant(each.values)]
    variances = [each.weight**2 * float(each.values.var(ddof=1)) / len(each.values) for each in varying]
    total = sum(variances)
    if total == 0:
        return 0.0, 1.0
    by_degrees = sum((each / total) ** 2 / (len(of.values) - 1) for each, of in zip(variances, varying, strict=True))
    return math.sqrt(total), 1 / by_degrees


def student(z: float, degrees: float) -> float:
    """Return the quantile of Student's t at the probability at which z is the normal distribution's; z >= 0.

    Source: Wallace, Bounds on normal approximations to Student's and the chi-square distributions, 1959. At z = 1.96 it
    is off by 0.3 % for 5 degrees and by 4 % for 2, and too large by a third for 1.
    """
    scaled = z * (8 * degrees + 3) / (8 * degrees + 1)
    return math.sqrt(degrees * math.expm1(scaled**2 / degrees))


def _deviations(component: Component, generator: np.random.Generator, num_draws: int) -> Vector:
    """Return weight * (mean of a resample - mean), once a draw, with the variance that the mean really has."""
    size = len(component.values)
    centred = component.values - component.values.mean()
    means = np.empty(num_draws)
    rows = max(1, MAX_CHUNK_VALUES // size)
    for start in range(0, num_draws, rows):
        shape = (min(rows, num_draws - start), size)
        means[start : start + rows] = centred[generator.integers(0, size, shape, dtype=np.int32)].mean(axis=1)
    return means * (component.weight * math.sqrt(size / (size - 1)))


def _is_constant(values: Vector) -> bool:
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())
