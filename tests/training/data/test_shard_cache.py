"""The shard cache: whole shards or none, never more than allowed, and nothing that goes wrong in it stops a step."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from encoded import write_encoded
from filelock import FileLock
from s3_faults import Fault, faulty_proxy

from pipelines.dataset import storage as storage_module
from pipelines.dataset.errors import ConfigError, ShardCorrupt
from pipelines.dataset.storage import Storage
from training.data import shard_cache as cache_module
from training.data.index import Location, PairIndex, PairRecord, load_index, load_texts
from training.data.loader import PairLoader, PairReader
from training.data.reader import READS_BESIDE_FETCHES
from training.data.shard_cache import IDLE_S, ShardCache
from training.spec import Snapshot

PLENTY = 1 << 30
NUM_SHARDS = 3


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def snapshot(storage: Storage, tmp_path: Path) -> Snapshot:
    return write_encoded(storage, tmp_path, num_shards=NUM_SHARDS)


@pytest.fixture
def index(storage: Storage, snapshot: Snapshot) -> PairIndex:
    return load_index(storage, snapshot, "train")


@pytest.fixture
def cache(storage: Storage, tmp_path: Path) -> Iterator[ShardCache]:
    with closing(ShardCache(storage, tmp_path / "cache", PLENTY)) as opened:
        yield opened


def one_of_each(index: PairIndex) -> list[PairRecord]:
    """A pair of each shard, by the shard's name."""
    records = {(record := index.pair(0, i)).latents.shard: record for i in range(len(index))}
    assert len(records) == NUM_SHARDS
    return [records[shard] for shard in sorted(records)]


def shards_in(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.tar")}


def member(storage: Storage, where: Location) -> bytes:
    return storage.read_range(where.shard, where.offset, where.length, where.sha256)


def make_idle(folder: Path, *records: PairRecord) -> None:
    """As if these were last used long ago, one after the other."""
    for number, record in enumerate(records):
        used = time.time() - IDLE_S - 1000 + number
        os.utime(folder / f"{record.latents.shard_sha256}.tar", (used, used))


def test_a_fetched_shard_is_read_without_its_storage(storage: Storage, cache: ShardCache, index: PairIndex) -> None:
    record = one_of_each(index)[0]
    wanted = member(storage, record.latents)
    assert cache.fetch(record.latents)
    storage.delete(record.latents.shard)
    assert cache.read(record.latents) == wanted


def test_no_read_waits_for_a_shard(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_allowed = threading.Event()

    class Slow(Storage):
        def read_range(self, name: str, offset: int, length: int, *known: Any) -> bytes:
            if threading.current_thread().name.startswith("shard-fetcher"):
                assert is_allowed.wait(60)
            return super().read_range(name, offset, length, *known)

    slow = Slow(storage.url)
    index = load_index(storage, snapshot, "train")
    records = [index.pair(0, i) for i in range(len(index))]
    with closing(ShardCache(slow, tmp_path / "cache", PLENTY)) as cache:
        reader = PairReader(slow, load_texts(storage, snapshot), cache)
        (_, batch), *_ = PairLoader(reader, [(0, records)])
        assert shards_in(tmp_path / "cache") == set(), "nothing is here yet, and the batch is"
        is_allowed.set()
        cache.wait()
        assert shards_in(tmp_path / "cache") >= {record.latents.shard_sha256 for record in records}
        for name in storage.names("dataset"):
            if name.endswith(".tar"):
                storage.delete(name)
        (_, again), *_ = PairLoader(PairReader(slow, load_texts(storage, snapshot), cache), [(0, records)])
    assert torch.equal(batch.chosen_BCHW, again.chosen_BCHW)
    assert torch.equal(batch.prompt_embeds_BSD, again.prompt_embeds_BSD)


def test_few_ranges_are_read_beside_a_fetch(storage: Storage, snapshot: Snapshot, tmp_path: Path) -> None:
    changed, done = threading.Condition(), threading.Event()
    now = most = 0

    class Counting(Storage):
        def read_range(self, name: str, offset: int, length: int, *known: Any) -> bytes:
            nonlocal now, most
            if threading.current_thread().name.startswith("shard-fetcher"):
                assert done.wait(60)
                return super().read_range(name, offset, length, *known)
            with changed:
                now += 1
                most = max(most, now)
                changed.notify_all()
                assert changed.wait_for(lambda: most >= READS_BESIDE_FETCHES, 60), "so many come at once"
                now -= 1
            return super().read_range(name, offset, length, *known)

    index = load_index(storage, snapshot, "train")
    counting = Counting(storage.url)
    with closing(ShardCache(counting, tmp_path / "cache", PLENTY)) as cache:
        reader = PairReader(counting, load_texts(storage, snapshot), cache, max_text_bytes=0)
        groups = [(i, [index.pair(0, i)]) for i in range(len(index))]
        assert len(list(PairLoader(reader, groups, read_ahead=100))) == 24
        assert most == READS_BESIDE_FETCHES
        done.set()


def flip(data: bytes) -> bytes:
    return bytes(byte ^ 1 for byte in data)


@pytest.mark.parametrize("change", [flip, lambda data: data[:100], lambda data: b""], ids=["flipped", "cut", "empty"])
def test_a_damaged_file_is_fetched_again_and_no_error(
    storage: Storage, cache: ShardCache, index: PairIndex, snapshot: Snapshot, tmp_path: Path, change: Any
) -> None:
    record = one_of_each(index)[0]
    reader = PairReader(storage, load_texts(storage, snapshot), cache)
    wanted = reader.read([record]).chosen_BCHW
    cache.wait()
    file = tmp_path / "cache" / f"{record.latents.shard_sha256}.tar"
    whole = file.read_bytes()
    file.write_bytes(change(whole))
    assert torch.equal(reader.read([record]).chosen_BCHW, wanted)
    cache.wait()
    assert file.read_bytes() == whole
    assert cache.read(record.latents) == member(storage, record.latents)


def test_a_file_that_goes_while_the_folder_is_listed_stops_no_fetch(
    storage: Storage, cache: ShardCache, index: PairIndex, tmp_path: Path
) -> None:
    (tmp_path / "cache" / f"{'f' * 64}.part").symlink_to(tmp_path / "renamed meanwhile")
    assert cache.fetch(one_of_each(index)[0].latents)


def test_the_least_recently_used_shard_makes_room(storage: Storage, index: PairIndex, tmp_path: Path) -> None:
    first, second, third = one_of_each(index)
    folder, sizes = tmp_path / "cache", [record.latents.shard_bytes for record in (first, second, third)]
    (folder / "locks").mkdir(parents=True)
    (folder / "notes.txt").write_bytes(bytes(10 * sum(sizes)))
    with closing(ShardCache(storage, folder, sum(sizes[:2]))) as cache:
        assert cache.fetch(first.latents)
        assert cache.fetch(second.latents)
        make_idle(folder, second, first)
        assert cache.fetch(third.latents)
        assert shards_in(folder) == {first.latents.shard_sha256, third.latents.shard_sha256}
        assert sum(file.stat().st_size for file in folder.glob("*.tar")) <= sum(sizes[:2])
        assert cache.read(second.latents) is None, "it is read by range"
    assert (folder / "notes.txt").exists(), "what is not the cache's own is left alone"


def test_a_use_keeps_a_shard(storage: Storage, index: PairIndex, tmp_path: Path) -> None:
    first, second, third = one_of_each(index)
    folder = tmp_path / "cache"
    with closing(ShardCache(storage, folder, first.latents.shard_bytes + second.latents.shard_bytes)) as cache:
        assert cache.fetch(first.latents)
        assert cache.fetch(second.latents)
        make_idle(folder, first, second)
        assert cache.read(first.latents)
        assert cache.fetch(third.latents)
        assert shards_in(folder) == {first.latents.shard_sha256, third.latents.shard_sha256}


def test_shards_in_use_do_not_chase_each_other_out(
    storage: Storage, snapshot: Snapshot, index: PairIndex, tmp_path: Path
) -> None:
    first, second, third = one_of_each(index)
    folder = tmp_path / "cache"
    with closing(ShardCache(storage, folder, first.latents.shard_bytes + second.latents.shard_bytes)) as cache:
        assert cache.fetch(first.latents)
        assert cache.fetch(second.latents)
        assert not cache.fetch(third.latents)
        batch = PairReader(storage, load_texts(storage, snapshot), cache).read([first, second, third])
        cache.wait()
        assert [record.pair_key for record in batch.records] == [r.pair_key for r in (first, second, third)]
        assert shards_in(folder) == {first.latents.shard_sha256, second.latents.shard_sha256}


def test_a_shard_that_never_fits_is_not_fetched(storage: Storage, index: PairIndex, tmp_path: Path) -> None:
    where = index.pair(0, 0).latents
    with closing(ShardCache(storage, tmp_path / "cache", where.shard_bytes - 1)) as cache:
        assert cache.read(where) is None
        cache.wait()
        assert not cache.fetch(where)
    assert shards_in(tmp_path / "cache") == set()


def test_what_a_killed_process_left_makes_room(storage: Storage, index: PairIndex, tmp_path: Path) -> None:
    first, second, _ = one_of_each(index)
    folder = tmp_path / "cache"
    with closing(ShardCache(storage, folder, first.latents.shard_bytes)) as cache:
        for left in (first, second):  # of the shard itself, and of another
            (folder / f"{left.latents.shard_sha256}.part").write_bytes(bytes(left.latents.shard_bytes))
        assert cache.fetch(first.latents)
    assert shards_in(folder) == {first.latents.shard_sha256}
    assert not list(folder.glob("*.part"))


def test_what_another_process_fetches_is_left_to_it(storage: Storage, index: PairIndex, tmp_path: Path) -> None:
    first, second, _ = one_of_each(index)
    folder = tmp_path / "cache"
    with closing(ShardCache(storage, folder, first.latents.shard_bytes)) as cache:
        part = folder / f"{first.latents.shard_sha256}.part"
        part.write_bytes(bytes(first.latents.shard_bytes))
        with FileLock(folder / "locks" / f"{first.latents.shard_sha256}.lock"):
            assert not cache.fetch(first.latents), "it is being fetched"
            assert not cache.fetch(second.latents), "the room is taken"
            assert part.exists()


def test_a_shard_damaged_at_its_source_is_not_kept_and_its_whole_samples_are_read(
    storage: Storage, snapshot: Snapshot, index: PairIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)
    good, bad = [record for i in range(24) if (record := index.pair(0, i)).latents.shard.endswith("unit.tar")][:2]
    file = Path(storage.path(bad.latents.shard))
    data = bytearray(file.read_bytes())
    data[bad.latents.offset] ^= 1
    file.write_bytes(bytes(data))
    with closing(ShardCache(storage, tmp_path / "cache", PLENTY)) as cache:
        reader = PairReader(storage, load_texts(storage, snapshot), cache)
        reader.read([good])
        cache.wait()
        with pytest.raises(ShardCorrupt, match=bad.pair_key):
            reader.read([bad])
        cache.wait()
        assert good.latents.shard_sha256 not in shards_in(tmp_path / "cache")
        with pytest.raises(ShardCorrupt, match=r"unit.tar does not match its digest"):
            cache.fetch(good.latents)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_full_disk_is_no_error(
    storage: Storage, snapshot: Snapshot, index: PairIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "posix_fallocate", full)
    with closing(ShardCache(storage, tmp_path / "cache", PLENTY)) as cache:
        reader = PairReader(storage, load_texts(storage, snapshot), cache)
        assert len(reader.read(one_of_each(index)).records) == NUM_SHARDS
        cache.wait()
    assert not list((tmp_path / "cache").glob("*.*"))


def test_a_folder_that_cannot_be_written_is_named_with_a_way_out(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"cannot write to the shard cache {tmp_path}/file/cache(.|\n)*cache_dir"):
        ShardCache(storage, tmp_path / "file" / "cache", PLENTY)


FETCH_ALL = """
import sys
from pipelines.dataset.storage import Storage
from training.data.index import load_index
from training.data.shard_cache import ShardCache
from training.spec import Snapshot
url, folder, *snapshot = sys.argv[1:]
storage, snapshot = Storage(url), Snapshot(*(int(s) if s.isdigit() else s for s in snapshot))
index, cache = load_index(storage, snapshot, "train"), ShardCache(storage, folder, 1 << 30)
print("ready", flush=True)
sys.stdin.readline()
for i in range(len(index)):
    cache.read(index.pair(0, i).latents)
cache.wait()
"""


def test_processes_of_a_node_fetch_each_shard_once_through_any_fault(
    s3_storage: Storage, s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = write_encoded(s3_storage, tmp_path, num_shards=NUM_SHARDS, sides=(64,))
    index, folder = load_index(s3_storage, snapshot, "train"), tmp_path / "cache"
    with faulty_proxy(s3_server["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        command = [sys.executable, "-c", FETCH_ALL, s3_storage.url, folder, *vars(snapshot).values()]
        processes = [
            subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        proxy.follow(Fault.SLOW_DOWN, Fault.RESET_DOWNLOAD, times=2, max_in_a_row=1, key=".tar")
        for process in processes:
            process.communicate("\n", timeout=400)
        assert [process.returncode for process in processes] == [0, 0]
        downloaded, num_faults = proxy.downloaded, proxy.met.total()
    assert num_faults == 2
    for record in one_of_each(index):
        whole = s3_storage.read(record.latents.shard)
        assert (folder / f"{record.latents.shard_sha256}.tar").read_bytes() == whole
        times = [count / len(whole) for key, count in downloaded.items() if key.endswith(record.latents.shard)]
        assert sum(times) <= 1 + num_faults, "once, and again after a fault"
