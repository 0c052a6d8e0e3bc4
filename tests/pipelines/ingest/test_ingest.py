"""Ingest: every row accounted for, bytes untouched, and the same result however often it was interrupted."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from encode_steps import ingest_in_process
from factories import Row, encoded, photo_pairs, picture, write_parquet

from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset.errors import DropBudgetExceeded, SourceError, StorageError
from pipelines.dataset.layout import SHARDS, pairs_table
from pipelines.dataset.pair import prompt_id
from pipelines.dataset.shard import read_shard
from pipelines.dataset.storage import Storage
from pipelines.ingest.committer import Committer
from pipelines.ingest.execution import (
    MAX_UNITS_A_TASK,
    group_units,
    ingest,
    is_up_to_date,
    pending_of,
    plan_units,
    write_unit,
)
from pipelines.ingest.pair_shards import write_units

pytestmark = pytest.mark.usefixtures("ray_cluster")

PHOTOS: dict[str, Any] = {
    "num_rows": 120, "num_ties": 5, "num_damaged": 8, "num_prompts": 40, "sizes": ((160, 120), (120, 160))
}  # fmt: skip

DRIVER = """
import os, signal, sys
import ray
from pipelines.config import IngestConfig
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.ingest.execution import ingest

config, storage = IngestConfig.model_validate_json(sys.argv[1]), Storage(sys.argv[2])
options, moment, commits = eval(sys.argv[3]), sys.argv[4], int(sys.argv[5])
commit, done = Table._commit, []

def killed_beside_a_commit(table, unit, *more, **options):
    if moment == "before" and len(done) == commits:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(table, unit, *more, **options)
    done.append(unit)
    if moment == "after" and len(done) == commits:
        os.kill(os.getpid(), signal.SIGKILL)

Table._commit = killed_beside_a_commit
ray.init(**{"address": "local", **options}, log_to_driver=False, logging_level="ERROR")
print("ready", flush=True)
ingest(config, storage)
"""


def config_of(*paths: Path, **settings: Any) -> IngestConfig:
    sources = tuple(SourceConfig(format="pickapic", path=str(path)) for path in paths)
    return IngestConfig(sources=sources, **{"max_shard_bytes": 65_536, "max_drop_ratio": 1.0, **settings})


def rows_in(storage: Storage) -> list[Row]:
    rows = pairs_table(storage).read().to_pylist()
    return sorted(rows, key=lambda row: (row["source_uri"], row["source_row"]))


def shards_in(storage: Storage) -> dict[str, str]:
    return {name: hashlib.sha256(storage.read(name)).hexdigest() for name in storage.names(SHARDS)}


def status_of(storage: Storage) -> list[tuple[str, str | None]]:
    return [(row["status"], row["reason"]) for row in rows_in(storage)]


def hollow(parquet: bytes) -> bytes:
    """A parquet file whose footer is whole and whose pages are not."""
    footer = int.from_bytes(parquet[-8:-4], "little") + 8
    return b"PAR1" + bytes(len(parquet) - 4 - footer) + parquet[-footer:]


def start_driver(
    config: IngestConfig, storage: Storage, *, moment: str = "never", commits: int = 0, **options: Any
) -> "subprocess.Popen[bytes]":
    """`ingest` in a process of its own, that ends itself by SIGKILL before or after so many commits."""
    arguments = [config.model_dump_json(), storage.url, repr(options), moment, str(commits)]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], stdout=subprocess.PIPE)
    assert driver.stdout
    with driver.stdout as output:
        assert output.readline() == b"ready\n"
    return driver


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photos") / "photos.parquet"
    return write_parquet(file, photo_pairs(**PHOTOS), row_group_size=6)


@pytest.fixture(scope="module")
def ingested(photos: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Storage:
    """The photos, read once and not disturbed. Read only."""
    storage = Storage(str(tmp_path_factory.mktemp("ingested")))
    ingest(config_of(photos), storage)
    return storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def test_every_row_is_kept_tie_duplicate_or_quarantined_under_its_own_reason(ingested: Storage) -> None:
    assert Counter(status_of(ingested)) == {
        ("kept", None): 107,
        ("tie", "equal_preference"): 5,
        ("quarantined", "truncated_image"): 2,
        ("quarantined", "not_an_image"): 2,
        ("quarantined", "missing_image"): 2,
        ("quarantined", "missing_prompt"): 2,
    }
    assert [row["source_row"] for row in rows_in(ingested)] == list(range(120))


def test_image_bytes_in_the_tars_are_the_sources_own(ingested: Storage) -> None:
    for row, wanted in zip(rows_in(ingested), photo_pairs(**PHOTOS), strict=True):
        if row["status"] == "quarantined":
            assert row["shard"] is None
            continue
        for side in (0, 1):
            place = row["shard"], row[f"offset_{side}"], row[f"length_{side}"], row[f"image_{side}_sha256"]
            assert ingested.read_range(*place) == wanted[f"jpg_{side}"]
        assert (row["prompt"], row["label_0"]) == (wanted["caption"], wanted["label_0"])
        assert row["user_id"] == str(wanted["user_id"])


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its stream to the garbage collector
def test_webdataset_reads_every_pair_with_its_record(ingested: Storage) -> None:
    by_key = {row["pair_key"]: row for row in rows_in(ingested) if row["shard"]}
    names = [ingested.path(name) for name in ingested.names(SHARDS)]
    samples = list(webdataset.WebDataset(names, shardshuffle=False))
    assert sorted(sample["__key__"] for sample in samples) == sorted(by_key)
    for sample in samples:
        row = by_key[sample["__key__"]]
        assert [hashlib.sha256(sample[f"{side}.jpg"]).hexdigest() for side in (0, 1)] == [
            row["image_0_sha256"], row["image_1_sha256"]
        ]  # fmt: skip
        record = json.loads(sample["json"])
        assert record == {name: row[name] for name in record}


def test_every_shard_has_the_bytes_and_digest_of_its_rows(ingested: Storage) -> None:
    committed = {(row["shard"], row["shard_bytes"], row["shard_sha256"]) for row in rows_in(ingested) if row["shard"]}
    stored = {(name, ingested.size(name), digest) for name, digest in shards_in(ingested).items()}
    assert committed == stored
    assert len(stored) > 3


def test_a_shard_is_closed_at_its_size_within_a_unit(tmp_path: Path, storage: Storage) -> None:
    rows = photo_pairs(40, sizes=((200, 200),))
    ingest_in_process(config_of(write_parquet(tmp_path / "one_group.parquet", rows, row_group_size=100)), storage)
    assert pairs_table(storage).version == 0, "one unit"
    sizes = [storage.size(name) for name in storage.names(SHARDS)]
    assert len(sizes) > 2
    largest_pair = max(len(row["jpg_0"]) + len(row["jpg_1"]) for row in rows)
    assert all(65_536 <= size < 65_536 + largest_pair + 20_480 for size in sizes[:-1])
    keys = [name.split(".")[0] for shard in storage.names(SHARDS) for name, _ in read_shard(storage.read(shard))]
    assert keys == [key for row in rows_in(storage) for key in [row["pair_key"]] * 3], "in source order"


def test_a_pair_that_came_before_is_a_duplicate_wherever_it_was(tmp_path: Path, storage: Storage) -> None:
    first, share = photo_pairs(1)[0], photo_pairs(1, seed=1)[0] | {"label_0": 0.7, "label_1": 0.3}
    label = first["label_0"]

    def swapped(row: Row) -> Row:
        names = {"jpg_0": "jpg_1", "jpg_1": "jpg_0", "label_0": "label_1", "label_1": "label_0"}
        return row | {name: row[other] for name, other in names.items()}

    other = {"label_0": 1 - label, "label_1": label}
    again = [
        (first, "repeated"),
        (swapped(first), "repeated"),
        (first | other, "conflicting_label"),
        (swapped(first) | {"label_0": label, "label_1": 1 - label}, "conflicting_label"),
        (first | {"label_0": 0.5, "label_1": 0.5}, "conflicting_label"),
        (swapped(share), "repeated"),
    ]
    different = [first | {"caption": first["caption"] + " "}, first | {"jpg_1": share["jpg_1"]}]
    rows = [first, share, *different, *(row for row, _ in again)]
    wanted = [("kept", None)] * 4 + [("duplicate", reason) for _, reason in again]
    write_parquet(tmp_path / "a" / "1.parquet", rows, row_group_size=100)  # within a unit
    repeated = [("duplicate", "repeated")] * 4 + wanted[4:]
    write_parquet(tmp_path / "a" / "2.parquet", rows, row_group_size=1)  # across files and units
    ingest_in_process(config_of(tmp_path / "a"), storage)
    assert status_of(storage) == wanted + repeated
    write_parquet(tmp_path / "b" / "1.parquet", rows)  # across runs
    ingest_in_process(config_of(tmp_path / "b"), storage)
    assert status_of(storage) == wanted + repeated + repeated
    assert all((row["shard"] is None) == (row["status"] == "duplicate") for row in rows_in(storage))


def test_reading_again_commits_nothing_and_changes_no_file(photos: Path, storage: Storage) -> None:
    config = config_of(photos)
    ingest(config, storage)

    def state() -> dict[str, int]:
        return {str(f): f.stat().st_mtime_ns for f in Path(storage.path()).rglob("*")}

    before, version = state(), pairs_table(storage).version
    ingest(config, storage)
    assert pending_of(plan_units(config), storage) == []
    assert (state(), pairs_table(storage).version) == (before, version)


def test_of_a_new_file_only_it_is_read(tmp_path: Path, storage: Storage) -> None:
    config = config_of(tmp_path / "data")
    old = write_parquet(tmp_path / "data" / "b.parquet", photo_pairs(12), row_group_size=4)
    ingest_in_process(config, storage)
    before, shards = rows_in(storage), shards_in(storage)
    seen = old.stat()
    old.write_bytes(hollow(old.read_bytes()))  # whoever reads more than its footer fails
    os.utime(old, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    write_parquet(tmp_path / "data" / "a.parquet", photo_pairs(6, seed=1))
    ingest_in_process(config, storage)
    after = rows_in(storage)
    assert (len(after), after[6:]) == (18, before)
    assert shards.items() < shards_in(storage).items()


def test_the_result_is_the_same_with_and_without_ray(photos: Path, ingested: Storage, storage: Storage) -> None:
    committer = Committer(pairs_table(storage))
    for unit in plan_units(config_of(photos)):  # without Ray
        committer.append(unit.id, write_unit(unit, storage))
    assert rows_in(storage) == rows_in(ingested)
    assert shards_in(storage) == shards_in(ingested)


def test_the_shards_are_the_same_whatever_the_order_of_files_and_the_number_of_workers(
    tmp_path: Path, storage: Storage
) -> None:
    files = [tmp_path / "data" / f"{name}.parquet" for name in "abc"]
    for number, file in enumerate(files):
        write_parquet(file, photo_pairs(30, seed=number), row_group_size=5)
    others = Storage(str(tmp_path / "others"))
    with start_driver(config_of(*files), storage, num_cpus=1, include_dashboard=False) as driver:
        assert driver.wait(400) == 0
    ingest(config_of(*reversed(files)), others)
    assert rows_in(others) == rows_in(storage)
    assert shards_in(others) == shards_in(storage)
    assert len(set(shards_in(storage).values())) > 10


@pytest.mark.parametrize(
    ("num_units", "at_once", "wanted"),
    [(0, 3, []), (1, 3, [1]), (5, 3, [1] * 5), (22, 3, [3, 3, 2, 2, 2, *[1] * 10]), (1300, 1500, [1] * 1300)],
)
def test_tasks_are_long_at_first_and_short_at_the_end(num_units: int, at_once: int, wanted: list[int]) -> None:
    tasks = group_units(range(num_units), at_once)
    assert [len(task) for task in tasks] == wanted
    assert [unit for task in tasks for unit in task] == list(range(num_units)), "in order"


def test_no_task_has_more_than_a_lost_worker_may_repeat() -> None:
    assert max(len(task) for task in group_units(range(10_000), 3)) == MAX_UNITS_A_TASK


def test_rows_of_a_unit_are_given_once_its_shards_are_there(photos: Path, storage: Storage) -> None:
    units = plan_units(config_of(photos))
    for rows in write_units(units, storage):
        names = {name for name in rows["shard"].to_pylist() if name}
        assert names <= set(storage.names(SHARDS))


def test_a_failed_upload_is_an_error_and_leaves_nothing_half_written(
    photos: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[str] = []
    upload = Storage.upload

    def failing(self: Storage, name: str, file: Path) -> None:
        if len(uploaded) == 2:
            raise StorageError("the disk is full", "make room")
        uploaded.append(name)
        upload(self, name, file)

    monkeypatch.setattr(Storage, "upload", failing)
    with pytest.raises(StorageError, match="the disk is full"):
        list(write_units(plan_units(config_of(photos)), storage))
    assert sorted(file.name for file in (Path(storage.path()) / SHARDS).iterdir()) == sorted(
        name.rpartition("/")[2] for name in uploaded
    )


def test_killed_again_and_again_it_ends_with_the_same_rows_and_bytes(
    photos: Path, ingested: Storage, storage: Storage
) -> None:
    import ray

    config, chance = config_of(photos), random.Random(0)
    address = {"address": ray.get_runtime_context().gcs_address}
    for moment, commits in (("before", 2), ("after", 1)):
        before = pairs_table(storage).version or -1
        with start_driver(config, storage, moment=moment, commits=commits, **address) as driver:
            assert driver.wait(400) == -signal.SIGKILL
        assert (pairs_table(storage).version or -1) - before == (commits or 0)
        assert shards_in(storage).items() <= shards_in(ingested).items(), "a shard is there whole or not at all"
    folder = Path(storage.path()) / SHARDS
    wanted = len(list(folder.iterdir())) + chance.randrange(1, 5)
    with start_driver(config, storage, **address) as driver:
        while len(list(folder.iterdir())) < wanted:  # shards and what is half written
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert driver.wait(0.002) == "killed", "it was done before it was killed"
        driver.kill()
    assert pending_of(plan_units(config), storage)
    ingest(config, storage)
    assert rows_in(storage) == rows_in(ingested)
    assert shards_in(storage) == shards_in(ingested)


def test_two_runs_at_once_read_every_row_once(photos: Path, ingested: Storage, storage: Storage) -> None:
    import ray

    address = {"address": ray.get_runtime_context().gcs_address}
    drivers = [start_driver(config_of(photos), storage, **address) for _ in range(2)]
    assert [driver.wait(400) for driver in drivers] == [0, 0]
    assert rows_in(storage) == rows_in(ingested)
    assert shards_in(storage) == shards_in(ingested)


def test_more_drops_than_the_budget_stop_it_with_numbers_place_reason_and_way_out(
    tmp_path: Path, storage: Storage
) -> None:
    rows = photo_pairs(40)
    for row in rows[10:20]:
        row["jpg_0"] = row["jpg_0"][:-100]
    file = write_parquet(tmp_path / "photos.parquet", rows, row_group_size=5)
    with pytest.raises(DropBudgetExceeded) as caught:
        ingest(config_of(file, max_drop_ratio=0.1), storage)
    committed = rows_in(storage)
    assert 15 <= len(committed) < 40, "it stopped before the end"
    assert "ingest dropped 5 of 15 rows (33.3%, limit 10.0%)" in caught.value.message
    assert f"5 of them in file://{file}" in caught.value.message
    assert "Most common reason: truncated_image (5)." in caught.value.message
    assert "`ingest.max_drop_ratio`" in str(caught.value.hint)
    ingest(config_of(file, max_drop_ratio=0.25), storage)
    assert rows_in(storage)[: len(committed)] == committed, "nothing was lost"
    assert Counter(status for status, _ in status_of(storage)) == {"kept": 30, "quarantined": 10}


def test_a_bad_file_within_the_budget_of_the_whole_is_read_to_its_end(tmp_path: Path, storage: Storage) -> None:
    good = write_parquet(tmp_path / "good.parquet", photo_pairs(40), row_group_size=10)
    bad = write_parquet(tmp_path / "bad.parquet", photo_pairs(10, seed=1, num_damaged=4), row_group_size=1)
    ingest_in_process(config_of(good, max_drop_ratio=0.1), storage)
    ingest_in_process(config_of(good, bad, max_drop_ratio=0.1), storage)
    assert len(rows_in(storage)) == 50
    assert pending_of(plan_units(config_of(good, bad)), storage) == []


def test_no_prompt_is_in_both_splits_and_the_ratio_is_kept(tmp_path: Path, storage: Storage) -> None:
    image, rng = encoded(picture(np.random.default_rng(0), 16, 16)), random.Random(0)
    row = {"jpg_0": image, "jpg_1": image + b"\0", "label_0": 1.0, "label_1": 0.0, "has_label": True, "user_id": 1}
    rows = [row | {"caption": f"prompt {rng.randrange(300)}", "jpg_1": image + bytes([i % 256])} for i in range(900)]
    ingest_in_process(config_of(write_parquet(tmp_path / "a.parquet", rows), validation_ratio=0.2), storage)
    splits: dict[str, set[str]] = {}
    for found in rows_in(storage):
        assert found["prompt_id"] == prompt_id(found["prompt"])
        splits.setdefault(found["prompt"], set()).add(found["split"])
    assert all(len(both) == 1 for both in splits.values())
    held_out = sum(both == {"validation"} for both in splits.values())
    assert 0.13 < held_out / len(splits) < 0.27  # three standard deviations of 285 prompts
    ingest_in_process(config_of(tmp_path / "a.parquet", validation_ratio=0.0), all_train := storage.child("other"))
    assert {found["split"] for found in rows_in(all_train)} == {"train"}


def test_a_missing_source_is_an_error_before_anything_is_written(tmp_path: Path, storage: Storage) -> None:
    with pytest.raises(SourceError, match=r"no file matches .*missing\.parquet"):
        ingest(config_of(tmp_path / "missing.parquet"), storage)
    assert not Path(storage.path()).exists()


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], hollow],
    ids=["without a footer", "in the middle"],
)
def test_a_damaged_source_is_named_and_what_was_read_before_stays(
    tmp_path: Path, storage: Storage, damage: Callable[[bytes], bytes]
) -> None:
    write_parquet(tmp_path / "data" / "a.parquet", photo_pairs(6))
    bad = write_parquet(tmp_path / "data" / "b.parquet", photo_pairs(12, seed=1), row_group_size=4)
    ingest(config_of(tmp_path / "data" / "a.parquet"), storage)
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(SourceError, match=r"cannot read .*/data/b\.parquet: ") as caught:
        ingest(config_of(tmp_path / "data"), storage)
    assert "copy it again" in str(caught.value.hint)
    assert len(rows_in(storage)) == 6


def test_a_storage_that_cannot_be_written_is_named_before_the_work(photos: Path) -> None:
    with pytest.raises(StorageError, match="cannot write /proc/mapo/"):
        ingest(config_of(photos), Storage("/proc/mapo"))


def test_of_a_file_that_grew_or_changed_only_what_is_new_is_added(tmp_path: Path, storage: Storage) -> None:
    rows = photo_pairs(24, num_damaged=3)
    file = write_parquet(tmp_path / "photos.parquet", rows[:16], row_group_size=4)
    config = config_of(file, max_drop_ratio=1.0)
    ingest_in_process(config, storage)
    before = rows_in(storage)
    changed = rows.copy()
    changed[5] |= {"label_0": 1 - rows[5]["label_0"], "label_1": 1 - rows[5]["label_1"]}
    write_parquet(file, changed, row_group_size=4)
    assert pending_of(plan_units(config), storage), "it is seen as changed"
    ingest_in_process(config, storage)
    found = pairs_table(storage).read().to_pylist()
    assert len(found) == 24 + 1, "eight new rows, and the changed one as it is now"
    assert [row for row in rows_in(storage) if row in before] == before, "what was there stays as it was"
    (again,) = [r for r in found if r["source_row"] == 5 and r["status"] != "kept"]
    assert (again["status"], again["reason"]) == ("duplicate", "conflicting_label")
    file.unlink()
    write_parquet(tmp_path / "other.parquet", photo_pairs(2, seed=9))
    ingest_in_process(config_of(tmp_path / "other.parquet", max_drop_ratio=1.0), storage)
    assert len(rows_in(storage)) == 25 + 2, "a vanished file changes nothing"


def test_a_mended_file_no_longer_counts_against_the_budget(tmp_path: Path, storage: Storage) -> None:
    rows = photo_pairs(20)
    broken = [row | {"jpg_0": row["jpg_0"][:-200]} if i % 2 else row for i, row in enumerate(rows)]
    file = write_parquet(tmp_path / "photos.parquet", broken)
    with pytest.raises(DropBudgetExceeded, match=r"10 of 20 rows"):
        ingest_in_process(config_of(file, max_drop_ratio=0.1), storage)
    write_parquet(file, rows)
    ingest_in_process(config_of(file, max_drop_ratio=0.1), storage)
    assert Counter(status for status, _ in status_of(storage)) == {"kept": 20, "quarantined": 10}


def test_a_changed_policy_is_applied_without_reading_the_sources(tmp_path: Path, storage: Storage) -> None:
    file = write_parquet(tmp_path / "photos.parquet", photo_pairs(20, num_ties=5))
    ingest_in_process(config_of(file), storage)
    shards, seen = shards_in(storage), file.stat()
    file.write_bytes(hollow(file.read_bytes()))  # whoever reads more than its footer fails
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    config = config_of(file, ties="keep", validation_ratio=0.5)
    assert not is_up_to_date(config, storage, plan_units(config))
    ingest_in_process(config, storage)
    assert is_up_to_date(config, storage, plan_units(config))
    assert Counter(status for status, _ in status_of(storage)) == {"kept": 20}
    assert {row["split"] for row in rows_in(storage)} == {"train", "validation"}
    assert shards_in(storage) == shards


def test_a_sources_own_splits_are_followed_and_read_first(tmp_path: Path, storage: Storage) -> None:
    shared = photo_pairs(8, seed=5, num_prompts=4)
    write_parquet(tmp_path / "data" / "train-00000.parquet", [*photo_pairs(6), *shared[:4]])
    write_parquet(tmp_path / "data" / "validation-00000.parquet", shared[4:])
    write_parquet(tmp_path / "data" / "validation_unique-00000.parquet", shared[4:6])
    ingest_in_process(config_of(tmp_path / "data", validation_ratio=0.0), storage)
    found = pairs_table(storage).read().to_pylist()
    held_out = {row["prompt"] for row in found if "validation" in row["source_uri"]}
    for row in found:
        assert row["split"] == ("validation" if row["prompt"] in held_out else "train")
    assert Counter(row["status"] for row in found) == {"kept": 14, "duplicate": 2}


def test_headers_alone_may_be_looked_at(tmp_path: Path, storage: Storage) -> None:
    rows = photo_pairs(4)
    rows[2] |= {"jpg_0": rows[2]["jpg_0"][:-300]}
    file = write_parquet(tmp_path / "photos.parquet", rows)
    ingest_in_process(config_of(file, image_check="header", max_drop_ratio=1.0), storage)
    assert Counter(status for status, _ in status_of(storage)) == {"kept": 4}
