"""Imported scores: checked against the storage's images, committed once, and reduced like any others."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import photo_pairs
from kept import keep_rows, rows_in
from scored_images import formula_files, write_images

from orchestration.cli import main
from orchestration.stages.evaluation_images import can_audit
from pipelines.config import ScorerEntry
from pipelines.dataset.errors import ConfigError, SnapshotError, SourceError
from pipelines.dataset.layout import SAMPLES_SCHEMA, samples_table
from pipelines.dataset.storage import Storage
from pipelines.scores import imports
from pipelines.scores.execution import score
from pipelines.scores.foreign import ForeignFile, read_foreign
from pipelines.scores.imported import foreign_judge, imported_judge
from pipelines.scores.imports import import_scores
from pipelines.scores.judges import Judge, prepare_judges
from pipelines.scores.plan import read_scores, table_of
from pipelines.scores.scorers import Failure
from pipelines.scores.scorers.imported import NOT_IMPORTED, ImportedScorer
from pipelines.suites.reduce import reduce_suite
from pipelines.suites.suite import Suite, SuitePrompt
from pipelines.units.workers import Workers

PROMPTS = ["a cat on a dog", "a dog next to a cat"]
Rows = list[dict[str, Any]]
JUDGE = foreign_judge("compbench-2d", "UniDet RS200, 1b70949", scale="0 to 1", licence="Apache-2.0")


@pytest.fixture
def images(storage: Storage) -> pa.Table:
    """Six samples of two prompts, in a real shard and table."""
    images = write_images(storage, "a", formula_files(6), [PROMPTS[place % 2] for place in range(6)])
    rows = [
        {
            **dict.fromkeys(SAMPLES_SCHEMA.names),
            "sample_key": f"{place:032x}", "prompt": row["prompt"], "prompt_id": row["prompt_id"], "index": place // 2,
            "status": "kept", "unit": "u", "sha256": row["image_sha256"], "variant": "plain",
        }
        for place, row in enumerate(images.to_pylist())
    ]  # fmt: skip
    lost = {**rows[0], "sample_key": "f" * 32, "sha256": "f" * 64, "status": "quarantined", "reason": "non_finite"}
    samples_table(storage, "0" * 32).append("u", pa.Table.from_pylist([*rows, lost], schema=SAMPLES_SCHEMA))
    return images


def scored(images: pa.Table) -> Rows:
    rows: Rows = [
        {"image_sha256": row["image_sha256"], "prompt_id": row["prompt_id"], "value": place / 8,
         "components": {"position": 0.5}}
        for place, row in enumerate(images.to_pylist())
    ]  # fmt: skip
    rows[5] = {**rows[5], "value": None, "status": "failed", "reason": "the detector ran out of memory"}
    return rows


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in rows) + "\n\n")
    return path


def parquet(path: Path, rows: Rows) -> Path:
    names = {name: None for row in rows for name in row}
    whole = [{**names, **row, "components": json.dumps(row["components"])} for row in rows]
    pq.write_table(pa.Table.from_pylist(whole), path)
    return path


def read(tmp_path: Path, rows: list[Any]) -> ForeignFile:
    return read_foreign(jsonl(tmp_path / "scores.jsonl", rows))


def values(storage: Storage, judge: Judge) -> list[Any]:
    rows = table_of(storage, judge).read().to_pylist()
    return sorted(row["value"] for row in rows if row["status"] == "scored")


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_imported_scores_are_read_as_any_others(
    write: Callable[[Path, Rows], Path], storage: Storage, images: pa.Table, tmp_path: Path
) -> None:
    file = read_foreign(write(tmp_path / f"scores.{write.__name__}", scored(images)))
    done = import_scores(file, storage, JUDGE)
    assert (done.num_new, done.num_failed, done.num_known) == (6, 1, 0)
    judge = imported_judge(storage, "compbench-2d")
    assert judge == JUDGE
    assert judge.to_json() == JUDGE.to_json()
    found = read_scores(storage, judge, images).to_pylist()
    assert [row["value"] for row in found] == [0.0, 0.125, 0.25, 0.375, 0.5, None]
    assert found[5]["reason"] == "the detector ran out of memory"
    assert {row["components"] for row in found} == {'{"position": 0.5}'}


def test_importing_the_same_file_again_adds_nothing(storage: Storage, images: pa.Table, tmp_path: Path) -> None:
    file = read(tmp_path, scored(images))
    import_scores(file, storage, JUDGE)
    version = table_of(storage, JUDGE).version
    done = import_scores(file, storage, JUDGE)
    assert (done.num_new, done.num_failed, done.num_known) == (0, 0, 6)
    assert table_of(storage, JUDGE).version == version


def test_a_longer_file_adds_what_is_new(storage: Storage, images: pa.Table, tmp_path: Path) -> None:
    rows = scored(images)
    import_scores(read(tmp_path, rows[1:3]), storage, JUDGE)
    done = import_scores(read(tmp_path, [*rows, rows[2]]), storage, JUDGE)
    assert (done.num_new, done.num_known) == (4, 2), "the repeated row counts once"
    assert values(storage, JUDGE) == [0.0, 0.125, 0.25, 0.375, 0.5]


def test_an_import_that_was_killed_goes_on_and_repeats_nothing(
    storage: Storage, images: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "ROWS_A_UNIT", 2)
    file, add, count = read(tmp_path, scored(images)), imports.Commits.add, 0

    def killed_after_one(self: Any, rows: pa.Table) -> None:
        nonlocal count
        add(self, rows)
        count += 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(imports.Commits, "add", killed_after_one)
        with pytest.raises(KeyboardInterrupt):
            import_scores(file, storage, JUDGE)
    assert count == 1
    assert table_of(storage, JUDGE).count_rows() == 2
    assert import_scores(file, storage, JUDGE).num_new == 4
    assert table_of(storage, JUDGE).count_rows() == 6


def test_another_value_under_the_same_fingerprint_is_refused_by_name(
    storage: Storage, images: pa.Table, tmp_path: Path
) -> None:
    rows = scored(images)
    import_scores(read(tmp_path, rows), storage, JUDGE)
    version = table_of(storage, JUDGE).version
    for change, told in (({"value": 0.9}, "0.9 here"), ({"components": {"position": 0.6}}, "0.25 here")):
        with pytest.raises(SourceError, match=f"line 1: compbench-2d gave .* 0.25 before, and {told}") as caught:
            import_scores(read(tmp_path, [{**rows[2], **change}, rows[0]]), storage, JUDGE)
        assert "another fingerprint" in str(caught.value.hint)
    mended = {**rows[5], "value": 1.0, "status": "scored", "reason": None}
    with pytest.raises(SourceError, match=r"no score \(the detector ran out of memory\) before, and 1.0 here"):
        import_scores(read(tmp_path, [mended]), storage, JUDGE)
    assert table_of(storage, JUDGE).version == version
    other = foreign_judge("compbench-2d", "UniDet RS200, mended")
    assert import_scores(read(tmp_path, [mended]), storage, other).num_new == 1
    with pytest.raises(ConfigError, match="2 imported tables of compbench-2d"):
        imported_judge(storage, "compbench-2d")
    assert imported_judge(storage, "compbench-2d", other.fingerprint[:8]) == other


def test_images_of_another_storage_or_prompt_are_refused(storage: Storage, images: pa.Table, tmp_path: Path) -> None:
    rows = scored(images)
    for sha256 in ("e" * 64, "f" * 64):  # never seen; a sample that could not be drawn
        with pytest.raises(SnapshotError, match=rf"1 of 7 scores .* does not have, such as {sha256} \(line 7\)"):
            import_scores(read(tmp_path, [*rows, {**rows[0], "image_sha256": sha256}]), storage, JUDGE)
    with pytest.raises(SnapshotError, match=r"1 of 6 scores .* another prompt .* \(line 2\)"):
        import_scores(
            read(tmp_path, [rows[0], {**rows[1], "prompt_id": rows[0]["prompt_id"]}, *rows[2:]]), storage, JUDGE
        )
    assert table_of(storage, JUDGE).version is None
    assert not storage.names("dataset/scores")


def test_both_images_of_kept_pairs_can_have_scores(storage: Storage, tmp_path: Path) -> None:
    keep_rows(storage, tmp_path / "photos.parquet", photo_pairs(4))
    kept = [row for row in rows_in(storage) if row["status"] == "kept"]
    rows = [
        {"image_sha256": row[f"image_{side}_sha256"], "prompt_id": row["prompt_id"], "value": float(side)}
        for row in kept
        for side in (0, 1)
    ]
    assert import_scores(read(tmp_path, rows), storage, JUDGE).num_new == len(rows) > 2


IMAGE = {"image_sha256": "a" * 64, "prompt_id": "b" * 32}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no scores"),
        (["{"], "line 1: not a JSON object"),
        ([{**IMAGE}], "line 1: there is no value"),
        ([{**IMAGE, "value": 1, "extra": 2}], "there is no column extra in scores"),
        ([{**IMAGE, "value": 1, "image_sha256": "A" * 64}], "not 64 hex digits"),
        ([{**IMAGE, "value": 1, "prompt_id": "b"}], "`prompt_id` is 'b', not 32 hex digits"),
        ([{**IMAGE, "value": float("nan")}], "`value` is nan, not a finite number"),
        ([{**IMAGE, "value": True}], "`value` is True"),
        ([{**IMAGE, "value": "0.5"}], "`value` is '0.5'"),
        ([{**IMAGE, "value": None}], "a failed score has no reason"),
        ([{**IMAGE, "value": 0.0, "status": "failed", "reason": "x"}], "a failure is never a number"),
        ([{**IMAGE, "value": 0.0, "reason": "x"}], "which only a failure has"),
        ([{**IMAGE, "value": 0.0, "status": "done"}], "neither scored nor failed"),
        ([{**IMAGE, "value": 0.0, "components": [1]}], r"`components` is \[1\], not a JSON object"),
        ([{**IMAGE, "value": 0.0, "components": {"a": "b"}}], "not a JSON object of numbers"),
        ([{**IMAGE, "value": 0.0}, {**IMAGE, "value": 0.5}], r"line 2: .* has the score 0.5, but 0.0 in line 1"),
        (
            [{**IMAGE, "value": 0, "scorer": "a"}, {**IMAGE, "value": 0, "scorer": "b"}],
            "scorer of .* has 2 values: a, b",
        ),
    ],
)
def test_a_row_that_is_no_score_is_refused_with_its_place(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read(tmp_path, rows)
    assert caught.value.hint


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").touch()
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    for name, message in (("scores.csv", "neither"), ("broken.parquet", "cannot read"), ("none.jsonl", "cannot read")):
        with pytest.raises(SourceError, match=message):
            read_foreign(tmp_path / name)


def test_a_failure_of_parquet_may_be_nan(tmp_path: Path) -> None:
    row = {**IMAGE, "value": float("nan"), "status": "failed", "reason": "x", "components": {"n": float("inf")}}
    (score,) = read_foreign(parquet(tmp_path / "scores.parquet", [row])).scores
    assert (score.value, score.components) == (None, '{"n": null}')


def test_the_command_imports_and_says_so(
    storage: Storage, images: pa.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "scorer": "compbench-2d"} for row in scored(images)]
    command = ["scores", "import", str(jsonl(tmp_path / "s.jsonl", rows)), storage.url, "--scale", "0 to 1"]
    assert main(command) == 2
    assert "--fingerprint is not given" in capsys.readouterr().err
    assert main([*command, "--fingerprint", "UniDet", "--scorer", "other"]) == 2
    assert "the column scorer of s.jsonl says 'compbench-2d'" in capsys.readouterr().err
    assert main([*command, "--fingerprint", " "]) == 2
    capsys.readouterr()
    assert main([*command, "--fingerprint", "UniDet"]) == 0
    assert ": 6 new scores, 1 of them failed; 0 were there" in capsys.readouterr().out
    assert main([*command, "--fingerprint", "UniDet"]) == 0
    assert ": 0 new scores; 6 were there" in capsys.readouterr().out
    assert main([*command, "--fingerprint", "UniDet", "--lower-is-better"]) == 2
    assert "higher_is_better of compbench-2d is False, but True" in capsys.readouterr().err


def test_a_configuration_names_imported_scores(storage: Storage, images: pa.Table, tmp_path: Path) -> None:
    entries = [ScorerEntry(name="imported:compbench-2d"), ScorerEntry(name="saturation")]
    with pytest.raises(ConfigError, match="no imported scores of compbench-2d") as caught:
        prepare_judges(entries, storage)
    assert "mapo scores import" in str(caught.value.hint)
    rows = scored(images)
    import_scores(read(tmp_path, rows[:4]), storage, JUDGE)
    judges = prepare_judges(entries, storage)
    assert judges[0] == JUDGE
    assert [judge.is_imported for judge in judges] == [True, False]
    assert [can_audit(judge) for judge in judges] == [False, True]
    workers = Workers("evaluate", num_workers=1, device="cpu")
    with pytest.raises(SnapshotError, match="2 images have no imported score of compbench-2d@") as refused:
        score(storage, judges, images, workers)
    assert "mapo scores import" in str(refused.value.hint)
    import_scores(read(tmp_path, rows), storage, JUDGE)
    assert score(storage, judges[:1], images, workers).num_scored == {"compbench-2d": 0}
    exact = ScorerEntry(name=f"imported:compbench-2d@{JUDGE.fingerprint[:8]}")
    assert prepare_judges([exact], storage) == [replace(JUDGE, entry=exact)]
    assert ImportedScorer(exact.name).score([None], ["a"]) == [Failure(NOT_IMPORTED, transient=True)]


def test_an_evaluation_can_reduce_imported_scores(storage: Storage, images: pa.Table, tmp_path: Path) -> None:
    import_scores(read(tmp_path, scored(images)), storage, JUDGE)
    scores = read_scores(storage, imported_judge(storage, "compbench-2d"), images)
    cells = {
        "model": ["base", "base", "aligned", "aligned", "other", "other"],
        "scorer": ["compbench-2d"] * 6,
        "prompt_id": images["prompt_id"].to_pylist(),
        "index": [0] * 6,
        "value": scores["value"].to_pylist(),
        "reason": scores["reason"].to_pylist(),
    }
    suite = Suite("t2i", 1, tuple(SuitePrompt.of(each, "spatial") for each in PROMPTS), scorers=("compbench-2d",))
    found = reduce_suite(pa.table(cells), suite, against="base", num_draws=100)
    assert found.models["base"].scores["compbench-2d"].mean == pytest.approx(0.0625)
    assert found.against["aligned"]["compbench-2d"].difference == pytest.approx(0.25)
    assert found.failures["other"]["compbench-2d"] == {"the detector ran out of memory": 1}
