"""Intervals, win rates and p values against scipy, sums by hand and PickScore's rule; test_coverage.py simulates."""

import math
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from pipelines.suites.resampling import student
from pipelines.suites.statistics import (
    Difference,
    agreement,
    by_tag,
    detectable_difference,
    hierarchical_bootstrap,
    holm,
    in_words,
    mean_interval,
    paired,
    paired_bootstrap,
    per_prompt,
    win_rate,
)

Compare = Callable[..., object]
DRAWS = 199
"""Draws of a test; a report has 10,000."""
VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30)


def test_the_detectable_difference_is_that_of_the_interval() -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 500))
    found = paired_bootstrap(a, b, seed=0)
    assert found.detectable == detectable_difference(a, b)
    assert found.detectable == pytest.approx((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * stats.sem(a - b))
    assert found.detectable == pytest.approx(1.43 * (found.high - found.low) / 2, rel=0.03)


def test_p_values_are_uniform_without_a_difference() -> None:
    generator = np.random.default_rng(3)
    values = [
        paired_bootstrap(generator.normal(size=60), np.zeros(60), seed=seed, num_draws=DRAWS).p_value
        for seed in range(400)
    ]
    assert stats.kstest(values, "uniform").pvalue > 0.01


@settings(max_examples=60)
@given(VALUES, st.sampled_from([0.8, 0.95, 0.99]))
def test_an_interval_leaves_out_zero_exactly_if_p_says_so(values: list[float], confidence: float) -> None:
    found = paired_bootstrap(values, [0.0] * len(values), seed=0, num_draws=DRAWS, confidence=confidence)
    if found.standard_error > 0 and abs(found.p_value - (1 - confidence)) > 1e-7:
        assert (found.p_value < 1 - confidence) == (not found.low <= 0 <= found.high)
    assert 2 / (DRAWS + 1) <= found.p_value <= 1


def test_p_agrees_with_a_t_test() -> None:
    gains = np.random.default_rng(8).normal(0.2, 1.0, 120)
    found = paired_bootstrap(gains, 0 * gains, seed=0)
    assert found.p_value == pytest.approx(stats.ttest_1samp(gains, 0).pvalue, abs=0.01)


@pytest.mark.parametrize("n", [4, 10, 30])
def test_few_prompts_widen_the_interval_as_students_t_does(n: int) -> None:
    gains = stats.norm.ppf((np.arange(n) + 0.5) / n)  # symmetric
    found = paired_bootstrap(gains, 0 * gains, seed=0, num_draws=40_000)
    plain = np.random.default_rng(0).choice(gains, (40_000, n)).mean(axis=1)
    expected = np.quantile(plain, [0.025, 0.975]) * math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1) / 1.959964
    assert [found.low, found.high] == pytest.approx(expected, rel=0.03)
    assert found.standard_error == pytest.approx(stats.sem(gains))


@pytest.mark.parametrize(("degrees", "relative"), [(2, 0.05), (5, 3e-3), (29, 1e-4), (486, 1e-6)])
def test_students_quantile_is_scipys(degrees: int, relative: float) -> None:
    for z in (0.5, 1.0, 1.96):
        assert student(z, degrees) == pytest.approx(stats.t.isf(stats.norm.sf(z), degrees), rel=relative)


@settings(max_examples=40)
@given(VALUES, st.randoms(use_true_random=False))
def test_the_order_of_prompts_changes_nothing(values: list[float], random: Any) -> None:
    shuffled = random.sample(values, len(values))
    zeros = [0.0] * len(values)
    assert paired_bootstrap(shuffled, zeros, seed=4, num_draws=100) == paired_bootstrap(
        values, zeros, seed=4, num_draws=100
    )
    assert mean_interval(shuffled, seed=4, num_draws=100) == mean_interval(values, seed=4, num_draws=100)


def test_equal_seeds_give_equal_results_and_others_nearly_so() -> None:
    a, b = np.random.default_rng(5).normal(size=(2, 200))
    first, again, other = (paired_bootstrap(a, b, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert other.difference == first.difference
    assert [other.low, other.high] == pytest.approx([first.low, first.high], abs=0.01)
    runs = np.random.default_rng(6).normal(size=(3, 40))
    assert hierarchical_bootstrap(runs, b[:40], seed=1) == hierarchical_bootstrap(runs, b[:40], seed=1)


def test_a_shared_difficulty_of_prompts_cancels_out() -> None:
    generator = np.random.default_rng(7)
    base = generator.normal(0, 10.0, 100)
    found = paired_bootstrap(base + 0.3 + generator.normal(0, 0.1, 100), base, seed=0)
    assert found.high - found.low < 0.05
    assert mean_interval(base, seed=0).high - mean_interval(base, seed=0).low > 3


def test_strata_narrow_the_interval_where_tags_differ_and_nowhere_else() -> None:
    generator = np.random.default_rng(9)
    tags = ["single", "colors", "position"] * 40
    noise = generator.normal(size=120)
    gains = noise + np.tile([0.0, 3.0, 6.0], 40)
    zeros = np.zeros(120)
    plain, stratified = (paired_bootstrap(gains, zeros, seed=0, strata=each) for each in (None, tags))
    assert stratified.difference == plain.difference
    assert stratified.standard_error < 0.5 * plain.standard_error
    alike = [paired_bootstrap(noise, zeros, seed=0, strata=each).standard_error for each in (None, tags)]
    assert alike[1] == pytest.approx(alike[0], rel=0.05)


def test_macro_is_the_mean_of_the_tags_means() -> None:
    values, tags = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0], ["a", "a", "a", "a", "b", "b"]
    assert by_tag(values, tags) == by_tag(values[::-1], tags[::-1])
    assert astuple(by_tag(values, tags)) == (0.625, {"a": 0.75, "b": 0.5})
    assert paired_bootstrap(values, [0.0] * 6, seed=0, strata=tags, macro=True).difference == 0.625
    assert mean_interval(values, seed=0, strata=tags, macro=True).mean == 0.625
    assert mean_interval(values, seed=0, strata=tags).mean == pytest.approx(4 / 6)


@pytest.mark.parametrize("tags", ["aaabbc", "aaabcd", "abcdef", "aaaaaa"])
def test_a_tag_of_one_prompt_still_counts_as_uncertain(tags: str) -> None:
    found = paired_bootstrap([1.0, 1.1, 0.9, 4.0, 4.1, 9.0], [0.0] * 6, seed=0, strata=list(tags))
    assert 0 < found.standard_error < math.inf
    assert found.low < found.difference < found.high


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=60))
def test_a_win_rate_is_scipys_binomial(gains: list[float]) -> None:
    found = win_rate(gains, [0.0] * len(gains), tolerance=0.5)
    wins, ties, losses = (gains.count(each) for each in (1.0, 0.0, -1.0))
    assert (found.wins, found.ties, found.losses) == (wins, ties, losses)
    assert found.rate == (wins + ties / 2) / len(gains)
    if ties % 2 == 0:
        interval = stats.binomtest(wins + ties // 2, len(gains)).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx(tuple(interval), abs=1e-9)
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert found.p_value == pytest.approx(expected)


def test_the_sign_test_is_exact_for_thousands_of_prompts() -> None:
    gains = np.where(np.arange(3200) < 1700, 1.0, -1.0)
    assert win_rate(gains, 0 * gains, tolerance=0).p_value == pytest.approx(stats.binomtest(1700, 3200).pvalue)
    assert win_rate(abs(gains), 0 * gains, tolerance=0).p_value == 0.0  # 2 / 2^3200


def test_values_within_the_tolerance_are_a_tie() -> None:
    found = win_rate([22.4005, 22.5, 22.3], [22.4, 22.4, 22.4], tolerance=1e-3)
    assert (found.wins, found.ties, found.losses, found.rate) == (1, 1, 1, 0.5)
    assert win_rate([22.4005], [22.4], tolerance=0).wins == 1


def test_swapping_the_models_mirrors_the_win_rate() -> None:
    a, b = np.random.default_rng(2).integers(0, 3, (2, 50))
    there, back = win_rate(a, b, tolerance=0), win_rate(b, a, tolerance=0)
    assert (there.wins, there.ties, there.p_value) == (back.losses, back.ties, back.p_value)
    assert (there.low, there.high) == pytest.approx((1 - back.high, 1 - back.low))


def test_holm_is_the_example_worked_by_hand() -> None:
    # sorted 0.005 0.01 0.03 0.04, times 4 3 2 1: 0.02 0.03 0.06 0.04, and never less than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12), st.randoms(use_true_random=False))
def test_holm_keeps_the_order_and_lies_between_the_p_value_and_bonferroni(values: list[float], random: Any) -> None:
    adjusted = holm(values)
    for p, after in zip(values, adjusted, strict=True):
        assert p <= after <= min(1.0, p * len(values)) or after == p
        assert all(after <= other_after for q, other_after in zip(values, adjusted, strict=True) if p < q)
    places = random.sample(range(len(values)), len(values))
    assert holm([values[each] for each in places]) == [adjusted[each] for each in places]


def test_runs_count_beside_prompts() -> None:
    generator = np.random.default_rng(11)
    base = generator.normal(size=200)
    runs = base + np.array([[0.1], [0.5], [0.9]]) + generator.normal(0, 0.3, (3, 200))
    found = hierarchical_bootstrap(runs, base, seed=0)
    alone = paired_bootstrap(runs[1], base, seed=0)
    assert alone.is_shown
    assert not found.is_shown
    assert (found.n, found.num_runs) == (200, 3)
    assert found.difference == pytest.approx(0.5, abs=0.05)
    assert found.high - found.low > 5 * (alone.high - alone.low)


def test_runs_of_the_baseline_are_paired_run_by_run() -> None:
    generator = np.random.default_rng(12)
    seeds = generator.normal(0, 5.0, (4, 1))
    baseline = seeds + generator.normal(size=(4, 100))
    found = hierarchical_bootstrap(baseline + 0.5 + generator.normal(0, 0.1, (4, 100)), baseline, seed=0)
    assert found.is_shown
    assert found.difference == pytest.approx(0.5, abs=0.05)


def credit_of_pickscore(label: float, score_0: float, score_1: float, threshold: float) -> float:
    """1 if label and prediction are the same word, 1/2 if one of them is a tie, else 0."""
    share_0 = 1 / (1 + math.exp(score_1 - score_0))
    predicted = "tie" if abs(2 * share_0 - 1) <= threshold else "0" if share_0 > 0.5 else "1"
    labelled = {0.5: "tie", 1.0: "0", 0.0: "1"}[label]
    return 1.0 if labelled == predicted else 0.5 if "tie" in (labelled, predicted) else 0.0


PAIRS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-4, 4), st.floats(-4, 4)), min_size=1, max_size=20
)


@given(PAIRS, st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_agreement_is_that_of_pickscores_script(pairs: list[tuple[float, float, float]], threshold: float) -> None:
    rounded = [(label, round(x, 2), round(y, 2)) for label, x, y in pairs]  # far from the threshold's rounding
    labels, scores_0, scores_1 = (list(each) for each in zip(*rounded, strict=True))
    found = agreement(scores_0, scores_1, labels, tolerance=2 * math.atanh(threshold) + 1e-12)
    assert found.rate == pytest.approx(np.mean([credit_of_pickscore(*each, threshold) for each in rounded]))
    assert (found.n, found.ceiling) == (len(pairs), 1.0)


def test_a_vote_share_is_the_credit_and_the_ceiling() -> None:
    found = agreement([1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0], [0.7, 0.7, 0.5, 0.9])
    assert found.rate == pytest.approx((0.7 + 0.3 + 0.5 + 0.5) / 4)
    assert found.ceiling == pytest.approx((0.7 + 0.7 + 1.0 + 0.9) / 4)
    ones = np.ones(4)
    assert agreement(ones, 0 * ones, ones).rate == 1.0


def test_pairs_of_one_prompt_count_for_less_than_pairs_of_many() -> None:
    is_right = np.repeat(np.arange(40) % 3 > 0, 10)  # ten pairs a prompt, all right or all wrong
    labels = is_right.astype(float)
    arguments = np.ones(400), np.zeros(400), labels
    alone = agreement(*arguments)
    together = agreement(*arguments, prompt_ids=[str(each // 10) for each in range(400)])
    apart = agreement(*arguments, prompt_ids=[str(each) for each in range(400)])
    assert together.rate == alone.rate
    expected = stats.binomtest(26, 40).proportion_ci(method="wilson")
    assert (together.low, together.high) == pytest.approx(tuple(expected), abs=0.01)
    assert (apart.low, apart.high) == pytest.approx((alone.low, alone.high), abs=1e-3)


def test_images_are_averaged_over_their_prompt_first() -> None:
    means = per_prompt([1.0, 2.0, 6.0, 4.0], ["b", "a", "a", "a"])
    assert list(means.items()) == [("a", 4.0), ("b", 1.0)]


def test_prompts_that_failed_for_one_model_are_left_out_of_both_and_counted() -> None:
    both = paired({"c": 3.0, "a": 1.0, "b": None, "d": 4.0}, {"a": 0.5, "b": 2.0, "c": 0.0, "e": 1.0})
    assert both.prompt_ids == ("a", "c")
    assert (both.a.tolist(), both.b.tolist()) == ([1.0, 3.0], [0.5, 0.0])
    assert both.num_left_out == 3
    with pytest.raises(ValueError, match="none of 2 prompts has a value of both models"):
        paired({"a": 1.0}, {"b": 1.0})


def test_one_prompt_has_no_interval_and_no_difference_shown() -> None:
    found = paired_bootstrap([1.5], [1.0], seed=0)
    assert (found.difference, found.low, found.high, found.n, found.p_value) == (0.5, 0.5, 0.5, 1, 1.0)
    assert found.detectable == math.inf
    assert not found.is_shown
    assert in_words(found, name="aligned") == "one prompt, so no interval: aligned differs by 0.50"
    assert astuple(mean_interval([2.0], seed=0)) == (2.0, 2.0, 2.0, 1, 2.0, 2.0, 2.0)
    assert win_rate([1.0], [0.0], tolerance=0).p_value == 1.0


def test_equal_differences_are_shown_only_by_many_prompts() -> None:
    few, many = (paired_bootstrap([0.42 + each for each in range(n)], range(n), seed=0) for n in (3, 30))
    assert few.low == few.high == pytest.approx(0.42)
    assert (few.p_value, few.is_shown, many.is_shown) == (0.25, False, True)
    same = paired_bootstrap([1.0] * 5, [1.0] * 5, seed=0)
    assert (same.p_value, same.low, same.high) == (1.0, 0.0, 0.0)
    assert in_words(same, name="aligned") == "no spread over 5 prompts, so no interval: aligned differs by 0.0"


def test_a_share_does_not_leave_its_scale() -> None:
    values = [1.0] * 29 + [0.0]
    assert mean_interval(values, seed=0).high > 1
    assert mean_interval(values, seed=0, bounds=(0, 1)).high == 1
    with pytest.raises(ValueError, match="go from 0 to 1, the bounds are"):
        mean_interval(values, seed=0, bounds=(0.5, 1))


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ((0.42, 0.31, 0.53), "aligned is higher by 0.42 (0.31 to 0.53)"),
        ((-0.42, -0.53, -0.31), "aligned is lower by 0.42 (0.31 to 0.53)"),
        ((12.3, 1.4, 23.1), "aligned is higher by 12 (1 to 23)"),
    ],
)
def test_a_difference_is_said_in_words(found: tuple[float, float, float], sentence: str) -> None:
    assert in_words(Difference(*found, n=100, p_value=0.01, standard_error=0.06), name="aligned") == sentence


def test_no_difference_comes_with_what_could_have_been_seen() -> None:
    found = Difference(0.02, -0.10, 0.14, n=100, p_value=0.7, standard_error=0.0607)
    sentence = "no difference shown: 0.02 (-0.10 to 0.14); this run can see differences from 0.17 on"
    assert in_words(found, name="aligned") == sentence


def test_ten_thousand_draws_of_the_largest_suite_fit_in_little_memory() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 3200))
    tracemalloc.start()
    paired_bootstrap(a, b, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1e6 < peak < 100e6


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b: paired_bootstrap(a, b, seed=0),
        lambda a, b: win_rate(a, b, tolerance=0),
        lambda a, b: detectable_difference(a, b),
        lambda a, b: agreement(a, b, [1.0, 0.0, 1.0]),
    ],
    ids=["paired_bootstrap", "win_rate", "detectable_difference", "agreement"],
)
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, math.nan, 2.0], [1.0, 2.0, 3.0], "1 of 3 values of a are not finite, such as nan at place 1"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, math.inf], "1 of 3 values of b are not finite, such as inf at place 2"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], "lengths differ: a has 3, b has 2"),
        ([], [], r"a has the shape \[0\]"),
        ([[1.0, 2.0]], [[1.0, 2.0]], r"a has the shape \[1, 2\]"),
    ],
)
def test_bad_values_are_refused_with_numbers(call: Compare, a: Sequence[Any], b: Sequence[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_bootstrap([1, 2], [0, 0], seed=0, confidence=95), "confidence is 95"),
        (lambda: paired_bootstrap([1, 2], [0, 0], seed=0, num_draws=10), "num_draws is 10"),
        (lambda: paired_bootstrap([1, 2], [0, 0], seed=0, strata=["a"]), "values has 2, strata has 1"),
        (lambda: paired_bootstrap([1, 2], [0, 0], seed=0, macro=True), "give the tag of each prompt"),
        (lambda: detectable_difference([1], [0]), "one prompt says nothing"),
        (lambda: detectable_difference([1, 2], [0, 0], power=1), "power is 1"),
        (lambda: win_rate([1], [0], tolerance=-1), "tolerance is -1"),
        (lambda: win_rate([1], [0], tolerance=math.nan), "tolerance is nan"),
        (lambda: hierarchical_bootstrap(np.ones((1, 9)), np.ones(9), seed=0), r"a is \[1, 9\] and b is \[9\]"),
        (lambda: hierarchical_bootstrap(np.ones((2, 9)), np.ones(8), seed=0), r"a is \[2, 9\] and b is \[8\]"),
        (lambda: hierarchical_bootstrap(np.full((2, 9), np.nan), np.ones(9), seed=0), "18 of 18 values of a"),
        (lambda: agreement([1.0], [0.0], [1.2]), "label_0 goes from 1.2 to 1.2"),
        (lambda: agreement([1.0], [0.0], [1.0, 0.0]), "scores_0 has 1, label_0 has 2"),
        (lambda: agreement([1.0], [0.0], [1.0], prompt_ids=["a", "b"]), "prompt_ids has 2"),
        (lambda: holm([0.1, 1.2, math.nan]), "2 of 3 p values are not in 0..1, such as 1.2"),
        (lambda: per_prompt([1.0], ["a", "b"]), "values has 1, groups has 2"),
        (lambda: per_prompt([], []), r"values has the shape \[0\]"),
    ],
)
def test_bad_settings_are_refused_with_numbers(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
