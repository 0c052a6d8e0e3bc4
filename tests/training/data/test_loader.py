"""Loading: order kept, labels applied, memory bounded, damage named."""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from encoded import write_encoded
from s3_faults import Fault, faulty_proxy

from pipelines.dataset import storage as storage_module
from pipelines.dataset.errors import ShardCorrupt, SnapshotError
from pipelines.dataset.storage import Storage
from training.data import loader as loader_module
from training.data.batch import BatchRows
from training.data.index import PairIndex, PairRecord, load_index, load_texts
from training.data.loader import NUM_READERS, READ_AHEAD, PairLoader, PairReader
from training.data.order import Plan
from training.data.tensors import layout_of
from training.spec import Snapshot

DOWNLOAD_FAULTS = (Fault.SLOW_DOWN, Fault.RESET_DOWNLOAD, Fault.CUT_DOWNLOAD, Fault.SHORT_DOWNLOAD)


@pytest.fixture
def encoded(tmp_path: Path) -> tuple[Storage, Snapshot]:
    storage = Storage(str(tmp_path / "storage"))
    return storage, write_encoded(storage, tmp_path)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)


def opened(storage: Storage, snapshot: Snapshot) -> tuple[PairIndex, PairReader]:
    return load_index(storage, snapshot, "train"), PairReader(storage, load_texts(storage, snapshot))


def groups_of(index: PairIndex, number: int, size: int = 2) -> Iterator[tuple[int, list[PairRecord]]]:
    for i in range(number):
        yield i, [index.pair(0, (size * i + j) % len(index)) for j in range(size)]


def damage(storage: Storage, record: PairRecord) -> None:
    file = Path(storage.path(record.latents.shard))
    data = bytearray(file.read_bytes())
    data[record.latents.offset + record.latents.length - 1] ^= 1
    file.write_bytes(bytes(data))


def test_the_chosen_side_follows_the_label(encoded: tuple[Storage, Snapshot]) -> None:
    index, reader = opened(*encoded)
    records = [index.pair(0, i) for i in range(len(index))]
    assert {record.chosen for record in records} == {0, 1}, "both sides must occur"
    batch = reader.read(records)
    assert (batch.chosen_BCHW.mean((1, 2, 3)) > 0.5).all(), "the factory makes chosen latents near +1"
    assert (batch.rejected_BCHW.mean((1, 2, 3)) < -0.5).all()
    assert batch.preference_B.tolist() == [1.0] * 24


def test_a_batch_knows_how_sure_its_labels_are(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    index, reader = opened(storage, write_encoded(storage, tmp_path, labels=(0.0, 0.2, 0.5, 0.7)))
    batch = reader.read([index.pair(0, i) for i in range(len(index))])
    assert batch.preference_B.dtype == torch.float32
    wanted = {0.0: 1.0, 0.2: 0.8, 0.5: 0.5, 0.7: 0.7}
    torch.testing.assert_close(batch.preference_B, torch.tensor([wanted[r.label_0] for r in batch.records]))
    assert (batch.chosen_BCHW.mean((1, 2, 3)) > 0.5).all(), "image 0 is chosen in a tie"


def test_batches_come_in_order_and_whole_however_far_ahead_is_read(encoded: tuple[Storage, Snapshot]) -> None:
    index, reader = opened(*encoded)
    groups = list(groups_of(index, 3 * READ_AHEAD))
    for read_ahead in (1, READ_AHEAD, 100):
        seen = list(PairLoader(reader, groups, read_ahead=read_ahead))
        assert [(tag, batch.records) for tag, batch in seen] == groups
        for (_, batch), (_, records) in zip(seen, groups, strict=True):
            alone = reader.read(records)
            assert all(torch.equal(getattr(batch, name), value) for name, value in tensors_of(alone).items())


def tensors_of(batch: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("read_ahead", [1, READ_AHEAD])
def test_reading_ahead_is_bounded(encoded: tuple[Storage, Snapshot], read_ahead: int) -> None:
    index, reader = opened(*encoded)
    asked = []

    def groups() -> Iterator[tuple[int, list[PairRecord]]]:
        for i, records in groups_of(index, 100):
            asked.append(i)
            yield i, records

    batches = iter(PairLoader(reader, groups(), read_ahead=read_ahead))
    next(batches)
    assert len(asked) == read_ahead + 1
    batches.close()  # type: ignore[attr-defined]


def test_no_batch_outlives_its_use(encoded: tuple[Storage, Snapshot], monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[BatchRows] = weakref.WeakSet()
    create = BatchRows.__init__

    def counted(self: BatchRows, records: Sequence[PairRecord]) -> None:
        create(self, records)
        alive.add(self)

    monkeypatch.setattr(BatchRows, "__init__", counted)
    index, reader = opened(*encoded)
    most, batches = 0, iter(PairLoader(reader, groups_of(index, 400)))
    for _ in batches:
        most = max(most, len(alive))
    assert most <= READ_AHEAD + 1 + NUM_READERS, "what is ahead, what is out, and what a thread is about to put down"


def test_prompts_in_memory_are_bounded(encoded: tuple[Storage, Snapshot]) -> None:
    storage, snapshot = encoded
    texts = load_texts(storage, snapshot)
    index = load_index(storage, snapshot, "train")
    records = [index.pair(0, i) for i in range(len(index))]
    num_prompts = len({record.prompt_id for record in records})
    lengths = {texts[record.prompt_id].length for record in records}

    class Counting(Storage):
        def read_range(self, name: str, *place: Any) -> bytes:
            read.append(name)
            return super().read_range(name, *place)

    for kept, most in ((num_prompts, num_prompts), (1, 24), (0, 24)):
        read: list[str] = []
        reader = PairReader(Counting(storage.url), texts, max_text_bytes=kept * max(lengths))
        for record in records * 2:
            reader.read([record])
        num_texts = sum("/text/" in name for name in read)
        assert num_texts == most if kept == num_prompts else num_texts > most


@pytest.mark.usefixtures("no_waiting")
def test_a_damaged_sample_is_named_with_its_place_and_origin(encoded: tuple[Storage, Snapshot]) -> None:
    storage, snapshot = encoded
    index, reader = opened(storage, snapshot)
    record = index.pair(0, 3)
    damage(storage, record)
    with pytest.raises(ShardCorrupt) as caught:
        reader.read([record])
    message = str(caught.value)
    assert record.pair_key in message
    assert record.latents.shard in message
    assert f"at {record.latents.offset}" in message
    assert record.origin in message
    assert "hint:" in message
    reader.read([index.pair(0, 4)])


@pytest.mark.usefixtures("no_waiting")
def test_an_error_waits_until_its_batch_is_due(encoded: tuple[Storage, Snapshot]) -> None:
    storage, snapshot = encoded
    index, reader = opened(storage, snapshot)
    for element in (10, 11):
        damage(storage, index.pair(0, element))
    batches = iter(PairLoader(reader, groups_of(index, 8)))
    assert [next(batches)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ShardCorrupt, match=index.pair(0, 10).pair_key):
        next(batches)


def test_a_prompt_without_embedding_is_named_by_its_pair(encoded: tuple[Storage, Snapshot]) -> None:
    storage, snapshot = encoded
    index = load_index(storage, snapshot, "train")
    record = index.pair(0, 0)
    texts = load_texts(storage, snapshot)
    del texts[record.prompt_id]
    with pytest.raises(ShardCorrupt, match=rf"cannot read pair {record.pair_key}.*there is no '{record.prompt_id}'"):
        PairReader(storage, texts).read([record])


def test_a_pair_without_latents_is_refused_by_number_and_fingerprint(encoded: tuple[Storage, Snapshot]) -> None:
    storage, snapshot = encoded
    with pytest.raises(SnapshotError):
        load_index(storage, replace(snapshot, latents_fingerprint="f" * 32, latents_version=0), "train")


def test_the_null_conditioning_is_what_was_stored_for_it(encoded: tuple[Storage, Snapshot]) -> None:
    _, reader = opened(*encoded)
    embeds, pooled = reader.null_conditioning
    assert embeds.shape == (77, 32)
    assert pooled is not None
    assert not embeds.any()
    assert not pooled.any()
    assert reader.null_conditioning[0] is embeds, "it is read once"


def test_a_base_without_pooled_embeddings_has_none(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    index, reader = opened(storage, write_encoded(storage, tmp_path, pooled=False))
    (_, batch), *_ = PairLoader(reader, groups_of(index, 2))
    assert batch.pooled_BP is None
    assert batch.prompt_embeds_BSD.shape == (2, 77, 32)
    assert reader.null_conditioning[1] is None


def test_a_batch_is_never_filled_in_part(encoded: tuple[Storage, Snapshot]) -> None:
    storage, snapshot = encoded
    index, _ = opened(storage, snapshot)
    records = [index.pair(0, i) for i in range(2)]
    data = safetensors.torch.save({"pooled": torch.ones(3), "long": torch.ones(4)})
    parts = layout_of(data).parts
    rows = BatchRows(records)
    rows.write("pooled_BP", 0, data, parts["pooled"])
    for name in ("chosen_BCHW", "rejected_BCHW", "prompt_embeds_BSD"):
        for row in (0, 1):
            rows.write(name, row, data, parts["long"])
    with pytest.raises(ShardCorrupt, match=f"pair {records[1].pair_key} from {records[1].origin} has no pooled_BP"):
        rows.finish()
    with pytest.raises(ValueError, match=r"pooled_BP is float32 \[4\], but float32 \[3\] in the rest"):
        rows.write("pooled_BP", 1, data, parts["long"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_types_and_bits_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    storage = Storage(str(tmp_path / "storage"))
    index, reader = opened(storage, write_encoded(storage, tmp_path, dtype=dtype))
    records = [index.pair(0, 0), index.pair(0, 1)]
    (_, batch), *_ = PairLoader(reader, [(0, records)])
    assert batch.chosen_BCHW.dtype == batch.prompt_embeds_BSD.dtype == dtype
    assert batch.chosen_time_ids_B6.tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    for row, record in enumerate(records):
        where = record.latents
        loaded = safetensors.torch.load(storage.read_range(where.shard, where.offset, where.length))
        assert torch.equal(batch.chosen_BCHW[row], loaded[f"latents_{record.chosen}"])
        assert torch.equal(batch.rejected_BCHW[row], loaded[f"latents_{1 - record.chosen}"])


def test_what_is_no_safetensors_file_is_an_error() -> None:
    good = safetensors.torch.save({"a": torch.ones(4)}, {"key": "value"})
    assert layout_of(good).metadata == {"key": "value"}
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}).encode()
    for bad, says in (
        (good[:-1], "its tensors end at byte"),
        (safetensors.torch.save({"a": torch.ones(4, dtype=torch.int64)}), "a has type I64"),
        (len(header).to_bytes(8, "little") + header + bytes(12), "lies at 0 to 12"),
        (b"", "Expecting value"),
    ):
        with pytest.raises(ValueError, match=says):
            layout_of(bad)


def test_buckets_are_never_mixed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    index, reader = opened(storage, write_encoded(storage, tmp_path, sides=(8, 12, 16)))
    assert index.buckets == [(64, 64), (96, 96), (128, 128)]
    assert sum(index.bucket_sizes) == len(index) == 24
    for bucket, (side, _) in enumerate(index.buckets):
        batch = reader.read([index.pair(bucket, i) for i in range(index.bucket_sizes[bucket])])
        assert batch.chosen_BCHW.shape[1:] == (4, side // 8, side // 8)
    with pytest.raises(ShardCorrupt, match=r"is float16 \[4, 12, 12\], but float16 \[4, 8, 8\] in the rest"):
        reader.read([index.pair(0, 0), index.pair(1, 0)])


def test_only_the_time_in_next_counts_as_waited(
    encoded: tuple[Storage, Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, reader = opened(*encoded)
    clock = 0.0

    def groups() -> Iterator[tuple[int, list[PairRecord]]]:
        nonlocal clock
        for group in groups_of(index, 10):
            clock += 2  # in `next`
            yield group

    monkeypatch.setattr(loader_module, "time", SimpleNamespace(monotonic=lambda: clock))
    loader = PairLoader(reader, groups(), read_ahead=3)
    waited = []
    for _ in loader:
        clock += 100  # in the step
        waited.append(loader.waited_s)
    assert waited == [8, 10, 12, 14, 16, 18, 20, 20, 20, 20]


def test_a_loader_that_is_left_stops_its_threads(encoded: tuple[Storage, Snapshot]) -> None:
    index, reader = opened(*encoded)
    before = set(threading.enumerate())
    batches = iter(PairLoader(reader, groups_of(index, 100)))
    next(batches)
    mine = set(threading.enumerate()) - before
    assert len(mine) == NUM_READERS
    batches.close()  # type: ignore[attr-defined]
    for thread in mine:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in mine)


LEAVE_IN_THE_MIDDLE = """
import sys
from pipelines.dataset.storage import Storage
from training.data.index import load_index, load_texts
from training.data.loader import PairLoader, PairReader
from training.spec import Snapshot
url, *snapshot = sys.argv[1:]
storage, snapshot = Storage(url), Snapshot(*(int(s) if s.isdigit() else s for s in snapshot))
index, reader = load_index(storage, snapshot, "train"), PairReader(storage, load_texts(storage, snapshot))
groups = ((i, [index.pair(0, j % len(index)) for j in range(64)]) for i in range(1000))
batches = iter(PairLoader(reader, groups, read_ahead=500))
print(next(batches)[0])
"""


def test_a_process_may_end_in_the_middle_of_a_read(encoded: tuple[Storage, Snapshot]) -> None:
    storage, snapshot = encoded
    command = [sys.executable, "-c", LEAVE_IN_THE_MIDDLE, storage.url, *map(str, vars(snapshot).values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_to_resume_is_to_ask_for_the_next_step(encoded: tuple[Storage, Snapshot]) -> None:
    index, reader = opened(*encoded)
    plan = Plan(index.bucket_sizes, micro_batch_size=2, global_batch_size=4, seed=0)
    asked = []

    def groups(first: int, last: int) -> Iterator[tuple[int, list[PairRecord]]]:
        for step in range(first, last):
            for slot in range(plan.num_slots):
                group = plan.group(step, slot)
                asked.append(step)
                yield step, [index.pair(group.bucket, int(element)) for element in group.elements]

    whole = [(step, batch.records) for step, batch in PairLoader(reader, groups(0, 30))]
    assert [(step, batch.records) for step, batch in PairLoader(reader, groups(20, 30))] == whole[40:]
    asked.clear()
    next(iter(PairLoader(reader, groups(10_000, 10_100))))
    assert len(asked) == READ_AHEAD + 1, "nothing before the step is planned, read or skipped"


def test_s3_reads_are_retried_and_verified(
    s3_storage: Storage, s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = write_encoded(s3_storage, tmp_path)
    index, reader = opened(s3_storage, snapshot)
    groups = list(groups_of(index, 12))
    wanted = [tensors_of(batch) for _, batch in PairLoader(reader, groups)]
    with faulty_proxy(s3_server["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        type(s3_storage.fs).clear_instance_cache()  # the next one connects to where the environment points now
        broken = Storage(s3_storage.url)
        proxy.follow(*DOWNLOAD_FAULTS, times=24, ratio=0.5, max_in_a_row=2, key=".tar", silent_key=".tar")
        batches = list(PairLoader(PairReader(broken, load_texts(broken, snapshot)), groups))
        assert all(proxy.met[fault] for fault in DOWNLOAD_FAULTS), proxy.met
    assert [tag for tag, _ in batches] == list(range(12))
    for found, right in zip((tensors_of(batch) for _, batch in batches), wanted, strict=True):
        assert all(torch.equal(found[name], right[name]) for name in right)
