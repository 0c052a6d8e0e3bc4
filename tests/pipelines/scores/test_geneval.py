"""GenEval's rules, verdict by verdict against the official script (`record_geneval.py`)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.scores.scorers.geneval.boxes import Objects, objects_by_class, relations
from pipelines.scores.scorers.geneval.logic import judge, threshold_of
from pipelines.scores.scorers.geneval.names import OBJECTS
from pipelines.scores.scorers.geneval.requirements import UnusableMetadata, requirements_of
from pipelines.suites.reduce import reduce_suite
from pipelines.suites.suite import Suite, SuitePrompt

RECORDED: dict[str, Any] = json.loads((Path(__file__).parents[2] / "data" / "scorers" / "geneval.json").read_text())
BENCHMARK = Path(__file__).parents[4] / "shared" / "benchmarks" / "geneval"
NO_BENCHMARK = pytest.mark.skipif(not BENCHMARK.is_dir(), reason="the benchmark's files are not on this machine")


def test_the_rules_load_no_model() -> None:
    code = (
        "import sys, pipelines.scores.scorers.geneval.scorer\n"
        "assert not {'torch', 'transformers', 'scipy'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@NO_BENCHMARK
def test_the_objects_are_those_of_the_benchmark() -> None:
    assert list(OBJECTS) == (BENCHMARK / "object_names.txt").read_text().splitlines()


@NO_BENCHMARK
def test_every_row_of_the_benchmark_can_be_judged() -> None:
    rows = [json.loads(line) for line in (BENCHMARK / "evaluation_metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 553
    for row in rows:
        found = requirements_of(row)
        assert len(found.include) == len(row["include"])
        assert all(each.relation in row["prompt"] for each in found.include if each.relation)


def objects_recorded(found: dict[str, list[list[Any]]], tag: str) -> dict[str, Objects]:
    rows = [(OBJECTS.index(name), *each[:5]) for name, boxes in found.items() for each in boxes]
    table = np.array(rows, np.float32).reshape(-1, 6)
    return objects_by_class(table[:, 0].astype(np.int64), table[:, 1:5], table[:, 5], (), threshold_of(tag))


def verdict_of(case: list[Any]) -> tuple[bool, str]:
    place, found, *_ = case
    row = RECORDED["rows"][place]
    colour_of = {(name, *each[:5]): each[5] for name, boxes in found.items() for each in boxes}

    def colours(name: str, objects: Objects) -> list[str]:
        confidences = [round(float(each), 4) for each in objects.confidences_N]
        return [colour_of[(name, *map(int, box), sure)]
                for box, sure in zip(objects.boxes_N4, confidences, strict=True)]  # fmt: skip

    verdict = judge(requirements_of(row), objects_recorded(found, row["tag"]), colours)
    return verdict.is_correct, "\n".join(verdict.reasons)


def test_every_verdict_and_its_reason_is_the_official_one() -> None:
    cases = RECORDED["cases"]
    assert len(cases) >= 300
    differing = [case for case in cases if verdict_of(case) != (bool(case[2]), case[3])]
    assert not differing, differing[0]
    reasons = "\n".join(case[3] for case in cases)
    for word in (">=", "<", " target, found", "no target for", "; and ", "found left of target", " and left of target"):
        assert word in reasons


def test_relations_are_the_official_ones() -> None:
    pairs = [(np.array(box, np.float32), np.array(other, np.float32), seen) for box, other, seen in RECORDED["pairs"]]
    assert [sorted(relations(box, other)) for box, other, _ in pairs] == [seen for _, _, seen in pairs]
    assert {len(seen) for _, _, seen in pairs} == {0, 1, 2}


def test_the_score_of_a_suite_is_the_official_summary() -> None:
    rows, cases = RECORDED["rows"], RECORDED["cases"]
    prompts = tuple(SuitePrompt.of(row["prompt"], row["tag"]) for row in rows)
    images = len(cases) // len(rows)
    suite = Suite("geneval", 1, prompts, images_per_prompt=images, scorers=("geneval",), macro=True)
    values = pa.table(
        {
            "model": ["base"] * len(cases),
            "scorer": ["geneval"] * len(cases),
            "prompt_id": [prompts[case[0]].prompt_id for case in cases],
            "index": pa.array([place % images for place in range(len(cases))], pa.int32()),
            "value": [float(verdict_of(case)[0]) for case in cases],
            "reason": pa.nulls(len(cases), pa.string()),
        }
    )
    found = reduce_suite(values, suite, against="base", num_draws=100).models["base"]
    official = RECORDED["summary"]
    assert found.scores["geneval"].mean == pytest.approx(official["overall"], abs=6e-6)
    tags = {tag: each["geneval"].mean for tag, each in found.tags.items()}
    assert tags == pytest.approx({tag: right / count for tag, (right, count) in official["tags"].items()})
    over_images = sum(case[2] for case in cases) / len(cases)
    assert abs(official["overall"] - over_images) > 1e-3  # the two means can be told apart


def test_only_the_surest_sixteen_of_a_class_count() -> None:
    sure = np.linspace(0.31, 0.99, 20).astype(np.float32)
    boxes_N4 = np.tile(np.array([0, 0, 1, 1], np.float32), (20, 1))
    found = objects_by_class(np.zeros(20, np.int64), boxes_N4, sure, (), 0.3)["person"]
    assert found.confidences_N.tolist() == sure[::-1][:16].tolist()
    wanted = {"tag": "any", "include": [], "exclude": [{"class": "person", "count": 17}]}
    assert judge(requirements_of(wanted), {"person": found}, lambda *_: []).is_correct


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "no metadata"),
        ({"include": [{"class": "dog", "count": 1}]}, "tag"),
        ({"tag": "t"}, "requires nothing"),
        ({"tag": "t", "include": {"class": "dog"}}, "include is not a list"),
        ({"tag": "t", "include": ["dog"]}, "include 0 is not an object"),
        ({"tag": "t", "include": [{"class": "dragon", "count": 1}]}, "'dragon', which the detector does not know"),
        ({"tag": "t", "include": [{"class": ["dog"], "count": 1}]}, "which the detector does not know"),
        ({"tag": "t", "include": [{"class": "dog", "count": 0}]}, "count 0"),
        ({"tag": "t", "exclude": [{"class": "dog", "count": True}]}, "exclude 0 has count True"),
        ({"tag": "t", "include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "color 'mauve'"),
        ({"tag": "t", "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "earlier requirement"),
        ({"tag": "t", "include": [{"class": "dog", "count": 1}] * 1 + [
            {"class": "cat", "count": 1, "position": ["behind", 0]}]}, "position ['behind', 0]"),
    ],
)  # fmt: skip
def test_unusable_metadata_says_what_is_wrong(metadata: Any, words: str) -> None:
    with pytest.raises(UnusableMetadata) as caught:
        requirements_of(metadata)
    assert words in str(caught.value)
