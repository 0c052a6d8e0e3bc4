"""Reduction of scores: numbers as numpy and scipy give them, pairing by prompt, failures counted, JSON as agreed."""

import json
import math
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from pipelines.suites.audit import AUDIT_SCHEMA, audit, circular_judges
from pipelines.suites.cells import VALUES_SCHEMA
from pipelines.suites.evaluation import EvaluationCost, EvaluationRecord, warnings_of
from pipelines.suites.gallery import GalleryEntry, GalleryImage
from pipelines.suites.reduce import NO_PAIRS, reduce_suite, with_holm
from pipelines.suites.results import Comparison, Judge, Results, SuiteResult
from pipelines.suites.statistics import by_tag, holm, mean_interval, paired_bootstrap, win_rate
from pipelines.suites.suite import Suite, SuitePrompt

NUM_DRAWS = 2000


def suite_of(num_prompts: int = 30, images: int = 2, **fields: Any) -> Suite:
    prompts = tuple(SuitePrompt.of(f"prompt {number}", "abc"[number % 3]) for number in range(num_prompts))
    given = {"name": "own", "version": 1, "prompts": prompts, "images_per_prompt": images} | fields
    return Suite(**{"scorers": ("pick", "dark"), "primary": ("pick",)} | given)


def rows_of(suite: Suite, model: str, scorer: str, values: Any, **columns: Any) -> pa.Table:
    """A row for each image; `values` is [prompt, image], NaN for a failure."""
    flat = [None if math.isnan(each) else float(each) for each in np.ravel(values)]
    places = [(each.prompt_id, index) for each in suite.prompts for index in range(suite.images_per_prompt)]
    reasons = [None if each is not None else "non_finite" for each in flat]
    found = {"model": model, "scorer": scorer, "prompt_id": [a for a, _ in places], "index": [b for _, b in places]}
    found |= {"value": flat, "reason": reasons} | columns
    filled = {name: [each] * len(flat) if isinstance(each, str) else each for name, each in found.items()}
    schema = VALUES_SCHEMA
    for name in columns:
        if name not in schema.names:
            schema = schema.append(pa.field(name, pa.string()))
    return pa.table(filled, schema=schema)


@pytest.fixture
def suite() -> Suite:
    return suite_of()


@pytest.fixture
def drawn(suite: Suite) -> dict[tuple[str, str], Any]:
    rng = np.random.default_rng(3)
    base = rng.normal(21, 1.3, (30, 2))
    return {
        ("base", "pick"): base,
        ("aligned", "pick"): base + rng.normal(0.4, 0.6, (30, 2)),
        ("other", "pick"): base + rng.normal(0.0, 0.6, (30, 2)),
        ("base", "dark"): rng.uniform(0, 1, (30, 2)),
        ("aligned", "dark"): rng.uniform(0, 0.5, (30, 2)),
        ("other", "dark"): rng.uniform(0, 1, (30, 2)),
    }


JUDGES = {"pick": Judge("100 cos", licence="MIT", verified=False), "dark": Judge("share", higher_is_better=False)}


def table(suite: Suite, drawn: dict[tuple[str, str], Any]) -> pa.Table:
    return pa.concat_tables([rows_of(suite, model, scorer, each) for (model, scorer), each in drawn.items()])


def reduced(suite: Suite, values: pa.Table, **options: Any) -> SuiteResult:
    return reduce_suite(values, suite, **{"against": "base", "judges": JUDGES, "num_draws": NUM_DRAWS} | options)


def means(values: Any) -> Any:
    """Mean of each prompt, in the order of the statistics: by prompt_id."""
    order = np.argsort([each.prompt_id for each in suite_of().prompts])
    return np.nanmean(values, axis=1)[order]


def categories() -> list[str]:
    return [each.tags[0] for each in sorted(suite_of().prompts, key=lambda each: each.prompt_id)]


def test_a_prompt_counts_once_with_the_mean_of_its_images(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    found = reduced(suite, table(suite, drawn)).models["base"].scores["pick"]
    values = means(drawn["base", "pick"])
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert found.median == pytest.approx(np.median(values), abs=1e-12)
    assert (found.n, found.num_images, found.num_failed) == (30, 60, 0)
    expected = mean_interval(values, seed=0, num_draws=NUM_DRAWS, strata=categories())
    assert (found.low, found.high) == (expected.low, expected.high)
    assert found.low < found.mean < found.high


def test_differences_are_paired_by_prompt(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    found = reduced(suite, table(suite, drawn)).against["aligned"]["pick"]
    a, b = means(drawn["aligned", "pick"]), means(drawn["base", "pick"])
    assert found.difference == pytest.approx(np.mean(a - b), abs=1e-12)
    expected = paired_bootstrap(a, b, seed=0, num_draws=NUM_DRAWS, strata=categories())
    assert (found.low, found.high, found.p_value) == (expected.low, expected.high, expected.p_value)
    t = scipy.stats.ttest_rel(a, b).confidence_interval()
    assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=0.1 * (t.high - t.low))
    assert found.words.startswith("aligned is higher by ")


def test_a_win_is_better_whichever_way_the_score_goes(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    found = reduced(suite, table(suite, drawn)).against["aligned"]["dark"]
    a, b = means(drawn["aligned", "dark"]), means(drawn["base", "dark"])
    assert found.difference == pytest.approx(np.mean(a - b), abs=1e-12)
    assert found.difference < 0
    wins = int(np.sum(b - a > found.tolerance))
    assert (found.wins, found.ties, found.losses) == (wins, 0, 30 - wins)
    interval = scipy.stats.binomtest(wins, 30).proportion_ci(method="wilson")
    assert (found.win_rate, found.win_low, found.win_high) == pytest.approx((wins / 30, interval.low, interval.high))
    assert found.win_p_value == pytest.approx(scipy.stats.binomtest(wins, 30).pvalue)
    assert found.words.endswith("lower is better")


def test_ties_are_a_thousandth_of_the_spread_and_exact_for_yes_and_no() -> None:
    suite = suite_of(images=1, primary=())
    base = np.linspace(20, 24, 30)[:, None]
    near = base + np.where(np.arange(30) % 3 == 0, 1.1e-3, 0.9e-3)[:, None] * np.std(base)
    yes = (np.arange(30) % 2 == 0).astype(float)[:, None]
    drawn = {("base", "pick"): base, ("near", "pick"): near, ("base", "dark"): yes, ("near", "dark"): 1 - yes}
    found = reduced(suite, table(suite, drawn), judges={}).against["near"]
    assert (found["pick"].ties, found["pick"].wins) == (20, 10)
    assert found["pick"].tolerance == pytest.approx(1e-3 * np.std(base))
    assert (found["dark"].tolerance, found["dark"].ties, found["dark"].win_rate) == (0.0, 0, 0.5)
    assert found["pick"].win_rate == win_rate(near[:, 0], base[:, 0], tolerance=found["pick"].tolerance).rate


def test_failures_are_counted_with_reasons_and_are_never_numbers(
    suite: Suite, drawn: dict[tuple[str, str], Any]
) -> None:
    drawn["base", "pick"][0] = math.nan  # both images of a prompt
    drawn["base", "pick"][1, 0] = math.nan
    drawn["aligned", "pick"][2] = math.nan
    values = table(suite, drawn)
    broken = rows_of(suite, "aligned", "dark", drawn["aligned", "dark"])
    kept = values.filter(pa.compute.field("scorer") == "pick")
    infinite = pa.compute.if_else(pa.array(np.arange(60) < 3), pa.scalar(math.inf), broken["value"])
    half = broken.set_column(4, "value", infinite).slice(0, 50)
    values = pa.concat_tables([kept, rows_of(suite, "base", "dark", drawn["base", "dark"]), half])
    found = reduced(suite, values, models=["base", "aligned"])
    assert found.failures == {
        "base": {"pick": {"non_finite": 3}},
        "aligned": {"pick": {"non_finite": 2}, "dark": {"missing": 10, "not_finite": 3}},
    }
    base = found.models["base"].scores["pick"]
    assert (base.n, base.num_images, base.num_failed) == (29, 57, 3)
    compared = found.against["aligned"]["pick"]
    assert (compared.n, compared.num_left_out) == (28, 2)
    gains = drawn["aligned", "pick"] - drawn["base", "pick"]  # of the images that both have
    left = np.nanmean(gains[[1, *range(3, 30)]], 1)
    assert compared.difference == pytest.approx(np.mean(left), abs=1e-12)
    said = warnings_of(Results({"own": found}), JUDGES)
    assert (
        "suite own: of the 60 images of aligned there is no score by pick of 2 (non_finite 2), dark of 13 (missing 10,"
        " not_finite 3)" in said
    )


def test_models_are_compared_on_the_images_that_both_have() -> None:
    """An image that failed must not set its twin, of the same noise, against the mean of other images."""
    suite = suite_of(8)
    base = np.random.default_rng(0).normal(0, 1, (8, 2)) + np.array([0, 10])
    aligned = base.copy()
    aligned[:, 1] = math.nan
    aligned[0, 0] = math.nan
    tables = [rows_of(suite, "base", "pick", base), rows_of(suite, "aligned", "pick", aligned)]
    found = reduce_suite(pa.concat_tables(tables), suite, against="base", num_draws=NUM_DRAWS).against["aligned"][
        "pick"
    ]
    assert (found.difference, found.n, found.num_left_out, found.ties) == (0.0, 7, 1, 7)


def test_equal_models_are_said_to_be_equal(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    same = drawn | {("aligned", scorer): drawn["base", scorer] for scorer in ("pick", "dark")}
    found = reduced(suite, table(suite, same)).against["aligned"]
    for each in found.values():
        assert (each.difference, each.ties, each.win_rate, each.p_value) == (0.0, 30, 0.5, 1.0)
        assert each.words == "equal on all 30 prompts"


def test_a_scorer_that_failed_everywhere_has_no_number(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    drawn["aligned", "pick"][:] = math.nan
    found = reduced(suite, table(suite, drawn))
    assert (found.models["aligned"].scores["pick"].mean, found.models["aligned"].scores["pick"].n) == (None, 0)
    compared = found.against["aligned"]["pick"]
    assert (compared.difference, compared.n, compared.words, compared.p_holm) == (None, 0, NO_PAIRS, None)
    assert found.num_primary_tests == 1
    text = json.dumps(Results({"own": found}).to_json(), allow_nan=False)
    assert json.loads(text)["suites"]["own"]["models"]["aligned"]["pick"]["mean"] is None


def test_holm_is_over_the_primary_scorers_of_all_models(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    found = reduced(suite, table(suite, drawn))
    p_values = [found.against[model]["pick"].p_value for model in ("aligned", "other")]
    assert [found.against[model]["pick"].p_holm for model in ("aligned", "other")] == holm(p_values)
    assert found.against["aligned"]["dark"].p_holm is None
    assert (found.num_primary_tests, found.primary) == (2, ("pick",))
    assert found.against["aligned"]["pick"].is_shown
    assert not found.against["other"]["pick"].is_shown
    assert found.against["other"]["pick"].words.startswith("no difference shown: ")


def test_a_difference_that_holm_takes_back_says_so_and_checkpoints_do_not_count() -> None:
    def weak(p_value: float) -> Comparison:
        return Comparison(1.0, 0.1, 1.9, 0.6, 0.5, 0.7, ties=0, n=9, p_value=p_value, words="a is higher by 1.0")

    compared = {"a": {"x": weak(0.03), "y": weak(0.2)}, "step-20": {"x": weak(0.04), "y": weak(0.04)}}
    found, count = with_holm(compared, ["x", "y"])
    assert count == 2
    assert (found["a"]["x"].p_holm, found["a"]["x"].is_shown) == (0.06, False)
    assert found["a"]["x"].words == (
        "not enough for a claim after Holm's correction over 2 comparisons: a is higher by 1.0"
    )
    assert (found["a"]["y"].p_holm, found["a"]["y"].words) == (0.2, "a is higher by 1.0")
    assert found["step-20"] == compared["step-20"]
    assert with_holm(compared, ["x"])[0]["a"]["x"].is_shown


def test_tags_have_means_and_differences_of_their_own(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    found = reduced(suite, table(suite, drawn))
    by_hand = by_tag(means(drawn["aligned", "pick"]), categories()).tags
    tags = found.models["aligned"].tags
    assert {tag: each["pick"].mean for tag, each in tags.items()} == pytest.approx(by_hand)
    assert (found.tags, tags["a"]["pick"].n) == ({"a": 10, "b": 10, "c": 10}, 10)
    gains = by_tag(means(drawn["aligned", "pick"]) - means(drawn["base", "pick"]), categories()).tags
    shown = found.against["aligned"]["pick"].tags
    assert {tag: each.difference for tag, each in shown.items()} == pytest.approx(gains)


def test_a_macro_suite_takes_the_mean_of_its_categories() -> None:
    prompts = tuple(SuitePrompt.of(f"p{number}", "ab"[number >= 8]) for number in range(12))
    suite = suite_of(images=1, prompts=prompts, macro=True)
    values = np.array([0.0] * 8 + [1.0, 1.0, 0.0, 1.0])[:, None]
    drawn = {("base", "pick"): values, ("aligned", "pick"): 1 - values}
    found = reduced(suite, table(suite, drawn))
    assert found.models["base"].scores["pick"].mean == pytest.approx((0 + 0.75) / 2)
    assert found.against["aligned"]["pick"].difference == pytest.approx((1 - 0.5) / 2)


def test_the_order_of_rows_changes_no_number(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    values = table(suite, drawn)
    shuffled = values.take(np.random.default_rng(0).permutation(values.num_rows))
    models = ["base", "aligned", "other"]
    assert reduced(suite, values, models=models) == reduced(suite, shuffled, models=models)


def test_another_model_changes_no_number_of_the_first(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    values = table(suite, drawn)
    alone = reduced(suite, values, models=["base", "aligned"])
    both = reduced(suite, values)
    assert both.models["aligned"] == alone.models["aligned"]
    assert both.against["aligned"]["dark"] == alone.against["aligned"]["dark"]


def test_results_have_the_agreed_shape_and_come_back_from_json(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    results = Results({"own": reduced(suite.limited(20, seed=1).changed(images_per_prompt=2), limited(suite, drawn))})
    plain = json.loads(json.dumps(results.to_json(), allow_nan=False))
    own = plain["suites"]["own"]
    assert own["protocol"] == "own@1; 20 of 30 prompts"
    assert (own["num_prompts"], own["images_per_prompt"]) == (20, 2)
    assert set(own["models"]["base"]["pick"]) >= {"mean", "median", "low", "high", "n"}
    assert set(own["models"]["base"]["tags"]) == {"a", "b", "c"}
    assert set(own["against"]["aligned"]["pick"]) >= {
        "difference", "low", "high", "win_rate", "win_low", "win_high", "ties",
    }  # fmt: skip
    assert own["against_model"] == "base"
    assert Results.from_json(plain) == results


def limited(suite: Suite, drawn: dict[tuple[str, str], Any]) -> pa.Table:
    chosen = pa.array([each.prompt_id for each in suite.limited(20, seed=1).prompts])
    return table(suite, drawn).filter(pa.compute.field("prompt_id").isin(chosen))


def test_fields_of_a_later_version_are_ignored_and_missing_ones_named(
    suite: Suite, drawn: dict[tuple[str, str], Any]
) -> None:
    results = Results({"own": reduced(suite, table(suite, drawn))})
    plain = results.to_json() | {"new": 1}
    own = plain["suites"]["own"]
    own["new"] = own["models"]["base"]["pick"]["new"] = own["against"]["aligned"]["pick"]["new"] = {"x": [1]}
    assert Results.from_json(plain) == results
    del own["against"]["aligned"]["pick"]["ties"]
    with pytest.raises(ValueError, match=r"Results.suites.own.against.aligned.pick: the field ties is missing"):
        Results.from_json(plain)
    with pytest.raises(ValueError, match="the field suites is missing"):
        Results.from_json({})


def test_prompts_that_a_scorer_cuts_are_counted(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    cut = [json.dumps({"cut_token_ratio": 0.5 if place < 6 else 0.0, "logit": 1.0}) for place in range(60)]
    values = pa.concat_tables(
        [rows_of(suite, model, "pick", drawn[model, "pick"], components=cut) for model in ("base", "aligned")]
    )
    found = reduced(suite, values)
    assert (found.cut["pick"].prompt_ratio, found.cut["pick"].token_ratio) == pytest.approx((0.1, 0.05))
    (said,) = (each for each in warnings_of(Results({"own": found}), {}) if "in part" in each)
    assert (
        said == "suite own: pick reads 10.0% of the prompts only in part (on average 5.0% of a prompt's tokens are cut)"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.drop(["reason"]), "column reason is missing"),
        (lambda rows: pa.concat_tables([rows, rows.slice(0, 2)]), "2 of 362 rows repeat an image"),
        (lambda rows: rows.set_column(2, "prompt_id", pa.array(["x"] * 360)), "360 of 360 rows are of prompts"),
        (
            lambda rows: rows.set_column(3, "index", pa.array([0, 2] * 180, pa.int32())),
            "180 of 360 rows are not of the 2",
        ),
        (lambda rows: rows.slice(0, 60).set_column(1, "scorer", pa.array(["tags"] * 60)), "a scorer is called tags"),
        (lambda rows: rows.filter(pa.compute.field("model") != "base"), "base is not one of the models aligned, other"),
    ],
)
def test_values_that_make_no_sense_are_refused(
    change: Any, said: str, suite: Suite, drawn: dict[tuple[str, str], Any]
) -> None:
    values = table(suite, drawn)
    with pytest.raises(ValueError, match=said):
        reduced(suite, change(values))


def test_rows_of_other_suites_are_left_out(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    own = table(suite, drawn)
    both = pa.concat_tables(
        [own.append_column("suite", pa.array([name] * own.num_rows)) for name in ("own", "another")]
    )
    assert reduced(suite, both) == reduced(suite, own)


@hypothesis.settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_image_is_a_score_or_a_failure_and_every_prompt_compared_or_left_out(data: st.DataObject) -> None:
    suite = suite_of(num_prompts=6, images=2)
    number = st.sampled_from([0.0, 1.0, -1.5, 1e6, math.nan, math.inf, None])
    rows = [
        (model, scorer, prompt.prompt_id, index, data.draw(number), data.draw(st.sampled_from(["odd", None])))
        for model in ("base", "a") for scorer in ("pick", "dark") for prompt in suite.prompts for index in (0, 1)
        if data.draw(st.integers(0, 9))
    ]  # fmt: skip
    values = pa.table(
        {name: [row[place] for row in rows] for place, name in enumerate(VALUES_SCHEMA.names)}, schema=VALUES_SCHEMA
    )
    found = reduced(suite, values, models=["base", "a"], num_draws=100)
    for model, result in found.models.items():
        for scorer, score in result.scores.items():
            assert score.num_images + score.num_failed == 12
            assert sum(found.failures.get(model, {}).get(scorer, {}).values()) == score.num_failed
            assert (score.mean is None) == (score.n == 0) == (score.num_images == 0)
    for compared in found.against["a"].values():
        assert compared.n + compared.num_left_out == 6
        assert compared.wins + compared.ties + compared.losses == compared.n
        assert (compared.difference is None) == (compared.n == 0)
    plain = json.loads(json.dumps(Results({"own": found}).to_json(), allow_nan=False))
    assert Results.from_json(plain) == Results({"own": found})


def test_models_that_are_alike_are_rarely_claimed_to_differ() -> None:
    """Of 1,500 such suites with 10,000 draws each, 5.6 % had a claim (5 +- 0.6 are due), and 6.7 % with 400 draws."""
    prompts = tuple(SuitePrompt.of(f"prompt {number}") for number in range(24))
    suite = suite_of(images=1, prompts=prompts, primary=("pick", "dark"))
    rng, claims, differences = np.random.default_rng(11), 0, 0
    for _ in range(300):
        easy = rng.normal(0, 1, (24, 1))
        drawn = {
            (model, scorer): easy + rng.normal(0, 0.5, (24, 1))
            for model in ("base", "a", "b") for scorer in ("pick", "dark")
        }  # fmt: skip
        found = reduced(suite, table(suite, drawn), judges={}, num_draws=400)
        four = [each for by_scorer in found.against.values() for each in by_scorer.values()]
        claims += any(each.is_shown for each in four)
        differences += any(each.p_value is not None and each.p_value < 0.05 for each in four)
    assert claims <= 30 < differences


def audit_rows(scorer: str, first: Any, second: Any, labels: Any, prompts: Any = None) -> pa.Table:
    n = len(labels)
    columns = {
        "pair_key": [f"k{number}" for number in range(n)], "scorer": [scorer] * n, "value_0": first, "value_1": second,
        "label_0": labels, "prompt_id": [f"p{number}" for number in range(n)] if prompts is None else prompts,
    }  # fmt: skip
    return pa.table({name: columns[name] for name in AUDIT_SCHEMA.names}, schema=AUDIT_SCHEMA)


def test_a_judge_is_audited_on_pairs_that_have_both_scores() -> None:
    labels = [1.0, 0.0, 1.0, 0.0, 0.5, 1.0, 1.0]
    rows = audit_rows("pick", [2.0, 1, 1, 3, 5, None, 4], [1.0, 2, 2, 3, 4, 1, math.nan], labels)
    found = audit(rows)["pick"]
    assert (found.n, found.num_left_out, found.num_prompts, found.ceiling) == (5, 2, 5, 1.0)
    assert found.rate == pytest.approx((1 + 1 + 0 + 0.5 + 0.5) / 5)
    interval = scipy.stats.binomtest(3, 5).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_a_judge_for_which_lower_is_better_is_audited_the_other_way_round() -> None:
    rows = audit_rows("dark", [0.1, 0.2, 0.9], [0.5, 0.6, 0.3], [1.0, 1.0, 0.0])
    assert audit(rows, judges=JUDGES)["dark"].rate == 1.0
    assert audit(rows)["dark"].rate == 0.0


def test_an_audit_without_scores_has_no_rate_and_repeated_pairs_are_refused() -> None:
    rows = audit_rows("pick", [None, None], [1.0, 2.0], [1.0, 0.0])
    assert (audit(rows)["pick"].rate, audit(rows)["pick"].num_left_out) == (None, 2)
    with pytest.raises(ValueError, match="2 of 4 rows of pick repeat a pair"):
        audit(pa.concat_tables([rows, rows]))
    assert audit(rows.slice(0, 0)) == {}


def test_judges_that_made_the_pairs_are_found_and_warned_of(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    assert circular_judges(["pick", "dark", "pick"], {"pick@0123", "hps"}) == ("pick",)
    results = Results({"own": reduced(suite, table(suite, drawn))})
    said = warnings_of(results, JUDGES, made_by=["pick"])
    assert said[0].startswith("pick helped to make the training pairs")
    assert said[-1] == "not verified against a published value: pick"
    assert warnings_of(results, {}) == ()
    licences = ("MIT", "CC BY-NC 4.0", "AGPL-3.0", "Apache-2.0", "OpenRAIL, research only", "none needed: no weights")
    said = [warnings_of(results, {"pick": Judge(licence=each)}) for each in licences]
    assert [len(each) for each in said] == [0, 1, 1, 0, 1, 0]
    assert said[1] == ("licence of pick: CC BY-NC 4.0",)


def test_the_record_of_an_evaluation_comes_back_from_json(suite: Suite, drawn: dict[tuple[str, str], Any]) -> None:
    image = GalleryImage("own-base-0-0.png", {"pick": 1.0, "dark": None})
    record = EvaluationRecord(
        results=Results({"own": reduced(suite, table(suite, drawn))}),
        gallery=(GalleryEntry("own", "0", "a cat", 0, ("specimen",), {"base": image}),),
        audit=audit(audit_rows("pick", [1.0], [2.0], [1.0])),
        judges=JUDGES,
        warnings=("mind",),
        cost=EvaluationCost(images=180, gpu_hours=None, seconds=12.5),
    )
    plain = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert set(plain) == {"version", "results", "gallery", "audit", "judges", "warnings", "cost"}
    assert EvaluationRecord.from_json(plain | {"new": 1}) == record
    with pytest.raises(ValueError, match="version None, not 2"):
        EvaluationRecord.from_json({"scores": [], "samples": []})
