"""The alignment benchmark: every cell is filled, runs can be repeated, and the statistics find what is there."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.alignment import BASE, COMPARED, CRITERION, FULL, SMALL, Bench, at_edge, choose, run
from benchmarks.alignment_data import LEVELS, split_scenes
from benchmarks.alignment_report import closest, interval, question, render, write
from benchmarks.alignment_runs import METRICS, Judge, Setting
from orchestration.demo.scenes import SUBJECTS, scenes
from pipelines.dataset.pair import TEST, VALIDATION

# diffusers' Euler schedule, about a tensor of its own.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes last bits
    yield Bench(SMALL)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def outcome(bench: Bench) -> tuple[dict[str, Any], Image.Image]:
    return run(bench, say=lambda line: None)


def test_no_prompt_is_in_two_splits_and_every_photo_is_in_all() -> None:
    splits = split_scenes()
    assert sorted(scene.caption for views in splits.values() for scene in views) == sorted(s.caption for s in scenes())
    assert all({scene.photo for scene in views} == set(SUBJECTS) for views in splits.values())


@pytest.mark.slow
def test_mismatch_rises_from_level_to_level(bench: Bench, outcome: tuple[dict[str, Any], Image.Image]) -> None:
    ratios = [level["error_ratio"] for level in outcome[0]["mismatch"].values()]
    assert 1 < ratios[0] < ratios[1] < ratios[2]


@pytest.mark.slow
def test_every_method_has_every_seed_at_every_level(outcome: tuple[dict[str, Any], Image.Image]) -> None:
    report, _ = outcome
    cells = [(row["level"], row["method"], row["seed"]) for row in report["runs"]]
    assert sorted(cells) == sorted((level, method, seed) for level in LEVELS for method in COMPARED for seed in (0, 1))
    for level, methods in report["table"].items():
        assert list(methods) == [BASE, *COMPARED]
        for method in COMPARED:
            rows = [row for row in report["runs"] if (row["level"], row["method"]) == (level, method)]
            for metric in METRICS:
                found = methods[method][metric]
                assert found["mean"] == pytest.approx(np.mean([row[metric] for row in rows]), abs=2e-4)
                assert found["low"] <= found["mean"] <= found["high"]


@pytest.mark.slow
def test_a_run_can_be_repeated_and_another_seed_is_another_run(
    bench: Bench, outcome: tuple[dict[str, Any], Image.Image]
) -> None:
    for method in ("dpo", "mapo"):
        setting = Setting(method, SMALL.learning_rates[0])
        first, again, other = (bench.trained("far", setting, seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(again[name], weight) for name, weight in first.items())
        assert not all(torch.equal(other[name], weight) for name, weight in first.items())
        assert not all(torch.equal(bench.base.unet.state_dict()[name], weight) for name, weight in first.items())


@pytest.mark.slow
def test_scores_of_the_base_can_be_repeated(bench: Bench, outcome: tuple[dict[str, Any], Image.Image]) -> None:
    images = bench.samples(bench.base.unet, TEST)
    for level in LEVELS:
        scores = bench.scores(level, images, TEST)
        for metric in METRICS:
            assert outcome[0]["table"][level][BASE][metric]["mean"] == pytest.approx(scores[metric].mean(), abs=1e-4)


def test_the_judge_tells_preferred_images_from_the_others(bench: Bench) -> None:
    for level in LEVELS:
        judge, pairs = Judge(bench.data, level), bench.data.pairs[level, TEST]
        chosen, rejected = (judge.score(side, pairs.prompts) for side in (pairs.chosen, pairs.rejected))
        assert chosen["style"].mean() > rejected["style"].mean() + 0.5
        assert min(chosen["content"].mean(), rejected["content"].mean()) > 0.7
        assert chosen["distance"].max() < 1e-6 < rejected["distance"].min()  # one crop a scene: its own target


def test_validation_and_test_share_no_prompt_and_no_noise(bench: Bench) -> None:
    for field in ("prompts", "seeds"):
        validation, test = (set(getattr(bench.draws[split], field)) for split in (VALIDATION, TEST))
        assert validation
        assert not validation & test


@pytest.mark.parametrize(
    ("best_rate", "best_factor", "edges"),
    [(1e-4, 1.0, []), (1e-5, 5.0, ["learning_rate"]), (1e-3, 25.0, ["learning_rate", "beta"]), (3e-4, 0.04, ["beta"])],
)
def test_the_grid_finds_the_rate_and_then_the_beta(best_rate: float, best_factor: float, edges: list[str]) -> None:
    def measure(setting: Setting) -> dict[str, float]:
        beta = setting.loss.get("beta", 8.0)
        return {CRITERION: -abs(np.log(setting.learning_rate / best_rate)) - abs(np.log(beta / 8 / best_factor))}

    found, tried = choose("mapo_paper", FULL, measure)
    assert found.learning_rate == best_rate
    assert found.loss.get("beta", 8.0) == pytest.approx(8 * best_factor)
    assert len(tried) == len(FULL.learning_rates) + len(FULL.beta_factors)
    assert at_edge(found, FULL) == edges
    assert len(choose("sft", FULL, measure)[1]) == len(FULL.learning_rates)


def test_the_closest_of_the_grid_has_kept_the_content() -> None:
    rows = [
        {"level": "near", "method": "dpo", "content": content, "distance": distance}
        for content, distance in ((0.95, 0.3), (0.9, 0.2), (0.89, 0.1), (1.0, 0.25))
    ]
    assert closest(rows) == {"near": {"dpo": rows[1]}, "middle": {}, "far": {}}


@pytest.mark.parametrize(("step", "expected"), [(0.2, "grows"), (-0.2, "shrinks"), (0.0, "undecided")])
@pytest.mark.parametrize("metric", ["both", "distance"])
def test_the_answer_is_that_of_the_numbers(step: float, expected: str, metric: str) -> None:
    rng = np.random.default_rng(1)
    sign = -1 if metric == "distance" else 1

    def scores(lead: float) -> dict[str, Any]:
        return {name: sign * lead + 0.1 * rng.standard_normal((3, 16)) for name in METRICS}

    stacked = {(level, "dpo"): scores(0) for level in LEVELS}
    stacked |= {(level, "mapo"): scores(step * number) for number, level in enumerate(LEVELS)}
    found = question(stacked, ("mapo",), against="dpo")[metric]["mapo"]
    assert found["growth"]["verdict"] == expected
    assert found["far"]["mean"] == pytest.approx(2 * step, abs=0.06)


def test_an_interval_knows_that_seeds_and_prompts_vary() -> None:
    same = np.full((3, 16), 0.5)
    assert interval(same) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    by_seed, by_prompt = same + np.array([[-0.3], [0.0], [0.3]]), same + np.linspace(-0.3, 0.3, 16)
    for values in (by_seed, by_prompt):
        found = interval(values)
        assert found["low"] < 0.45 < 0.55 < found["high"]


@pytest.mark.slow
def test_what_is_written_is_what_came_out(tmp_path: Path, outcome: tuple[dict[str, Any], Image.Image]) -> None:
    report, picture = outcome
    write(tmp_path, report, picture, SMALL)
    written = json.loads((tmp_path / "alignment.json").read_text())
    assert {name: written[name] for name in report} == json.loads(json.dumps(report))
    assert written["conditions"]["size"] == json.loads(json.dumps(dataclasses.asdict(SMALL)))
    assert (tmp_path / "alignment.jpg").stat().st_size < 300_000
    assert all(f"{level:<8}{method}" in render(report) for level in LEVELS for method in COMPARED)
