"""What a training may take: pairs that were kept, encoded, and whose prompt was embedded; all else is named."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from encoded import write_encoded

from pipelines.dataset.errors import ShardCorrupt, SnapshotError
from pipelines.dataset.layout import TEXT_SCHEMA, latents_table, pairs_table, text_table
from pipelines.dataset.pair import KINDS, Reason, Status, prompt_id
from pipelines.dataset.storage import Storage
from training.data.index import PairIndex, PairRecord, load_index, load_texts
from training.data.reader import PairReader
from training.spec import Snapshot

OTHER = "c" * 32


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def snapshot(storage: Storage, tmp_path: Path) -> Snapshot:
    """24 pairs of four prompts, six each."""
    return write_encoded(storage, tmp_path)


def with_other_texts(storage: Storage, snapshot: Snapshot, rows: list[dict[str, object]]) -> Snapshot:
    text_table(storage, OTHER).append("unit", pa.Table.from_pylist(rows, TEXT_SCHEMA))
    return replace(snapshot, text_fingerprint=OTHER)


def records_of(index: PairIndex) -> list[PairRecord]:
    return [index.pair(bucket, i) for bucket, size in enumerate(index.bucket_sizes) for i in range(size)]


def test_a_record_says_what_the_tables_say(storage: Storage, tmp_path: Path) -> None:
    snapshot = write_encoded(storage, tmp_path, sides=(8, 16), labels=(0.0, 0.3, 1.0), num_shards=3)
    pairs = {row["pair_key"]: row for row in pairs_table(storage).read().to_pylist()}
    latents = {row["pair_key"]: row for row in latents_table(storage, snapshot.latents_fingerprint).read().to_pylist()}
    index = load_index(storage, snapshot, "train")
    records = records_of(index)
    assert len(records) == len({record.pair_key for record in records}) == 24
    for record in records:
        pair, placed = pairs[record.pair_key], latents[record.pair_key]
        assert (record.prompt_id, record.label_0) == (pair["prompt_id"], pair["label_0"])
        assert record.origin == f"{pair['source_uri']} row {pair['source_row']}"
        assert vars(record.latents) == {name: placed[name] for name in vars(record.latents)}
    texts = {row["prompt_id"]: row for row in text_table(storage, snapshot.text_fingerprint).read().to_pylist()}
    for identity, where in load_texts(storage, snapshot).items():
        assert vars(where) == {name: texts[identity][name] for name in vars(where)}


def test_a_table_from_before_there_was_a_crc_32_has_none_and_the_digest_is_asked(
    storage: Storage, tmp_path: Path
) -> None:
    snapshot = write_encoded(storage, tmp_path, num_train=6)
    for table in (
        latents_table(storage, snapshot.latents_fingerprint), text_table(storage, snapshot.text_fingerprint)
    ):  # fmt: skip
        rows = table.read().drop_columns(["crc32"])
        shutil.rmtree(table.uri)
        write_deltalake(table.uri, rows)
    (record, *_), texts = records_of(load_index(storage, snapshot, "train")), load_texts(storage, snapshot)
    assert record.latents.crc32 is None
    assert all(where.crc32 is None for where in texts.values())
    reader = PairReader(storage, texts)
    assert reader.read([record]).records == [record]
    data = bytearray(storage.read(record.latents.shard))
    data[record.latents.offset + record.latents.length - 1] ^= 1
    storage.write(record.latents.shard, bytes(data))
    with pytest.raises(ShardCorrupt, match=f"differ from their digest {record.latents.sha256[:12]}"):
        reader.read([record])


def test_the_order_follows_from_the_pairs_alone() -> None:
    rng = np.random.default_rng(0)
    rows = pa.table({
        "pair_key": [f"{key:032x}" for key in range(100)], "prompt_id": ["ab" * 16] * 100, "label_0": [1.0] * 100,
        "source_uri": ["u"] * 100, "source_row": range(100), "sha256": ["cd" * 32] * 100, "shard": ["s"] * 100,
        "shard_sha256": ["e"] * 100, "shard_bytes": [9] * 100, "offset": range(100), "length": [1] * 100,
        "crc32": pa.array([None, 7] * 50, pa.int64()),
        "bucket_height": rng.integers(1, 3, 100), "bucket_width": rng.integers(1, 4, 100),
        "kind": rng.integers(0, 3, 100), "weight": rng.choice([0.5, 1.0, 2.0], 100),
    })  # fmt: skip
    pieces = [rows.take(part) for part in np.array_split(rng.permutation(100), 7)]
    index, other = PairIndex(rows), PairIndex(pa.concat_tables(pieces))
    assert index.buckets == other.buckets == sorted(index.buckets)
    places = [(bucket, KINDS.index(kind)) for bucket, kind in zip(index.buckets, index.kinds, strict=True)]
    assert places == sorted(set(places))
    assert index.kinds == other.kinds
    assert index.bucket_sizes == other.bucket_sizes
    assert records_of(index) == records_of(other)


def test_no_pairs_make_an_empty_index(storage: Storage, snapshot: Snapshot) -> None:
    index = load_index(storage, snapshot, "test")
    assert (len(index), index.buckets, index.bucket_sizes) == (0, [], [])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_soft_labels_are_taken_as_they_are_and_a_tie_counts_half(storage: Storage, tmp_path: Path, split: str) -> None:
    labels = (0.0, 0.2, 0.5, 0.7, 1.0)
    snapshot = write_encoded(storage, tmp_path, num_train=25, num_validation=25, labels=labels)
    for chosen_labels in ({}, {"labels": "soft"}):
        records = records_of(load_index(storage, snapshot, split, **chosen_labels))
        assert len(records) == 25
        judged = {record.label_0: (record.chosen, record.preference) for record in records}
        assert judged == {0.0: (1, 1.0), 0.2: (1, 0.8), 0.5: (0, 0.5), 0.7: (0, 0.7), 1.0: (0, 1.0)}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_hard_labels_are_certain_and_ties_are_left_out(storage: Storage, tmp_path: Path, split: str) -> None:
    labels = (0.0, 0.2, 0.5, 0.7, 1.0)
    snapshot = write_encoded(storage, tmp_path, num_train=25, num_validation=25, labels=labels)
    soft: dict[str, Any] = {record.pair_key: record for record in records_of(load_index(storage, snapshot, split))}
    hard = records_of(load_index(storage, snapshot, split, labels="hard"))
    assert {record.pair_key for record in hard} == {key for key, record in soft.items() if record.label_0 != 0.5}
    assert {(record.label_0, record.chosen, record.preference) for record in hard} == {(0.0, 1, 1.0), (1.0, 0, 1.0)}
    assert all(record.chosen == soft[record.pair_key].chosen for record in hard)


def test_pairs_of_a_quarantined_prompt_are_left_out(storage: Storage, snapshot: Snapshot) -> None:
    rows = text_table(storage, snapshot.text_fingerprint).read().to_pylist()
    bad = prompt_id("prompt 1")
    gone = dict.fromkeys(("shard", "shard_bytes", "shard_sha256", "offset", "length", "sha256"))
    quarantined = {"status": str(Status.QUARANTINED), "reason": str(Reason.NON_FINITE)} | gone
    changed = [row | quarantined if row["prompt_id"] == bad else row for row in rows]
    other = with_other_texts(storage, snapshot, changed)
    index, texts = load_index(storage, other, "train"), load_texts(storage, other)
    assert len(load_index(storage, snapshot, "train")) == 24
    assert len(index) == 18
    prompts = {index.pair(0, element).prompt_id for element in range(18)}
    assert bad not in prompts | set(texts)
    assert prompts < set(texts)


def test_a_prompt_that_was_never_embedded_is_an_error_with_its_numbers(storage: Storage, snapshot: Snapshot) -> None:
    rows = text_table(storage, snapshot.text_fingerprint).read().to_pylist()
    other = with_other_texts(storage, snapshot, [row for row in rows if row["prompt_id"] != prompt_id("prompt 1")])
    with pytest.raises(SnapshotError, match=rf"6 of 24 train pairs have no embedding of their prompt .* {OTHER}"):
        load_index(storage, other, "train")


def test_a_pair_that_was_never_encoded_is_an_error_with_its_numbers(storage: Storage, snapshot: Snapshot) -> None:
    rows = latents_table(storage, snapshot.latents_fingerprint).read()
    latents_table(storage, OTHER).append("unit", rows.slice(0, 20))
    other = replace(snapshot, latents_fingerprint=OTHER)
    with pytest.raises(SnapshotError, match=rf"4 of 24 train pairs have no latents under the fingerprint {OTHER}"):
        load_index(storage, other, "train")
