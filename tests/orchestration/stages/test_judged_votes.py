"""Votes in an evaluation: counted by the bytes of the images, read anew when there are more, and nothing is drawn."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from noise_samples import put_samples
from report_sample import Page, sample_data
from safetensors.numpy import load_file, save_file

import orchestration
from orchestration.config import RunConfig, parse_config
from orchestration.report.evaluation import evaluation_section
from orchestration.report.leaderboard import leaderboard_of
from orchestration.report.page import render_leaderboard, render_report
from orchestration.run.context import Run
from orchestration.stages.evaluate import evaluation_of
from orchestration.stages.judged_votes import votes_of
from orchestration.stages.registry import STAGES
from orchestration.votes.ballots import Contest
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.layout import SAMPLES_SCHEMA, SCORES
from pipelines.dataset.storage import Storage
from pipelines.samples.execution import read_samples
from pipelines.scores.foreign import read_foreign
from pipelines.scores.imported import foreign_judge
from pipelines.scores.imports import import_scores
from pipelines.scores.scorers import new_scorer
from pipelines.scores.vote_tables import GONE, count_votes, vote_tables
from pipelines.scores.votes import BETTER, TIE, WORSE, Session, Vote, commit_votes, result_of
from pipelines.suites.evaluation import EvaluationRecord
from pipelines.suites.results import VOTES, SuiteVotes
from pipelines.suites.suite import Suite, SuitePrompt, numbered
from pipelines.suites.votes import with_votes

PROMPTS = [f"a house on hill {number}" for number in range(6)]
MODELS = ("base", "aligned-1", "aligned-2")
BASE = Path(orchestration.__file__).parent / "demo" / "base_model"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two UNets for the base: the demo's, each with another first weight, so that its samples are its own."""
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(MODELS[1:], 1):
        unet = folder / name / "unet"
        unet.mkdir(parents=True)
        shutil.copy(BASE / "unet" / "config.json", unet)
        found = load_file(BASE / "unet" / WEIGHTS)
        save_file(found | {min(found): found[min(found)] + number}, unet / WEIGHTS)
    return folder


@pytest.fixture
def config(weights: Path, tmp_path: Path) -> RunConfig:
    """A run whose samples are there: two images of six prompts by three models."""
    config = configured(weights, tmp_path, scorers=["votes"])
    run = Run.open(config, lambda line: None)
    evaluation = evaluation_of(run, None, None)
    for number, cell in enumerate(evaluation.cells):
        put_samples(run.storage, cell, number)
    return config


def configured(weights: Path, folder: Path, **evaluate: Any) -> RunConfig:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    others = [{"name": name, "model": str(weights / name), "unet": True} for name in MODELS[1:]]
    settings = {"prompts": str(folder / "prompts.txt"), "images_per_prompt": 2, "models": ["base", *others]}
    return parse_config(yaml.safe_dump({
        "name": "small", "storage": str(folder / "storage"),
        "encode": {"model": str(BASE), "resolution": 64, "device": "cpu"},
        "evaluate": settings | evaluate,
    }))  # fmt: skip


def vote(config: RunConfig, models: tuple[str, str], values: Sequence[float | None], session: str = "5e" * 16) -> Any:
    """Commit a person's votes on the first pairs of two models, as the command does; give their outcome."""
    run = Run.open(config, lambda line: None)
    contest = Contest(run, models, None)
    wanted = Session(session, contest.suite, models, contest.samples, config.seed)
    ballots = {each.key: each for each in contest.pairing().ballots}
    assert len(ballots) == 12
    votes = [Vote(key, value, 0, "2026-12-01T10:00:00Z") for key, value in zip(ballots, values, strict=False)]
    commit_votes(run.storage, wanted, ballots, votes)
    return result_of(votes, ballots)


def evaluated(config: RunConfig) -> tuple[EvaluationRecord, list[str]]:
    """Bring the stage up to date without a cluster: whatever would draw or score an image fails."""
    said: list[str] = []
    run = Run.open(config, said.append)
    look = STAGES["evaluate"].look(run)
    assert look.key is not None
    assert look.work is not None
    outcome = look.work()
    run.journal.finish("evaluate", key=look.key, summary=outcome.summary, seconds=1, details=outcome.details)
    return EvaluationRecord.from_json(outcome.details), said


def is_done(config: RunConfig) -> bool:
    return STAGES["evaluate"].look(Run.open(config, lambda line: None)).is_done


def suite_of(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Storage(config.storage).read("runs/small/evaluation/results.json"))
    return dict(found["suites"]["prompts"])


def test_votes_are_the_win_rate_that_the_page_of_votes_told(config: RunConfig) -> None:
    values = [BETTER, BETTER, BETTER, WORSE, TIE, TIE, WORSE, WORSE, BETTER, None, BETTER, TIE]
    told = vote(config, ("aligned-1", "base"), values)
    _, said = evaluated(config)
    assert said[-1] == "votes     11 of 1 session on prompts@1"
    found = suite_of(config)["against"]["aligned-1"][VOTES]
    assert (found["win_rate"], found["win_low"], found["win_high"]) == (told.rate, told.low, told.high)
    assert (found["n"], found["ties"], found["wins"], found["losses"]) == (6, 2, 3, 1)
    assert found["votes"] == {"num_votes": 11, "num_voters": 1}
    assert suite_of(config)["models"]["aligned-1"] == {"tags": {}}, "votes are no score of a model"


def test_it_does_not_matter_in_which_order_the_models_were_named(config: RunConfig) -> None:
    vote(config, ("base", "aligned-1"), [BETTER, BETTER, WORSE, WORSE, BETTER, BETTER])
    evaluated(config)
    found = suite_of(config)["against"]["aligned-1"][VOTES]
    assert (found["wins"], found["losses"], found["n"]) == (1, 2, 3), "better for base is worse for the model"


def test_new_votes_are_reduced_and_nothing_is_drawn_or_scored(config: RunConfig) -> None:
    vote(config, ("aligned-1", "base"), [BETTER] * 4)
    evaluated(config)
    assert is_done(config)
    vote(config, ("aligned-1", "base"), [BETTER] * 4 + [WORSE] * 2)
    assert not is_done(config)
    files = sorted(Storage(config.storage).names("dataset"))
    record, _ = evaluated(config)
    assert sorted(Storage(config.storage).names("dataset")) == files
    assert record.cost is not None
    assert record.cost.images == 0
    assert suite_of(config)["against"]["aligned-1"][VOTES]["votes"]["num_votes"] == 6
    vote(config, ("aligned-1", "base"), [WORSE] * 12, session="b0" * 16)
    assert not is_done(config), "another person has voted"
    evaluated(config)
    found = suite_of(config)["against"]["aligned-1"][VOTES]
    assert found["votes"] == {"num_votes": 18, "num_voters": 2}
    assert (found["wins"], found["ties"], found["losses"]) == (0, 2, 4)
    assert is_done(config)


def test_a_run_that_asks_for_no_votes_is_up_to_date_whatever_people_say(
    config: RunConfig, weights: Path, tmp_path: Path
) -> None:
    other = configured(weights, tmp_path)
    evaluated(other)
    vote(config, ("aligned-1", "base"), [BETTER])
    assert is_done(other)
    assert suite_of(other)["votes"] is None


def test_votes_that_do_not_count_are_told(config: RunConfig, weights: Path, tmp_path: Path) -> None:
    vote(config, ("aligned-1", "base"), [BETTER] * 12)
    vote(config, ("aligned-2", "aligned-1"), [BETTER] * 5, session="b0" * 16)
    record, said = evaluated(config)
    assert said[-2:] == [
        "votes     12 of 1 session on prompts@1", "votes     5 do not count: on two models of which neither is base",
    ]  # fmt: skip
    assert VOTES not in suite_of(config)["against"]["aligned-2"]
    (warning,) = record.warnings
    assert "5 votes do not count" in warning

    fewer = configured(weights, tmp_path, scorers=["votes"], limit_prompts=2)
    assert not is_done(fewer)
    record, said = evaluated(fewer)
    found = suite_of(fewer)
    assert found["against"]["aligned-1"][VOTES]["votes"]["num_votes"] == 4, "of two prompts"
    left_out = found["votes"]["left_out"]
    assert left_out[GONE] + left_out.get("on two models of which neither is base", 0) == 8 + 5
    assert left_out[GONE] >= 8
    assert any(GONE in line for line in said)
    assert any(GONE in each for each in record.warnings)


def test_votes_on_another_suite_are_not_looked_at(config: RunConfig) -> None:
    vote(config, ("aligned-1", "base"), [BETTER] * 3)
    storage = Storage(config.storage)
    (own,) = vote_tables(storage, {"prompts"})
    run = Run.open(config, lambda line: None)
    ballots = {each.key: each for each in Contest(run, ("aligned-1", "base"), None).pairing().ballots}
    elsewhere = replace(own.session, id="b0" * 16, suite="starter@1")
    commit_votes(storage, elsewhere, ballots, [Vote(key, BETTER, 0, "") for key in ballots])
    assert [each.session for each in vote_tables(storage, {"prompts"})] == [own.session]
    assert {each.suite for each in vote_tables(storage, {"prompts", "starter"})} == {"prompts", "starter"}
    evaluated(config)
    assert suite_of(config)["votes"] == {"num_votes": 3, "num_voters": 1, "left_out": {}}


def test_a_vote_on_two_images_counts_for_every_model_that_has_them(config: RunConfig) -> None:
    run = Run.open(config, lambda line: None)
    vote(config, ("aligned-1", "base"), [BETTER] * 12)
    cells = evaluation_of(run, None, None).cells
    samples = {cell.model.name: read_samples(run.storage, cell.drawing) for cell in cells}
    images = samples["aligned-1"].to_pylist()
    own = samples["aligned-2"].to_pylist()
    samples["aligned-2"] = pa.Table.from_pylist([*images[:2], *own[2:]], schema=SAMPLES_SCHEMA)
    found = count_votes(vote_tables(run.storage, {"prompts"}), samples, against="base")
    assert Counter(found.rows["model"].to_pylist()) == {"aligned-1": 12, "aligned-2": 2}
    assert found.summary() == SuiteVotes(12, 1, {}), "and once in all"


def test_votes_on_a_prompt_that_a_suite_has_twice_are_of_its_rows(config: RunConfig) -> None:
    run = Run.open(config, lambda line: None)
    vote(config, ("aligned-1", "base"), [BETTER, WORSE] * 6)
    samples = {
        each.model.name: read_samples(run.storage, each.drawing) for each in evaluation_of(run, None, None).cells
    }
    twice = Suite("prompts", 1, numbered(SuitePrompt.of(each) for each in PROMPTS for _ in range(2)))
    votes = votes_of(run.storage, twice, samples, "base", run.say)
    assert set(votes.rows["prompt_id"].to_pylist()) == {each.prompt_id for each in twice.prompts}
    assert set(votes.rows["index"].to_pylist()) == {0}
    found = with_votes({"aligned-1": {}}, votes, twice, "base")["aligned-1"][VOTES]
    assert (found.n, found.wins, found.losses, found.num_left_out) == (12, 6, 6, 0)


def test_votes_beside_a_scorer_rank_once_every_model_has_some(config: RunConfig, weights: Path, tmp_path: Path) -> None:
    storage, run = Storage(config.storage), Run.open(config, lambda line: None)
    taste = [
        {"image_sha256": row["sha256"], "prompt_id": row["prompt_id"], "value": float(number % 5)}
        for cell in evaluation_of(run, None, None).cells
        for number, row in enumerate(read_samples(storage, cell.drawing).to_pylist())
    ]
    (tmp_path / "taste.jsonl").write_text("\n".join(map(json.dumps, taste)) + "\n")
    import_scores(read_foreign(tmp_path / "taste.jsonl"), storage, foreign_judge("taste", "mine"))
    both = configured(weights, tmp_path, scorers=["imported:taste", "votes"])
    vote(both, ("aligned-1", "base"), [BETTER] * 12)
    record, _ = evaluated(both)
    assert record.results.suites["prompts"].primary == ("taste",)
    text = pages(record)
    assert "No rank rests on votes." in text[0]
    assert "aligned-1 100.0 % 61.0 % to 100.0 % 6 of 6 12 1 better: people prefer aligned-1" in text[0]
    assert "aligned-2 \u2013 \u2013 0 0 no votes" in text[1]
    assert ranked(record) == {"base": 0.5, "aligned-1": 0.5, "aligned-2": 0.5}, "all have the same taste"

    vote(both, ("aligned-2", "base"), [WORSE] * 12, session="b0" * 16)
    record, _ = evaluated(both)
    assert record.results.suites["prompts"].primary == ("taste", VOTES)
    assert ranked(record) == {"aligned-1": 0.75, "base": 0.5, "aligned-2": 0.25}
    text = pages(record)
    assert all("The ranks rest on votes, too." in each for each in text)
    assert "Which of two images do people prefer? Blind votes." in text[1]


def ranked(record: EvaluationRecord) -> dict[str, float]:
    """The mean win rates on the leaderboard."""
    board = leaderboard_of(evaluation_section(record.to_json(), has_samples=False))
    assert board is not None
    return {each.model: each.overall.rate for each in board.standings if each.overall is not None}


def pages(record: EvaluationRecord) -> tuple[str, str]:
    """The texts of the report and the leaderboard."""
    data = replace(sample_data(12), evaluation=evaluation_section(record.to_json(), has_samples=False))
    board = leaderboard_of(data.evaluation)
    assert board is not None
    report, boards = (re.sub(r"\s+", " ", Page(html).text) for html in (
        render_report(data, {}), render_leaderboard(data, board)))  # fmt: skip
    return report, boards


def test_a_suite_that_only_people_judge_has_pages(config: RunConfig) -> None:
    record, said = evaluated(config)
    assert said[-1] == "votes     0 of 0 sessions on prompts@1"
    assert "there are no votes on its images; `mapo scores vote` collects them" in record.warnings[0]
    assert all("aligned-1 \u2013 \u2013 0 0 no votes" in each for each in pages(record))
    vote(config, ("aligned-1", "base"), [BETTER] * 12)
    vote(config, ("aligned-2", "base"), [TIE] * 12, session="b0" * 16)
    record, _ = evaluated(config)
    assert ranked(record) == {"aligned-1": 1.0, "base": 0.5, "aligned-2": 0.5}
    assert "No scores are configured" not in "".join(pages(record))


def test_votes_are_no_scorer_and_no_scorer_has_their_name(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="votes are of people") as caught:
        new_scorer(VOTES)
    assert "mapo scores vote" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="is called 'votes'"):
        foreign_judge(VOTES, "mine")
    assert not Storage(str(tmp_path)).names(SCORES)
