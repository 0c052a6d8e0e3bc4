"""Loading: order kept, labels applied, damage named."""

from pathlib import Path

import pytest
import torch
from encoded import write_encoded

from pipelines.dataset.errors import ShardCorrupt, SnapshotError
from pipelines.dataset.pair import NULL_PROMPT_ID
from pipelines.dataset.storage import Storage
from training.index import PairIndex, load_index, load_texts
from training.loader import GROUPS_AHEAD, Consumed, PairLoader, PairReader
from training.spec import Snapshot


@pytest.fixture
def encoded(tmp_path) -> tuple[Storage, Snapshot]:
    storage = Storage(str(tmp_path / "storage"))
    return storage, write_encoded(storage, tmp_path)


def opened(storage: Storage, snapshot: Snapshot) -> tuple[PairIndex, PairReader]:
    return load_index(storage, snapshot, "train"), PairReader(storage, load_texts(storage, snapshot))


def test_the_chosen_side_follows_the_label(encoded) -> None:
    index, reader = opened(*encoded)
    records = [index.pair(0, i) for i in range(len(index))]
    assert {record.chosen for record in records} == {0, 1}, "both sides must occur"
    for record in records:
        pair = reader.pair(record)
        assert pair.chosen_CHW.mean() > 0.5, "the factory makes chosen latents near +1"
        assert pair.rejected_CHW.mean() < -0.5


def test_batches_come_in_order_and_whole_however_far_ahead_is_read(encoded) -> None:
    index, reader = opened(*encoded)
    groups = [(i, [index.pair(0, (2 * i + j) % len(index)) for j in (0, 1)]) for i in range(3 * GROUPS_AHEAD)]
    seen = list(PairLoader(reader, groups))
    assert [tag for tag, _ in seen] == list(range(3 * GROUPS_AHEAD))
    assert [batch.records for _, batch in seen] == [records for _, records in groups]


def test_reading_ahead_is_bounded(encoded) -> None:
    index, reader = opened(*encoded)
    asked = []

    def groups():
        for i in range(100):
            asked.append(i)
            yield i, [index.pair(0, 0)]

    batches = iter(PairLoader(reader, groups()))
    next(batches)
    assert len(asked) == GROUPS_AHEAD + 1
    batches.close()


def test_a_damaged_sample_is_named_with_its_place_and_origin(encoded) -> None:
    storage, snapshot = encoded
    index, reader = opened(storage, snapshot)
    record = index.pair(0, 3)
    file = Path(storage.path(record.latents.shard))
    data = bytearray(file.read_bytes())
    data[record.latents.offset + record.latents.length - 1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ShardCorrupt) as caught:
        reader.pair(record)
    message = str(caught.value)
    assert record.pair_key in message
    assert record.latents.shard in message
    assert record.origin in message
    assert "hint:" in message
    reader.pair(index.pair(0, 4))


def test_a_pair_without_latents_is_refused_by_number_and_fingerprint(encoded) -> None:
    storage, snapshot = encoded
    other = Snapshot(snapshot.pairs_version, "f" * 32, 0, snapshot.text_fingerprint, snapshot.text_version)
    with pytest.raises(SnapshotError):
        load_index(storage, other, "train")


def test_the_null_conditioning_is_what_was_stored_for_it(encoded) -> None:
    _, reader = opened(*encoded)
    embeds, pooled = reader.null_conditioning
    assert not embeds.any()
    assert not pooled.any()
    assert reader.text(NULL_PROMPT_ID)[0] is embeds, "prompts are cached"


def test_the_account_of_consumed_pairs_depends_on_their_order(encoded) -> None:
    index, reader = opened(*encoded)
    batches = [batch for _, batch in PairLoader(reader, [(i, [index.pair(0, i)]) for i in range(3)])]
    forward, backward = Consumed(), Consumed()
    for batch in batches:
        forward.add(batch)
    for batch in reversed(batches):
        backward.add(batch)
    assert forward.num_pairs == backward.num_pairs == 3
    assert forward.digest != backward.digest


def test_buckets_are_never_mixed(tmp_path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    snapshot = write_encoded(storage, tmp_path, sides=(8, 12, 16))
    index, reader = opened(storage, snapshot)
    assert index.buckets == [(64, 64), (96, 96), (128, 128)]
    assert sum(index.bucket_sizes) == len(index) == 24
    for bucket, (side, _) in enumerate(index.buckets):
        shapes = {tuple(reader.pair(index.pair(bucket, i)).chosen_CHW.shape) for i in range(index.bucket_sizes[bucket])}
        assert shapes == {(4, side // 8, side // 8)}


def test_stored_types_are_kept(encoded) -> None:
    index, reader = opened(*encoded)
    (_, batch), *_ = PairLoader(reader, [(0, [index.pair(0, 0), index.pair(0, 1)])])
    assert batch.chosen_BCHW.dtype == torch.float16
    assert batch.chosen_time_ids_B6.tolist() == [[64, 64, 0, 0, 64, 64]] * 2
