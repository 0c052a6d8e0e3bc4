"""Garbage: what someone may still need stays, and everything else goes."""

import json
import os
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from encoded import write_encoded
from factories import photo_pairs
from kept import images_in, keep_rows, rows_in

from orchestration.cli import main
from orchestration.commands.data import grace_period
from pipelines.dataset.errors import ConfigError, StorageError
from pipelines.dataset.layout import (
    PAIRS,
    SAMPLES,
    SAMPLES_SCHEMA,
    SCORES,
    SCORES_SCHEMA,
    SHARDS,
    pairs_table,
    samples_table,
    scores_table,
)
from pipelines.dataset.storage import Storage
from pipelines.maintenance.compact import compact
from pipelines.maintenance.gc import delete_garbage, find_garbage, stored_objects
from pipelines.maintenance.remove import Condition, remove
from pipelines.maintenance.verify import verify
from training.data.index import load_index
from training.spec import Snapshot

NOTHING, WEEK = timedelta(0), timedelta(days=7)
LONG_AGO_S = 30 * 86_400


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Some pairs were removed, and the shards were compacted: the old shards are still there."""
    storage = Storage(str(tmp_path / "storage"))
    keep_rows(storage, tmp_path / "photos.parquet", photo_pairs(40, num_ties=3, num_damaged=4))
    remove(storage, [Condition("user", "2")])
    list(compact(storage))
    return storage


def age(storage: Storage, seconds: float = LONG_AGO_S) -> None:
    """Make everything below the data set that much older."""
    for each in stored_objects(storage):
        os.utime(storage.path(each.name), (each.modified - seconds,) * 2)


def names(garbage: object) -> set[str]:
    return {each.name for each in garbage}  # type: ignore[attr-defined]


def pin(storage: Storage, run: str, file: str, pairs_version: int) -> None:
    snapshot = asdict(Snapshot(pairs_version, "a" * 32, 0, "b" * 32, 0))
    record = snapshot if file == "snapshot.json" else {"details": {"snapshot": snapshot}}
    storage.write(f"runs/{run}/{file}", json.dumps(record).encode())


def collect(storage: Storage, grace: timedelta = NOTHING) -> set[str]:
    return names(delete_garbage(storage, find_garbage(storage, grace)))


def test_all_that_the_newest_version_needs_stays_and_the_rest_goes(storage: Storage) -> None:
    before, images = rows_in(storage), images_in(storage)
    files = {f"{PAIRS}/{file}" for file in pairs_table(storage).files()}
    deleted = collect(storage)
    assert deleted
    shards = {row["shard"] for row in before if row["shard"]}
    assert set(storage.names(SHARDS)) == shards
    assert {name for name in storage.names(PAIRS) if "_delta_log" not in name} == files
    assert rows_in(storage) == before
    assert images_in(storage) == images
    assert verify(storage) == []
    assert collect(storage) == set()


def test_old_objects_stay_while_a_version_of_the_grace_period_needs_them(storage: Storage) -> None:
    newest = pairs_table(storage).version
    assert newest is not None
    images = {version: images_in(storage, version) for version in range(newest + 1)}
    age(storage)  # the commits are new all the same
    assert collect(storage, WEEK) == set()
    assert {version: images_in(storage, version) for version in images} == images


def test_samples_and_scores_stay_and_a_shard_of_samples_that_no_row_points_to_goes(storage: Storage) -> None:
    shard = f"{SAMPLES}/{'c' * 32}/unit.tar"
    for name in (shard, shard.replace("unit", "killed")):
        storage.write(name, b"png and json")
    rows = [{"sample_key": "1" * 32, "status": "kept", "unit": "unit", "shard": shard}]
    samples, scores = samples_table(storage, "c" * 32), scores_table(storage, "pickscore", "d" * 32)
    samples.append("unit", pa.Table.from_pylist(rows, SAMPLES_SCHEMA))
    scores.append("unit", pa.Table.from_pylist([{"image_sha256": "e" * 64, "value": 0.5}], SCORES_SCHEMA))
    storage.write(f"{SAMPLES}/{'f' * 32}/fingerprint.json", b"{}")  # of a drawing that has committed nothing yet
    deleted = collect(storage)
    assert {name for name in deleted if name.startswith((SAMPLES, SCORES))} == {shard.replace("unit", "killed")}
    assert samples.read(["shard"])["shard"].to_pylist() == [shard]
    assert storage.exists(shard)
    assert scores.read(["value"])["value"].to_pylist() == [0.5]


def test_a_young_object_stays_though_nothing_points_to_it(storage: Storage) -> None:
    collect(storage)
    storage.write(f"{SHARDS}/young.tar", b"of an ingest that runs")
    assert collect(storage, timedelta(hours=1)) == set()
    assert collect(storage) == {f"{SHARDS}/young.tar"}


def test_samples_and_scores_stay_and_a_tar_that_no_sample_points_to_goes(storage: Storage) -> None:
    sample = dict.fromkeys(SAMPLES_SCHEMA.names) | {"sample_key": "k", "shard": f"{SAMPLES}/f/one.tar"}
    samples_table(storage, "f").append("one", pa.Table.from_pylist([sample], SAMPLES_SCHEMA))
    score = dict.fromkeys(SCORES_SCHEMA.names) | {"image_sha256": "i", "value": 0.5}
    scores_table(storage, "pickscore", "f").append("one", pa.Table.from_pylist([score], SCORES_SCHEMA))
    for name in ("one", "two"):
        storage.write(f"{SAMPLES}/f/{name}.tar", b"png")
    age(storage)
    gone = collect(storage)
    assert f"{SAMPLES}/f/two.tar" in gone
    assert not [name for name in gone if name.startswith((SAMPLES, SCORES)) and "two" not in name]
    assert samples_table(storage, "f").count_rows() == scores_table(storage, "pickscore", "f").count_rows() == 1


@pytest.mark.parametrize("file", ["stages/train.json", "snapshot.json"])
def test_a_version_that_a_run_is_pinned_to_stays_whole(storage: Storage, file: str) -> None:
    version = (pairs_table(storage).version or 0) - 3
    images, rows = images_in(storage, version), rows_in(storage, version)
    pin(storage, "photos", file, version)
    assert collect(storage)
    assert rows_in(storage, version) == rows
    assert images_in(storage, version) == images
    storage.delete(f"runs/photos/{file}")
    assert collect(storage)
    with pytest.raises(StorageError):
        rows_in(storage, version)


def test_a_pinned_training_still_finds_its_latents(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    snapshot = write_encoded(storage, tmp_path)
    storage.write("runs/one/snapshot.json", json.dumps(asdict(snapshot)).encode())
    remove(storage, [Condition("prompt", "prompt 1")])
    list(compact(storage))
    collect(storage)
    index = load_index(storage, snapshot, "train")
    for element in range(len(index)):
        place = index.pair(0, element).latents
        storage.read_range(place.shard, place.offset, place.length, place.sha256)


def test_leftovers_of_killed_writers_go_and_what_is_not_ours_stays(storage: Storage) -> None:
    collect(storage)
    unfinished = f"{SHARDS}/.shard.tar.0123abcd.tmp"
    storage.write("dataset/latents/x/half.tar", b"")
    storage.write("dataset/latents/x/fingerprint.json", b"{}")
    storage.write(f"{SHARDS}/README.txt", b"mine")
    storage.write(unfinished, b"half")
    assert unfinished not in storage.names()
    assert collect(storage) == {unfinished, "dataset/latents/x/half.tar"}
    assert storage.exists(f"{SHARDS}/README.txt")


def test_what_was_written_again_since_it_was_listed_stays(storage: Storage) -> None:
    age(storage)
    garbage = find_garbage(storage, NOTHING)
    again = next(each for each in garbage if each.name.endswith(".tar"))
    storage.write(again.name, storage.read(again.name))
    assert names(delete_garbage(storage, garbage)) == names(garbage) - {again.name}


def test_nothing_is_garbage_while_a_record_or_the_table_cannot_be_read(storage: Storage) -> None:
    storage.write("runs/photos/stages/train.json", b"{")
    with pytest.raises(StorageError, match="cannot tell which versions"):
        find_garbage(storage, NOTHING)
    storage.delete("runs/photos/stages/train.json")
    (file, *_) = pairs_table(storage).files()
    storage.delete(f"{PAIRS}/{file}")
    with pytest.raises(StorageError, match=r"1 of 1 files of version .* are missing"):
        find_garbage(storage, NOTHING)
    storage.delete(f"{PAIRS}/_delta_log/{1:020d}.json")
    with pytest.raises(StorageError, match="entries are missing"):
        find_garbage(storage, NOTHING)


def test_a_dry_run_lists_what_the_run_deletes(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["data", "gc", storage.url, "--grace", "0s", "--force"]
    assert main([*options, "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in listed[:-1]} == names(find_garbage(storage, NOTHING))
    assert main(options) == 0
    deleted = capsys.readouterr().out.splitlines()
    assert deleted == [*listed[:-1], listed[-1].replace("would be deleted", "deleted")]
    assert find_garbage(storage, NOTHING) == []


@pytest.mark.parametrize(
    ("text", "seconds"), [("7d", 604_800), ("90m", 5400), ("1h", 3600), ("3600s", 3600)]
)  # fmt: skip
def test_a_grace_period_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert grace_period(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["59m", "0s", "7", "d", "-1d", "1.5h", "1w"])
def test_a_grace_period_that_is_none_or_too_short_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        grace_period(text)
    assert main(["data", "gc", str(tmp_path), f"--grace={text}"]) == 2
    assert "hint: " in capsys.readouterr().err


def test_on_s3_the_same_is_garbage(s3_storage: Storage, tmp_path: Path) -> None:
    keep_rows(s3_storage, tmp_path / "photos.parquet", photo_pairs(16))
    key = rows_in(s3_storage)[0]["pair_key"]
    remove(s3_storage, [Condition("key", key)])
    list(compact(s3_storage))
    images = images_in(s3_storage)
    assert collect(s3_storage, WEEK) == set()
    # S3 keeps seconds: what was written within this one is not older than now.
    deadline = time.monotonic() + 10
    deleted: set[str] = set()
    while not any(name.endswith(".tar") for name in deleted) and time.monotonic() < deadline:
        deleted |= collect(s3_storage)
    assert any(name.endswith(".tar") for name in deleted)
    assert images_in(s3_storage) == images
    assert verify(s3_storage) == []
