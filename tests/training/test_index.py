"""What a training may take: pairs that were kept, encoded, and whose prompt was embedded; all else is named."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from encoded import write_encoded

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import TEXT_SCHEMA, latents_table, text_table
from pipelines.dataset.pair import Reason, Status, prompt_id
from pipelines.dataset.storage import Storage
from training.index import load_index, load_texts
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
