"""Prompt leaks: what was trained on is counted in every suite, and what was held out or removed is not."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
import pytest
from factories import photo_pairs
from kept import keep_rows
from report_sample import evaluation_data

from orchestration.stages.held_out import HeldOutPairs
from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.storage import Storage
from pipelines.suites.evaluation import warnings_of
from pipelines.suites.leaks import leaked_prompts
from pipelines.suites.results import RESULTS_VERSION, Results
from pipelines.suites.suite import Suite, SuitePrompt, numbered


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Pairs of eight prompts, some of them held out."""
    folder = tmp_path_factory.mktemp("leaks")
    storage = Storage(str(folder / "storage"))
    keep_rows(storage, folder / "photos.parquet", photo_pairs(32, num_prompts=8), validation_ratio=0.5)
    return storage


def prompts_of(storage: Storage, split: str) -> list[str]:
    """The distinct prompts of kept pairs, read without the code under test."""
    rows = pairs_table(storage).read(["prompt", "split", "status"]).to_pylist()
    return sorted({row["prompt"] for row in rows if row["split"] == split and row["status"] == "kept"})


def suite(name: str, *prompts: str) -> Suite:
    return Suite(name, 1, numbered(SuitePrompt.of(each) for each in prompts))


def test_prompts_of_training_pairs_are_counted_in_each_suite(storage: Storage) -> None:
    trained, held_out = prompts_of(storage, "train"), prompts_of(storage, "validation")
    assert len(trained) > 1
    assert held_out
    suites = [
        suite("all", *trained, *held_out, "never seen"), suite("one", trained[0], "never seen"),
        suite("none", *held_out), suite("near", f"{trained[0]} ", trained[0].upper()),
        suite("twice", trained[0], "never seen", trained[0]),
    ]  # fmt: skip
    version = pairs_table(storage).version
    assert version is not None
    found = leaked_prompts(storage, version, suites)
    assert found == {"all": len(trained), "one": 1, "none": 0, "near": 0, "twice": 2}
    assert leaked_prompts(storage, version, []) == {}
    assert HeldOutPairs(storage, version).leaked(suites) == found
    assert HeldOutPairs(storage, None).leaked(suites) == {}


def test_the_pairs_are_those_of_the_version_that_was_trained_on(storage: Storage, tmp_path: Path) -> None:
    version = pairs_table(storage).version
    assert version is not None
    trained = prompts_of(storage, "train")
    (first,) = (trained[0],)

    def without_first(rows):  # type: ignore[no-untyped-def]
        is_first = pc.equal(rows["prompt"], first)
        return rows.set_column(
            rows.schema.get_field_index("status"), "status", pc.if_else(is_first, "duplicate", rows["status"])
        )

    where = (pc.field("prompt") == first) & (pc.field("status") == "kept")
    pairs_table(storage).rewrite(without_first, where, name="test")
    newest = pairs_table(storage).version
    assert newest is not None
    assert leaked_prompts(storage, newest, [suite("s", *trained)]) == {"s": len(trained) - 1}
    assert leaked_prompts(storage, version, [suite("s", *trained)]) == {"s": len(trained)}
    with pytest.raises(SnapshotError):
        leaked_prompts(storage, newest + 1, [suite("s", first)])


def test_results_of_before_are_read_and_say_that_it_is_not_known() -> None:
    results = evaluation_data().record.results
    data = json.loads(json.dumps(results.to_json()))
    assert data["version"] == RESULTS_VERSION
    for found in data["suites"].values():
        assert found.pop("leaked_prompts") is None
    assert Results.from_json(data) == results
    known = Results({name: replace(each, leaked_prompts=3) for name, each in results.suites.items()})
    assert Results.from_json(json.loads(json.dumps(known.to_json()))) == known


def test_a_reader_is_warned_of_trained_prompts_alone() -> None:
    record = evaluation_data().record
    own = record.results.suites["own"]
    for count, is_said in ((None, False), (0, False), (2, True)):
        found = warnings_of(Results({"own": replace(own, leaked_prompts=count)}), record.judges)
        told = [each for each in found if "training pairs" in each]
        assert bool(told) == is_said
    assert told[0].startswith("suite own: 2 of its 40 prompts (5.0%) are prompts of training pairs")
