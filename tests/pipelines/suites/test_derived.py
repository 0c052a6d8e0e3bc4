"""Derived judges: 3-in-1 of T2I-CompBench as the official script merges it, and no score where a part has none."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.suites.cells import VALUES_SCHEMA
from pipelines.suites.compbench.three_in_one import PARTS, kind_of
from pipelines.suites.derived import DERIVED, THREE_IN_ONE, missing_parts, with_derived
from pipelines.suites.reduce import reduce_suite
from pipelines.suites.suite import Suite, SuitePrompt

RECORDED = Path(__file__).parents[2] / "data" / "compbench" / "recorded.json"
SHARED = Path(__file__).parents[4] / "shared" / "benchmarks" / "t2i-compbench"
BLIP, UNIDET, CLIP = THREE_IN_ONE.parts
MERGED = THREE_IN_ONE.name
KINDS = ("spatial", "action", "spatialaction")


def suite_of(prompts: dict[str, str], images_per_prompt: int = 1) -> Suite:
    """A suite of prompts by their kinds."""
    return Suite(
        "complex", 1, tuple(SuitePrompt.of(prompt, kind) for prompt, kind in prompts.items()),
        images_per_prompt=images_per_prompt, scorers=(BLIP, CLIP), foreign=(UNIDET,), derived=(MERGED,),
        primary=(MERGED,),
    )  # fmt: skip


def values_of(suite: Suite, parts: dict[str, Any], model: str = "base") -> pa.Table:
    """One row for each image and judge; parts have a list of numbers, or of reasons, for each judge."""
    places = [(each.prompt_id, index) for each in suite.prompts for index in range(suite.images_per_prompt)]
    rows = [
        {"model": model, "scorer": scorer, "prompt_id": prompt_id, "index": index,
         "value": None if isinstance(found, str) else found, "reason": found if isinstance(found, str) else None}
        for scorer, values in parts.items()
        for (prompt_id, index), found in zip(places, values, strict=True)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=VALUES_SCHEMA)


def merged(values: pa.Table, suite: Suite) -> list[dict[str, Any]]:
    return [row for row in with_derived(values, suite, suite.derived).to_pylist() if row["scorer"] == MERGED]


def test_every_image_of_the_benchmark_is_merged_as_the_official_script_does() -> None:
    if not SHARED.is_dir():
        pytest.skip("the benchmark's prompts are not on this machine")
    recorded = json.loads(RECORDED.read_text())["three_in_one"]
    prompts, spatial, action = (
        (SHARED / f"complex_val{name}.txt").read_text().splitlines() for name in ("", "_spatial", "_action")
    )
    suite = suite_of({prompt: kind_of(prompt, spatial, action) for prompt in prompts}, images_per_prompt=10)
    random = np.random.RandomState(recorded["seed"])
    blip, unidet, clip = (np.round(random.rand(10 * len(prompts)), 4).tolist() for _ in range(3))
    values = values_of(suite, {BLIP: blip, UNIDET: unidet, CLIP: clip})
    found = merged(values.take(np.random.RandomState(1).permutation(values.num_rows)), suite)  # rows in any order
    by_place = {(row["prompt_id"], row["index"]): row["value"] for row in found}
    assert len(by_place) == 3000
    first = [by_place[each.prompt_id, 0] for each in suite.prompts]
    assert first == pytest.approx(recorded["first_of_each_prompt"], abs=1e-12)


def test_an_image_fails_with_the_reason_of_a_part_that_its_kind_has() -> None:
    suite = suite_of({"a": "spatial", "b": "action", "c": "spatialaction"})
    parts = {BLIP: [0.5, 0.5, 0.5], UNIDET: [0.25, "no boxes", "no boxes"], CLIP: ["too dark", 0.25, 0.25]}
    found = merged(values_of(suite, parts), suite)
    assert [(row["value"], row["reason"]) for row in found] == [
        (0.375, None), (0.375, None), (None, f"{UNIDET}: no boxes")
    ]  # fmt: skip
    broken = merged(values_of(suite, parts | {BLIP: [math.nan, "", 0.5]}), suite)
    assert [row["reason"] for row in broken] == [
        f"{BLIP}: not_finite", f"{BLIP}: unknown", f"{UNIDET}: no boxes"
    ]  # fmt: skip


def test_a_derived_judge_is_reduced_like_any_other_and_alone_makes_claims() -> None:
    suite = suite_of({f"{kind} {number}": kind for kind in KINDS for number in range(4)}, images_per_prompt=2)
    count, tables = 24, []
    for model, gain in (("base", 0.0), ("aligned", 0.25)):
        parts = {name: [gain + place / 64 for place in range(count)] for name in THREE_IN_ONE.parts}
        tables.append(values_of(suite, parts, model))
    values = pa.concat_tables(tables)
    components = values.append_column("components", pa.nulls(values.num_rows, pa.string()))
    found = reduce_suite(with_derived(components, suite, suite.derived), suite, against="base", num_draws=200)
    assert found.scorers == (BLIP, CLIP, UNIDET, MERGED)
    assert (found.primary, found.num_primary_tests) == ((MERGED,), 1)
    compared = found.against["aligned"]
    assert compared[MERGED].difference == pytest.approx(0.25)
    assert compared[MERGED].p_holm is not None
    assert compared[BLIP].p_holm is None, "the parts describe"
    assert found.models["base"].scores[MERGED].num_images == count
    assert {tag: each[MERGED].n for tag, each in found.models["base"].tags.items()} == dict.fromkeys(KINDS, 4)


def test_parts_that_are_missing_are_named() -> None:
    assert missing_parts(MERGED, [BLIP, "saturation"]) == [UNIDET, CLIP]
    assert missing_parts(MERGED, THREE_IN_ONE.parts) == []
    suite = suite_of({"a": "spatial"})
    values = values_of(suite, {BLIP: [0.5]})
    assert with_derived(values, suite, ()).equals(values)


def test_every_kind_has_its_parts() -> None:
    assert {name: len(parts) for name, parts in PARTS.items()} == {"spatial": 2, "action": 2, "spatialaction": 3}
    assert list(DERIVED) == [MERGED]
