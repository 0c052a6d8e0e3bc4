"""History: what each version of the table brought, and who needs it."""

import json
from pathlib import Path

import pytest
from factories import photo_pairs
from kept import keep_rows, rows_in

from orchestration.cli import main
from pipelines.dataset.storage import Storage
from pipelines.maintenance.compact import compact
from pipelines.maintenance.history import history
from pipelines.maintenance.remove import Condition, remove


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "storage"))
    keep_rows(storage, tmp_path / "photos.parquet", photo_pairs(48, num_ties=2, num_damaged=3))
    return storage


def test_the_rows_of_all_versions_add_up_by_status(storage: Storage) -> None:
    entries, rows = history(storage), rows_in(storage)
    assert [entry.version for entry in entries] == sorted((entry.version for entry in entries), reverse=True)
    assert {entry.operation for entry in entries} == {"append"}
    assert {unit for entry in entries for unit in entry.units} == {row["unit"] for row in rows}
    for status in ("kept", "tie", "quarantined"):
        assert sum(entry.rows.get(status, 0) for entry in entries) == sum(row["status"] == status for row in rows)


def test_a_removal_and_a_compaction_say_so_and_add_nothing(storage: Storage) -> None:
    remove(storage, [Condition("key", rows_in(storage)[0]["pair_key"])])
    list(compact(storage))
    newest = history(storage, 3)
    assert [entry.operation for entry in newest] == ["optimize", "compact", "remove"]
    assert all(entry.num_rows is None and not entry.rows for entry in newest)


def test_runs_that_are_pinned_are_named(storage: Storage) -> None:
    snapshot = {
        "pairs_version": 1, "latents_fingerprint": "a", "latents_version": 0, "text_fingerprint": "b", "text_version": 0
    }  # fmt: skip
    storage.write("runs/one/snapshot.json", json.dumps(snapshot).encode())
    storage.write("runs/one/stages/train.json", json.dumps({"details": {"snapshot": snapshot}}).encode())
    assert {entry.version: entry.runs for entry in history(storage) if entry.runs} == {1: ["one"]}


def test_counts_stay_when_the_files_are_gone(storage: Storage) -> None:
    before = history(storage)
    list(compact(storage))
    assert main(["data", "gc", storage.url, "--grace", "0s", "--force"]) == 0
    after = history(storage)[1:]
    assert [entry.num_rows for entry in after] == [entry.num_rows for entry in before]
    assert all(entry.rows == {} for entry in after)


def test_the_command_shows_a_line_or_an_object_a_version(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "history", storage.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(history(storage))
    assert all("  append " in line and "  unit " in line for line in lines)
    assert main(["data", "history", storage.url, "--json", "--limit", "1"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["version"] == history(storage)[0].version
    assert sum(entry["rows"].values()) == entry["num_rows"]
