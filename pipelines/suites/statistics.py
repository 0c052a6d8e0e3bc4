"""Statistics of scores: differences and win rates with intervals, p values, and what a run can see.

The unit is the prompt: one value per prompt, the mean over its images (`per_prompt`); two models are paired by prompt
(`paired`). Values are finite numbers: a failed score is left out, for both models, before it gets here. Bad input
raises ValueError with numbers. One prompt is no error: its interval is the point itself, its p value 1, and `in_words`
says that there is no interval.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.suites.findings import CONFIDENCE, POWER, Agreement, Difference, Summary, WinRate, detectable, in_words
from pipelines.suites.proportions import median_place, sign_test, wilson
from pipelines.suites.resampling import Component, Spread, Vector, spread, standard_error
from pipelines.suites.values import (
    Numbers,
    Paired,
    TagMeans,
    by_tag,
    differences,
    numbers,
    paired,
    per_prompt,
    same_length,
)

__all__ = [
    "Agreement", "Difference", "Paired", "Summary", "TagMeans", "WinRate",
    "agreement", "by_tag", "detectable_difference", "hierarchical_bootstrap", "holm", "in_words", "mean_interval",
    "paired", "paired_bootstrap", "per_prompt", "win_rate",
]  # fmt: skip

NUM_DRAWS = 10_000
"""Draws of a bootstrap."""


def paired_bootstrap(
    a: Numbers,
    b: Numbers,
    *,
    seed: int,
    num_draws: int = NUM_DRAWS,
    confidence: float = CONFIDENCE,
    strata: Sequence[str] | None = None,
    macro: bool = False,
) -> Difference:
    """Compare two models by the mean of a - b, resampling prompts; the order of prompts does not matter.

    Args:
        a: One value per prompt.
        b: The other model's values for the same prompts, in the same order.
        seed: Seed of the draws.
        num_draws: Number of draws; no p value is below 2 / (num_draws + 1).
        confidence: Of the interval, in (0, 1).
        strata: Tag of each prompt. Prompts are resampled within their tag, as a benchmark fixes how many each tag has.
            Tags of one prompt are resampled together; a single one joins the smallest other tag.
        macro: Compare the mean of the tags' means, which is GenEval's overall score, not the mean over prompts.

    Raises:
        ValueError: A value is not finite, lengths differ, nothing is given, or an option is out of range.

    Source: Efron and Tibshirani 1993, chapter 13; widened as in Hesterberg, arXiv 1411.5279.
    """
    gains = differences("paired_bootstrap", a, b)
    resampled = _spread(gains, strata, macro, seed, num_draws)
    return _difference(resampled, confidence, n=len(gains))


def mean_interval(
    values: Numbers,
    *,
    seed: int,
    num_draws: int = NUM_DRAWS,
    confidence: float = CONFIDENCE,
    strata: Sequence[str] | None = None,
    macro: bool = False,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Summary:
    """Return one model's mean and median; to compare models use `paired_bootstrap`, never two of these intervals.

    The median's interval ends at order statistics, by the binomial distribution: no draws, and at least the confidence
    asked for. Fewer than 6 values do not reach 95 %; theirs goes from the smallest to the largest.

    Args:
        values: One value per prompt.
        seed: Seed of the draws.
        num_draws: Number of draws.
        confidence: Of both intervals, in (0, 1).
        strata: Tag of each prompt, as in `paired_bootstrap`.
        macro: Take the mean of the tags' means; the median is over prompts in any case.
        bounds: Ends of the score's scale, such as (0, 1); the mean's interval stays within.

    Raises:
        ValueError: A value is not finite or out of bounds, none is given, or an option is out of range.
    """
    checked = numbers("mean_interval", "values", values)
    ordered = np.sort(checked)
    if not bounds[0] <= ordered[0] <= ordered[-1] <= bounds[1]:
        raise ValueError(f"mean_interval: values go from {ordered[0]:g} to {ordered[-1]:g}, the bounds are {bounds}.")
    resampled = _spread(checked, strata, macro, seed, num_draws)
    low, high = resampled.interval(_share("confidence", confidence))
    place = median_place(len(ordered), confidence)
    return Summary(
        mean=resampled.estimate,
        low=max(low, bounds[0]),
        high=min(high, bounds[1]),
        n=len(ordered),
        median=float(np.median(ordered)),
        median_low=float(ordered[place]),
        median_high=float(ordered[-1 - place]),
    )


def hierarchical_bootstrap(
    a: NDArray[Any], b: NDArray[Any], *, seed: int, num_draws: int = NUM_DRAWS, confidence: float = CONFIDENCE
) -> Difference:
    """Compare a method with a baseline over several trainings: runs and prompts are both resampled.

    All runs answer the same prompts, so the two levels are crossed: means of runs and means of prompts are resampled
    each by themselves, and their deviations add up. A run's luck with a single prompt is counted in both, which errs on
    the wide side. If runs differ more than prompts do, two runs are too few for an honest interval (95 % covers 88 %)
    and three are few (92 %); from five on it is 94 % and more.

    Args:
        a: The method's values, [run, prompt].
        b: The baseline's: [run, prompt], run by run (same training seed), or [prompt] if it is one model.
        seed: Seed of the draws.
        num_draws: Number of draws.
        confidence: Of the interval, in (0, 1).

    Raises:
        ValueError: There are fewer than two runs or prompts, shapes do not fit, a value is not finite, or an option is
            out of range.
    """
    shapes = np.shape(a), np.shape(b)
    if len(shapes[0]) != 2 or min(shapes[0]) < 2 or shapes[1] not in (shapes[0], shapes[0][1:]):
        raise ValueError(
            f"hierarchical_bootstrap: a is {list(shapes[0])} and b is {list(shapes[1])}; they must be [run, prompt], b"
            " perhaps [prompt], with at least two of each. One run says nothing of others: use paired_bootstrap."
        )
    values = [numbers("hierarchical_bootstrap", name, np.ravel(each)) for name, each in (("a", a), ("b", b))]
    gains = values[0].reshape(shapes[0]) - values[1].reshape(shapes[1])
    means = [Component(gains.mean(axis=axis), weight=1.0) for axis in (1, 0)]
    estimate = math.fsum(gains.flat) / gains.size
    resampled = spread(estimate, means, seed=seed, num_draws=_num_draws(num_draws))
    return _difference(resampled, confidence, n=shapes[0][1], num_runs=shapes[0][0])


def detectable_difference(
    a: Numbers,
    b: Numbers,
    *,
    confidence: float = CONFIDENCE,
    power: float = POWER,
    strata: Sequence[str] | None = None,
    macro: bool = False,
) -> float:
    """Return the smallest true difference that this number of prompts shows, in the unit of the values.

    (z(1 - (1 - confidence) / 2) + z(power)) * standard error of the mean of a - b: 1.43 half widths of the interval at
    95 % and 80 %. It follows from how much a - b varies between prompts, not from the difference found.

    Args:
        a: One value per prompt.
        b: The other model's values for the same prompts, in the same order.
        confidence: At which a difference counts as shown, in (0, 1).
        power: Share of such experiments that show it, in (0, 1).
        strata: Tag of each prompt, as in `paired_bootstrap`.
        macro: As in `paired_bootstrap`.

    Raises:
        ValueError: There are fewer than two prompts, or as in `paired_bootstrap`.
    """
    gains = differences("detectable_difference", a, b)
    if len(gains) < 2:
        raise ValueError("detectable_difference: one prompt says nothing of how prompts differ; give two or more.")
    error, _ = standard_error(_components(gains, strata, macro)[1])
    return detectable(error, _share("confidence", confidence), _share("power", power))


def win_rate(a: Numbers, b: Numbers, *, tolerance: float, confidence: float = CONFIDENCE) -> WinRate:
    """Return the share of prompts on which a beats b: (wins + ties / 2) / n, with Wilson's interval.

    Wilson takes a tie as half a success in one trial. Half wins vary less than wins and losses do, so that the interval
    is too wide with many ties (half ties: 99 % covered); the sign test leaves ties out.

    Args:
        a: One value per prompt; higher is better. For several images a prompt, their mean.
        b: The other model's values for the same prompts, in the same order.
        tolerance: Values that differ by no more are a tie; 0 for judges that say 0 or 1, 1e-3 for PickScore's logits.
        confidence: Of the interval, in (0, 1).

    Raises:
        ValueError: A value is not finite, lengths differ, nothing is given, or an option is out of range.
    """
    gains = differences("win_rate", a, b)
    is_tie = np.abs(gains) <= _tolerance(tolerance)
    wins, ties = int(np.sum((gains > 0) & ~is_tie)), int(np.sum(is_tie))
    n = len(gains)
    rate = (wins + ties / 2) / n
    low, high = wilson(rate, n, _share("confidence", confidence))
    losses = n - wins - ties
    return WinRate(rate, low, high, wins=wins, ties=ties, losses=losses, p_value=sign_test(wins, losses))


def agreement(
    scores_0: Numbers,
    scores_1: Numbers,
    label_0: Numbers,
    *,
    tolerance: float = 0.0,
    prompt_ids: Sequence[str] | None = None,
    confidence: float = CONFIDENCE,
) -> Agreement:
    """Return how often a judge agrees with people, on their pairs.

    A pair's credit is the share of people who prefer the image that the judge prefers: 1 or 0 for a plain label, 0.7
    for a vote of 7 to 3, 1/2 for a human tie. If the judge's scores tie, it is 1 for a human tie and 1/2 otherwise.

    Args:
        scores_0: The judge's score of image 0, one value per pair.
        scores_1: Its score of image 1.
        label_0: Probability that people prefer image 0, in 0..1; 0.5 is a tie.
        tolerance: Scores that differ by no more are the judge's tie. PickScore's script chooses a threshold t on the
            difference of the softmax's probabilities, which is a tolerance of 2 * atanh(t) on its logits.
        prompt_ids: Prompt of each pair. Pairs of one prompt are not independent: Wilson's interval is then that of the
            number of independent pairs that would vary as much, at most n. None: no two pairs share a prompt.
        confidence: Of the interval, in (0, 1).

    Raises:
        ValueError: A value is not finite, a label is not in 0..1, lengths differ, nothing is given, or an option is out
            of range.

    Source: PickScore, trainer/scripts/eval_preference_predictor.py, whose credit this is for labels 0, 0.5 and 1.
    """
    margins = differences("agreement", scores_0, scores_1)
    labels = numbers("agreement", "label_0", label_0)
    same_length("agreement", scores_0=margins, label_0=labels)
    if labels.min() < 0 or labels.max() > 1:
        raise ValueError(f"agreement: label_0 goes from {labels.min():g} to {labels.max():g}, it must be in 0..1.")
    is_tie = labels == 0.5
    preferred = np.where(margins > 0, labels, 1 - labels)
    credit = np.where(np.abs(margins) <= _tolerance(tolerance), np.where(is_tie, 1.0, 0.5), preferred)
    rate = math.fsum(credit) / len(credit)
    trials = float(len(credit)) if prompt_ids is None else _independent_pairs(credit, rate, prompt_ids)
    low, high = wilson(rate, trials, _share("confidence", confidence))
    ceiling = float(np.where(is_tie, 1.0, np.maximum(labels, 1 - labels)).mean())
    return Agreement(rate, low, high, n=len(credit), ceiling=ceiling)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p values of the declared primary set, in the order given; no p values, none adjusted.

    Holm keeps the chance of any false claim in the set at the level, however the tests depend on each other.

    Raises:
        ValueError: A p value is not in 0..1.

    Source: Holm 1979; equals R's `p.adjust(method = "holm")`.
    """
    wrong = [each for each in p_values if not 0 <= each <= 1]
    if wrong:
        raise ValueError(f"holm: {len(wrong)} of {len(p_values)} p values are not in 0..1, such as {wrong[0]}.")
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda each: p_values[each])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _difference(resampled: Spread, confidence: float, *, n: int, num_runs: int = 1) -> Difference:
    low, high = resampled.interval(_share("confidence", confidence))
    return Difference(resampled.estimate, low, high, n, resampled.p_value(), resampled.standard_error, num_runs)


def _spread(values: Vector, strata: Sequence[str] | None, macro: bool, seed: int, num_draws: int) -> Spread:
    estimate, components = _components(values, strata, macro)
    return spread(estimate, components, seed=seed, num_draws=_num_draws(num_draws))


def _components(values: Vector, strata: Sequence[str] | None, macro: bool) -> tuple[float, list[Component]]:
    """Return the mean, over prompts or over tags, and the strata that are resampled each by itself.

    A stratum's values are shares in the mean, so that strata of one prompt can be resampled together.
    """
    if strata is None:
        if macro:
            raise ValueError("macro is the mean over tags; give the tag of each prompt as strata.")
        return math.fsum(values) / len(values), [Component(values, weight=1.0)]
    same_length("strata", values=values, strata=strata)
    tags, codes, sizes = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    is_lone = sizes == 1
    if len(tags) > 1 and is_lone.sum() == 1:
        is_lone[np.argmin(np.where(is_lone, len(values), sizes))] = True
    stratum = np.where(is_lone, -1, np.arange(len(tags)))[codes]
    weights = 1 / (len(tags) * sizes[codes]) if macro else np.full(len(values), 1 / len(values))
    shares = weights * values
    parts = [shares[stratum == each] for each in np.unique(stratum)]
    estimate = by_tag(values, strata).macro if macro else math.fsum(values) / len(values)
    return estimate, [Component(each, weight=float(len(each))) for each in parts]


def _independent_pairs(credit: Vector, rate: float, prompt_ids: Sequence[str]) -> float:
    """Return the number of independent pairs whose rate would vary as much as that of these, at most their number."""
    same_length("agreement", scores_0=credit, prompt_ids=prompt_ids)
    prompts, codes = np.unique(np.asarray(prompt_ids), return_inverse=True)
    num_prompts = len(prompts)
    excess = np.bincount(codes, credit - rate)
    variance = float(excess @ excess) / len(credit) ** 2 * num_prompts / max(1, num_prompts - 1)
    if not 0 < rate < 1 or num_prompts == 1:
        return float(num_prompts)
    return min(float(len(credit)), rate * (1 - rate) / variance) if variance > 0 else float(len(credit))


def _num_draws(value: int) -> int:
    if value < 100:
        raise ValueError(f"num_draws is {value}; an interval needs 100 at least, and 10,000 to be steady.")
    return value


def _share(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}; it must be between 0 and 1.")
    return value


def _tolerance(value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"tolerance is {value}; it must be 0 or more, in the unit of the values.")
    return value
