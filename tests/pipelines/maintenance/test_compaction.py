"""Compaction: shards lose what no row points to, images stay identical, and a crash leaves old or new."""

import io
import tarfile
from itertools import groupby
from pathlib import Path
from threading import Lock

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import webdataset
from encoded import write_encoded
from factories import photo_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import images_in, keep_rows, rows_in

from orchestration.cli import main
from pipelines.dataset.errors import ShardCorrupt, SnapshotError
from pipelines.dataset.layout import LATENTS_SCHEMA, latents_table, pairs_table, text_table
from pipelines.dataset.shard import write_shard
from pipelines.dataset.storage import Storage
from pipelines.encode.plan import latent_units
from pipelines.maintenance import compact as compaction
from pipelines.maintenance.compact import compact
from pipelines.maintenance.occupancy import pair_shards, runs
from pipelines.maintenance.remove import Condition, remove
from pipelines.maintenance.verify import verify

FINGERPRINT = "c" * 32


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "storage"))
    keep_rows(storage, tmp_path / "photos.parquet", photo_pairs(40, num_ties=3, num_damaged=4, num_prompts=12))
    return storage


def shards_in(storage: Storage) -> set[str]:
    return {row["shard"] for row in rows_in(storage) if row["shard"]}


def members(storage: Storage, shard: str) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(storage.read(shard)), mode="r:") as tar:
        return tar.getnames()


def keys_in_shards(storage: Storage) -> set[str]:
    return {name.split(".")[0] for shard in shards_in(storage) for name in members(storage, shard)}


def write_latents(storage: Storage, work: Path) -> None:
    """Latents of every kept pair in one shard; their bytes are the key."""
    keys = sorted(row["pair_key"] for row in rows_in(storage) if row["status"] == "kept")
    written, num_bytes, sha256 = write_shard(work / "l.tar", [(f"{key}.safetensors", key.encode()) for key in keys])
    name = f"dataset/latents/{FINGERPRINT}/unit.tar"
    storage.upload(name, work / "l.tar")
    rows = [
        {
            "pair_key": key, "status": "kept", "bucket_height": 64, "bucket_width": 64, "unit": "unit", "shard": name,
            "shard_bytes": num_bytes, "shard_sha256": sha256, "offset": member.offset, "length": member.length,
            "sha256": member.sha256,
        }
        for key, member in zip(keys, written, strict=True)
    ]  # fmt: skip
    latents_table(storage, FINGERPRINT).append("unit", pa.Table.from_pylist(rows, schema=LATENTS_SCHEMA))


def run(storage: Storage) -> dict[str, compaction.Compacted]:
    return {done.what: done for done in compact(storage)}


def test_what_ingest_writes_has_no_dead_members(storage: Storage) -> None:
    assert not [shard.name for shard in pair_shards(pairs_table(storage)) if shard.has_dead_members(storage)]
    before = shards_in(storage)
    assert run(storage)["pairs"].num_rewritten == 0
    assert shards_in(storage) == before


@pytest.mark.parametrize("position", ["first", "inner", "last"])
def test_the_bytes_of_a_removed_pair_leave_its_shard_wherever_it_lies(storage: Storage, position: str) -> None:
    shard = min(shards_in(storage))
    keys = list(dict.fromkeys(name.split(".")[0] for name in members(storage, shard)))
    gone = keys[{"first": 0, "inner": 1, "last": -1}[position]]
    remove(storage, [Condition("key", gone)])
    before, others = images_in(storage), shards_in(storage) - {shard}
    done = run(storage)["pairs"]
    assert done.num_rewritten == 1
    assert done.bytes_after <= done.bytes_before
    assert images_in(storage) == before
    assert gone not in keys_in_shards(storage)
    assert keys_in_shards(storage) == set(before)
    assert others < shards_in(storage)
    assert verify(storage) == []


def test_pairs_that_came_before_leave_too(storage: Storage, tmp_path: Path) -> None:
    rows = photo_pairs(40, num_ties=3, num_damaged=4, num_prompts=12)
    new = photo_pairs(6, seed=9)
    keep_rows(storage, tmp_path / "more.parquet", [*new, *rows[:20]], max_shard_bytes=10_000_000)
    assert run(storage)["pairs"].num_rewritten > 0
    assert keys_in_shards(storage) == set(images_in(storage))
    assert verify(storage) == []


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.tuples(st.uuids(), st.integers(1, 5)), max_size=40, unique_by=lambda pair: pair[0]))
def test_runs_of_a_sorted_column_are_its_groups_in_order(counts: list[tuple[object, int]]) -> None:
    values = sorted(str(name) for name, count in counts for _ in range(count))
    found = [values[start:end] for start, end in runs(pa.chunked_array([values], pa.string()))]
    assert found == [list(group) for _, group in groupby(values)]


def test_a_shard_without_live_pairs_has_no_successor(storage: Storage) -> None:
    shard = min(shards_in(storage))
    for row in [row for row in rows_in(storage) if row["shard"] == shard]:
        remove(storage, [Condition("key", row["pair_key"])])
    before = shards_in(storage)
    run(storage)
    assert shards_in(storage) == before
    assert verify(storage) == []


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its stream to the garbage collector
def test_webdataset_reads_a_compacted_shard(storage: Storage) -> None:
    shard = min(shards_in(storage))
    remove(storage, [Condition("key", members(storage, shard)[0].split(".")[0])])
    before = shards_in(storage)
    run(storage)
    (new,) = shards_in(storage) - before
    samples = list(webdataset.WebDataset(storage.path(new), shardshuffle=False))
    held = [row["pair_key"] for row in rows_in(storage) if row["shard"] == new]
    assert [sample["__key__"] for sample in samples] == held
    assert all({"0.jpg", "1.jpg", "json"} <= set(sample) for sample in samples)


def test_only_places_change_and_only_once(storage: Storage) -> None:
    remove(storage, [Condition("user", "2")])
    before = rows_in(storage)
    run(storage)
    places = ("shard", "shard_bytes", "shard_sha256", "offset_0", "offset_1")
    for old, new in zip(before, rows_in(storage), strict=True):
        assert {**old, **dict.fromkeys(places)} == {**new, **dict.fromkeys(places)}
    version, shards = pairs_table(storage).version, shards_in(storage)
    assert run(storage)["pairs"].num_rewritten == 0
    assert pairs_table(storage).version == version
    assert shards_in(storage) == shards


def test_committed_units_stay_committed_and_small_files_become_one(storage: Storage, tmp_path: Path) -> None:
    units = sorted({row["unit"] for row in rows_in(storage)})
    done = run(storage)["pairs"]
    assert done.files_before == len(units) > done.files_after == 1
    assert pairs_table(storage).uncommitted(units) == []
    assert keep_rows(storage, tmp_path / "new.parquet", photo_pairs(8, seed=3)) == 1


class Crash(Exception):
    """Stands for SIGKILL at this moment."""


@pytest.mark.parametrize("moment", ["before the upload", "after one upload", "before the commit", "after the commit"])
def test_a_crash_leaves_old_or_new_and_the_next_run_ends_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    remove(storage, [Condition("user", "2")])
    before, names = images_in(storage), []
    upload, one_at_a_time = Storage.upload, Lock()

    def dying_upload(self: Storage, name: str, file: Path) -> None:
        with one_at_a_time:
            if moment == "before the upload" or (moment == "after one upload" and names):
                raise Crash
            upload(self, name, file)
            names.append(name)

    def dead(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "upload", dying_upload)
        if moment.endswith("commit"):
            patch.setattr(compaction, "_commit" if moment.startswith("before") else "_report", dead)
        with pytest.raises(Crash):
            run(storage)
    assert images_in(storage) == before
    assert verify(storage) == []
    run(storage)
    assert images_in(storage) == before
    assert keys_in_shards(storage) == set(before)
    assert verify(storage) == []


@pytest.mark.parametrize("kind", ["ingest", "removal"])
def test_what_is_committed_meanwhile_is_neither_lost_nor_broken(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    remove(storage, [Condition("user", "2")])
    commit, key = compaction._commit, next(row["pair_key"] for row in rows_in(storage) if row["status"] == "kept")

    def outrun(*arguments: object) -> None:
        if kind == "removal":
            remove(storage, [Condition("key", key)])
        else:
            keep_rows(storage, tmp_path / "meanwhile.parquet", photo_pairs(8, seed=5))
        commit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(compaction, "_commit", outrun)
    run(storage)
    assert verify(storage) == []
    rows = rows_in(storage)
    assert len(rows) == (48 if kind == "ingest" else 40)
    assert (key in images_in(storage)) == (kind == "ingest")


def test_a_damaged_shard_is_not_given_a_new_digest(storage: Storage) -> None:
    shard = min(shards_in(storage))
    remove(storage, [Condition("key", members(storage, shard)[0].split(".")[0])])
    data = bytearray(storage.read(shard))
    data[-20_000] ^= 1
    storage.write(shard, bytes(data))
    before = rows_in(storage)
    with pytest.raises(ShardCorrupt, match="was committed"):
        run(storage)
    assert rows_in(storage) == before


def test_latents_of_removed_pairs_leave_and_no_other_is_made_again(storage: Storage, tmp_path: Path) -> None:
    write_latents(storage, tmp_path)
    keys = [row["pair_key"] for row in rows_in(storage) if row["status"] == "kept"]
    remove(storage, [Condition("key", keys[1])])
    done = run(storage)[f"latents {FINGERPRINT}"]
    assert (done.num_rewritten, done.rows_deleted) == (1, 1)
    rows = latents_table(storage, FINGERPRINT).read().to_pylist()
    assert sorted(row["pair_key"] for row in rows) == sorted({*keys} - {keys[1]})
    for row in rows:
        place = (row["shard"], row["offset"], row["length"], row["sha256"])
        assert storage.read_range(*place) == row["pair_key"].encode()
        assert keys[1] not in str(storage.read(row["shard"]))
    assert verify(storage) == []
    kept = pairs_table(storage).read(where=pc.field("status") == "kept")
    assert latent_units(kept, storage, FINGERPRINT) == []


def test_embeddings_go_with_the_last_pair_of_their_prompt(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    snapshot = write_encoded(storage, tmp_path)
    table = text_table(storage, snapshot.text_fingerprint)
    num_prompts = table.count_rows()
    rows = [row for row in rows_in(storage) if row["prompt"] == "prompt 1"]
    remove(storage, [Condition("key", rows[0]["pair_key"])])
    run(storage)
    assert table.count_rows() == num_prompts
    remove(storage, [Condition("prompt", "prompt 1")])
    run(storage)
    assert table.count_rows() == num_prompts - 1
    assert rows[0]["prompt_id"] not in table.read(["prompt_id"])["prompt_id"].to_pylist()
    assert verify(storage) == []


def test_all_pairs_may_go(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    snapshot = write_encoded(storage, tmp_path)
    remove(storage, [Condition("source", "test")])
    run(storage)
    assert latents_table(storage, snapshot.latents_fingerprint).count_rows() == 0
    assert text_table(storage, snapshot.text_fingerprint).count_rows() == 1  # the null conditioning
    assert verify(storage) == []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_on_a_cluster_it_does_the_same(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    remove(storage, [Condition("user", "2")])
    before = images_in(storage)
    assert main(["data", "compact", storage.url]) == 0
    assert " shards rewritten, " in capsys.readouterr().out
    assert images_in(storage) == before
    assert keys_in_shards(storage) == set(before)
    assert main(["data", "verify", storage.url]) == 0
    storage.delete(min(shards_in(storage)))
    assert main(["data", "verify", storage.url]) == 1
    assert ": missing, with " in capsys.readouterr().out


def test_no_data_set_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SnapshotError):
        run(Storage(str(tmp_path)))
    for command in ("compact", "gc", "history"):
        assert main(["data", command, str(tmp_path)]) == 1
        assert "there is no data set at " in capsys.readouterr().err
