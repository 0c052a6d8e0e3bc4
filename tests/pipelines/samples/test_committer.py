"""Each sample has one row, also if several runs that want the same ones commit at once."""

import threading
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.dataset.layout import SAMPLES_SCHEMA, samples_table
from pipelines.dataset.storage import Storage
from pipelines.samples import committer as committing
from pipelines.samples.committer import SampleCommitter

FINGERPRINT = "f" * 32


def rows_of(unit: str, *keys: int) -> pa.Table:
    rows = [{"sample_key": f"{key:032x}", "status": "kept", "unit": unit} for key in keys]
    return pa.Table.from_pylist(rows, SAMPLES_SCHEMA)


def committer_of(storage: Storage) -> SampleCommitter:
    table = samples_table(storage, FINGERPRINT)
    return SampleCommitter(table, table.version)


def committed(storage: Storage) -> list[tuple[int, str]]:
    rows = samples_table(storage, FINGERPRINT).read(["sample_key", "unit"]).to_pylist()
    return sorted((int(row["sample_key"], 16), row["unit"]) for row in rows)


def test_what_another_run_has_committed_since_the_plan_stays(storage: Storage) -> None:
    mine, other = committer_of(storage), committer_of(storage)
    other.append("other-1", rows_of("other-1", 1, 2))
    assert mine.append("mine-1", rows_of("mine-1", 2, 3)).num_rows == 1
    other.append("other-2", rows_of("other-2", 3, 4))
    assert mine.append("mine-2", rows_of("mine-2", 4)).num_rows == 0
    assert mine.append("mine-3", rows_of("mine-3", 5)).num_rows == 1
    assert committed(storage) == [(1, "other-1"), (2, "other-1"), (3, "mine-1"), (4, "other-2"), (5, "mine-3")]


def test_a_unit_that_is_committed_already_is_not_committed_again(storage: Storage) -> None:
    committer_of(storage).append("u", rows_of("u", 1, 2))
    committer_of(storage).append("u", rows_of("u", 1, 2))
    mine = committer_of(storage)
    mine.append("u", rows_of("u", 1, 2))
    mine.append("v", rows_of("v", 3))
    assert committed(storage) == [(1, "u"), (2, "u"), (3, "v")]


def test_runs_that_commit_at_once_leave_one_row_for_each_sample(storage: Storage) -> None:
    start = threading.Barrier(4)

    def run(name: str, step: int) -> None:
        committer = committer_of(storage)
        start.wait(60)
        for first in range(0, 40, step):
            unit = f"{name}-{first}"
            committer.append(unit, rows_of(unit, *range(first, min(first + step, 40))))

    threads = [threading.Thread(target=run, args=(f"run{step}", step)) for step in (5, 7, 8, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [key for key, _ in committed(storage)] == list(range(40))


def test_a_table_of_many_files_is_merged(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "MAX_TABLE_FILES", 3)
    mine, table = committer_of(storage), samples_table(storage, FINGERPRINT)
    for number in range(5):
        mine.append(f"u{number}", rows_of(f"u{number}", number))
        before = committed(storage)
        mine.finish()
        assert committed(storage) == before
        assert len(table.files()) <= 3
    assert len(before) == 5


def test_the_folder_holds_only_the_table(storage: Storage) -> None:
    committer_of(storage).append("u", rows_of("u", 1))
    assert {file.name for file in Path(storage.path()).rglob(FINGERPRINT)} == {FINGERPRINT}
