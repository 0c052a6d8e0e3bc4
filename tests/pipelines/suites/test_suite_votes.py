"""Votes of people in results: win rates over prompts with known intervals, beside scorers and never among them."""

import json
from typing import Any

import pyarrow as pa
import pytest
import scipy.stats

from pipelines.suites.cells import VALUES_SCHEMA
from pipelines.suites.evaluation import EvaluationRecord, warnings_of
from pipelines.suites.reduce import reduce_suite
from pipelines.suites.results import VOTES, Results, SuiteResult, VoteCount
from pipelines.suites.suite import Suite, SuitePrompt
from pipelines.suites.votes import VOTES_SCHEMA, Votes

SUITE = Suite("own", 1, tuple(SuitePrompt.of(f"prompt {number}") for number in range(20)), images_per_prompt=2)
MODELS = ("base", "aligned", "other")


def votes_of(*rows: tuple[str, str, int, int, float], **fields: Any) -> Votes:
    """Votes as (model, voter, number of the prompt, image, value)."""
    found = [(model, voter, SUITE.prompts[number].prompt_id, *rest) for model, voter, number, *rest in rows]
    columns = dict(zip(VOTES_SCHEMA.names, zip(*found, strict=True), strict=True)) if found else {}
    table = pa.table(columns, schema=VOTES_SCHEMA) if found else VOTES_SCHEMA.empty_table()
    return Votes(table, **{"left_out": {}} | fields)


def plain(model: str, wins: int, ties: int, losses: int, voter: str = "ann") -> list[tuple[str, str, int, int, float]]:
    """A vote on the first image of so many prompts."""
    values = [1.0] * wins + [0.5] * ties + [0.0] * losses
    return [(model, voter, number, 0, value) for number, value in enumerate(values)]


def reduced(votes: Votes | None, suite: Suite = SUITE, values: pa.Table | None = None) -> SuiteResult:
    values = VALUES_SCHEMA.empty_table() if values is None else values
    return reduce_suite(values, suite, against="base", models=MODELS, votes=votes, num_draws=200)


def scored() -> tuple[Suite, pa.Table]:
    """The suite with a primary scorer, and its values."""
    rows = [
        (model, "pick", each.prompt_id, index, float(rise * 5 + number % 3 + index), None)
        for rise, model in enumerate(MODELS)
        for number, each in enumerate(SUITE.prompts)
        for index in range(2)
    ]
    columns = dict(zip(VALUES_SCHEMA.names, zip(*rows, strict=True), strict=True))
    return SUITE.with_scorers(["pick"]), pa.table(columns, schema=VALUES_SCHEMA)


def test_a_win_rate_has_wilsons_interval_and_the_sign_tests_p_value() -> None:
    found = reduced(votes_of(*plain("aligned", 13, 0, 3))).against["aligned"][VOTES]
    assert (found.win_rate, found.wins, found.ties, found.losses, found.n) == (13 / 16, 13, 0, 3, 16)
    wilson = scipy.stats.binomtest(13, 16).proportion_ci(method="wilson")
    assert (found.win_low, found.win_high) == pytest.approx((wilson.low, wilson.high), abs=1e-9)
    assert found.win_p_value == pytest.approx(scipy.stats.binomtest(13, 16).pvalue, rel=1e-9)
    assert found.votes == VoteCount(16, 1)
    assert (found.difference, found.low, found.high) == (None, None, None), "votes have no scale"
    assert found.num_left_out == 4
    assert found.words == "people prefer aligned: aligned is better on 13 of 16 prompts, worse on 3"


def test_ties_count_half_and_few_votes_show_no_preference() -> None:
    found = reduced(votes_of(*plain("aligned", 2, 1, 1))).against["aligned"][VOTES]
    assert (found.win_rate, found.ties) == (0.625, 1)
    assert found.words == "no preference shown: aligned is better on 2 of 4 prompts, worse on 1"
    against = reduced(votes_of(*plain("aligned", 0, 0, 8))).against["aligned"][VOTES]
    assert against.words == "people prefer base: aligned is better on 0 of 8 prompts, worse on 8"


def test_a_prompt_counts_once_however_many_images_and_people_there_are() -> None:
    votes = votes_of(
        ("aligned", "ann", 0, 0, 1.0), ("aligned", "bob", 0, 0, 1.0), ("aligned", "cid", 0, 0, 0.0),
        ("aligned", "ann", 0, 1, 0.5),  # a win: the first image has 2/3, the second one half
        ("aligned", "ann", 1, 0, 1.0), ("aligned", "ann", 1, 1, 0.0),  # a tie of two images
        ("aligned", "ann", 2, 0, 1.0), ("aligned", "bob", 2, 0, 1.0), ("aligned", "cid", 2, 0, 0.0),
        ("aligned", "ann", 2, 1, 0.0), ("aligned", "bob", 2, 1, 0.0), ("aligned", "cid", 2, 1, 1.0),  # 2/3 and 1/3
        ("aligned", "bob", 3, 0, 0.0),
    )  # fmt: skip
    found = reduced(votes)
    compared = found.against["aligned"][VOTES]
    assert (compared.wins, compared.ties, compared.losses, compared.n) == (1, 2, 1, 4)
    assert compared.votes == VoteCount(13, 3)
    assert found.votes is not None
    assert (found.votes.num_votes, found.votes.num_voters) == (13, 3)


def test_votes_are_no_score_and_change_none() -> None:
    suite, values = scored()
    without = reduced(None, suite, values).against
    found = reduced(votes_of(*plain("aligned", 9, 0, 1)), suite, values)
    assert found.scorers == ("pick",)
    assert all(VOTES not in model.scores for model in found.models.values())
    assert {model: {name: each for name, each in by.items() if name != VOTES} for model, by in found.against.items()} \
        == without  # fmt: skip
    assert VOTES not in found.against["other"], "nobody voted on it"


def test_votes_rank_only_where_every_model_has_some_and_the_suite_leaves_it_open() -> None:
    suite, values = scored()
    some, every = plain("aligned", 9, 0, 1), [*plain("aligned", 9, 0, 1), *plain("other", 2, 0, 8, voter="bob")]
    assert reduced(votes_of(*some), suite, values).primary == ("pick",)
    found = reduced(votes_of(*every), suite, values)
    assert found.primary == ("pick", VOTES)
    assert found.num_primary_tests == 4
    compared = found.against["aligned"][VOTES]
    p_value = scipy.stats.binomtest(9, 10).pvalue
    assert compared.p_holm == pytest.approx(2 * p_value, rel=1e-9), "the two of pick are smaller, other's is larger"
    assert reduced(votes_of(*every, may_rank=False), suite, values).primary == ("pick",)
    assert reduced(votes_of(*every)).primary == (VOTES,), "of a suite that nothing else judges"


def test_a_reader_is_told_what_does_not_count() -> None:
    left_out = {"on images that are not in the suite now": 3, "on two models of which neither is base": 1}
    result = reduced(votes_of(*plain("aligned", 1, 0, 0), left_out=left_out))
    (said,) = warnings_of(Results({"own": result}), {})
    assert said == (
        "suite own: 4 votes do not count: 3 on images that are not in the suite now, 1 on two models of which neither "
        "is base"
    )
    (said,) = warnings_of(Results({"own": reduced(votes_of())}), {})
    assert said == "suite own: there are no votes on its images; `mapo scores vote` collects them"
    assert not warnings_of(Results({"own": reduced(None)}), {}), "nobody asked for votes"


def test_results_with_votes_are_read_as_they_were_written() -> None:
    record = EvaluationRecord(Results({"own": reduced(votes_of(*plain("aligned", 3, 1, 0)))}))
    data = json.loads(json.dumps(record.to_json(), allow_nan=False))
    found = data["results"]["suites"]["own"]["against"]["aligned"][VOTES]
    assert {name: found[name] for name in ("win_rate", "ties", "n", "votes")} == {
        "win_rate": 0.875, "ties": 1, "n": 4, "votes": {"num_votes": 4, "num_voters": 1},
    }  # fmt: skip
    assert EvaluationRecord.from_json(data) == record
    del data["results"]["suites"]["own"]["votes"]  # of before there were votes
    assert EvaluationRecord.from_json(data).results.suites["own"].votes is None
