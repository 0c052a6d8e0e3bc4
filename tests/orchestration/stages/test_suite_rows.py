"""Rows of a suite and their samples: a repeated prompt has images of its own, and judges get what the suite knows."""

import json
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from orchestration.stages.evaluation_images import images_of, sample_of, samples_of, with_rows_of
from orchestration.stages.judged_scorers import check_served, lacking, served
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.layout import SAMPLES_SCHEMA
from pipelines.samples.plan import wanted_samples
from pipelines.samples.prompts import Prompt
from pipelines.suites.cells import VALUES_SCHEMA
from pipelines.suites.reduce import reduce_suite
from pipelines.suites.suite import Suite, SuitePrompt, numbered

FINGERPRINT = "f" * 32


def suite(*prompts: SuitePrompt, **fields: Any) -> Suite:
    return Suite("own", 1, numbered(prompts), scorers=("judge",), **fields)


def repeated(images_per_prompt: int = 2) -> Suite:
    return suite(
        *(SuitePrompt.of(text, tag) for text, tag in (("a", "x"), ("b", "x"), ("a", "y"))),
        images_per_prompt=images_per_prompt,
    )


def test_a_repeated_prompt_is_drawn_again_with_other_noise() -> None:
    own = repeated()
    wanted = samples_of(own, FINGERPRINT, seed=1)
    assert wanted.num_rows == 6
    assert len(set(wanted["sample_key"].to_pylist())) == 6
    places = sorted(zip(wanted["prompt"].to_pylist(), wanted["index"].to_pylist(), strict=True))
    assert places == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("b", 1)]


def test_samples_without_repetitions_are_those_of_the_plan() -> None:
    own = suite(SuitePrompt.of("a"), SuitePrompt.of("b"), images_per_prompt=3)
    prompts = [Prompt(each.prompt_id, each.prompt) for each in own.prompts]
    assert samples_of(own, FINGERPRINT, 1).equals(wanted_samples(prompts, FINGERPRINT, seed=1, images_per_prompt=3))


def test_a_limited_suite_keeps_the_images_of_its_rows() -> None:
    own = repeated()
    last = Suite("own", 1, own.prompts[2:], images_per_prompt=2)
    wanted = samples_of(last, FINGERPRINT, seed=1)
    assert wanted["index"].to_pylist() == [2, 3]
    assert set(wanted["sample_key"].to_pylist()) < set(samples_of(own, FINGERPRINT, seed=1)["sample_key"].to_pylist())


def test_values_of_samples_become_values_of_rows_and_each_row_counts() -> None:
    own = repeated()
    wanted = samples_of(own, FINGERPRINT, seed=1)
    numbers = [float(number) for number in range(wanted.num_rows)]
    table = pa.table(
        {
            "model": ["base"] * wanted.num_rows, "scorer": ["judge"] * wanted.num_rows,
            "prompt_id": wanted["prompt_id"], "index": wanted["index"], "value": numbers,
            "reason": pa.nulls(wanted.num_rows, pa.string()),
        }
    ).cast(VALUES_SCHEMA)  # fmt: skip
    values = with_rows_of(own, table)
    for row, sample in zip(values.to_pylist(), table.to_pylist(), strict=True):
        assert sample_of(own, row["prompt_id"], row["index"]) == (sample["prompt_id"], sample["index"])
        assert row["index"] < 2
    found = reduce_suite(values, own, against="base", num_draws=100)
    score = found.models["base"].scores["judge"]
    assert (score.n, score.num_images, score.mean) == (3, 6, pytest.approx(2.5))
    assert {tag: each["judge"].n for tag, each in found.models["base"].tags.items()} == {"x": 2, "y": 1}


def test_a_prompt_is_drawn_from_its_text_and_judged_by_itself() -> None:
    wanted = samples_of(suite(SuitePrompt.of("a cat", text="a sks cat")), FINGERPRINT, seed=0)
    assert (wanted["text"][0].as_py(), wanted["prompt"][0].as_py()) == ("a sks cat", "a cat")


def test_judges_get_what_the_suite_knows_of_each_prompt() -> None:
    own = suite(SuitePrompt.of("a", metadata='{"n": 1}'), SuitePrompt.of("b", metadata='{"n": 2}'))
    wanted = samples_of(own, FINGERPRINT, seed=0)
    rows = [
        {**each, "status": "kept", "shard": "s", "offset": 0, "length": 1, "sha256": "0" * 64}
        for each in wanted.to_pylist()
    ]
    filled = pa.Table.from_pylist(
        [{name: row.get(name) for name in SAMPLES_SCHEMA.names} for row in rows], SAMPLES_SCHEMA
    )
    judge: Any = SimpleNamespace(needs=("image", "metadata"))
    images = images_of(filled, [judge], own)
    assert [json.loads(each)["n"] for each in images["metadata"].to_pylist()] == [1, 2]
    assert "questions" not in images.column_names


def test_a_scorer_lacks_what_only_other_suites_have() -> None:
    known = suite(SuitePrompt.of("a", metadata="{}"))
    assert lacking(known, "geneval") == []
    assert lacking(suite(SuitePrompt.of("a")), "geneval") == ["metadata"]
    assert lacking(suite(SuitePrompt.of("a")), "saturation") == []


def run_with(*scorers: str) -> Any:
    entries = [SimpleNamespace(name=name) for name in scorers]
    return SimpleNamespace(config=SimpleNamespace(evaluate=SimpleNamespace(scorer_entries=entries)))


def test_imported_scores_of_a_benchmark_are_for_its_suite_alone() -> None:
    spatial, other = suite(SuitePrompt.of("a"), foreign=("compbench-2d",)), suite(SuitePrompt.of("b"))
    run = run_with("imported:compbench-2d", "imported:mine@0123", "saturation")
    assert served(run, spatial) == ["imported:compbench-2d", "imported:mine@0123", "saturation"]
    assert served(run, other) == ["imported:mine@0123", "saturation"]
    check_served(run, [other, spatial])
    with pytest.raises(ConfigError, match="imported:compbench-2d has imported scores of a suite that is not in any"):
        check_served(run, [other])
    with pytest.raises(ConfigError, match="geneval needs metadata of each prompt, which is not in any"):
        check_served(run_with("geneval"), [other])
