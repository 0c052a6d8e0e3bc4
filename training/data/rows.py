"""The rows of a snapshot that a training learns from: pairs and single images, and where their latents lie."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.pair import JUDGED, KINDS, PAIR, PRIOR, Status, of_kind
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from training.spec import Snapshot

PREFERRED = 0.5  # image_0 is chosen, or a single image is good, where label_0 is this or above

Labels = Literal["soft", "hard"]
PLACE = ["shard", "offset", "length", "sha256", "crc32", "shard_bytes", "shard_sha256"]
REPEATED = {"shard", "shard_sha256", "source_uri"}


@dataclass(frozen=True)
class Selection:
    """The kept rows of a split that a training learns from.

    Args:
        split: train, validation or test.
        labels: soft keeps the stored labels; hard leaves out pairs that are ties.
        kinds: The kinds of rows, of `KINDS`; others are left out.
        only_good: Whether to leave out single images that were judged bad.
    """

    split: str
    labels: Labels = "soft"
    kinds: Sequence[str] = (PAIR,)
    only_good: bool = False

    @property
    def where(self) -> ds.Expression:
        """The condition for the rows of the pairs table."""
        where = (pc.field("status") == str(Status.KEPT)) & (pc.field("split") == self.split) & of_kind(*self.kinds)
        if self.labels == "hard":
            where &= (pc.field("label_0") != PREFERRED) | of_kind(JUDGED, PRIOR)
        if self.only_good:
            where &= (pc.field("label_0") >= PREFERRED) | of_kind(PAIR, PRIOR)
        return where


def kind_numbers(batch: pa.RecordBatch) -> pa.Array:
    """Return the kind of each row as its number in `KINDS`; a row without a kind is a pair."""
    return pc.index_in(pc.fill_null(batch["kind"], PAIR), value_set=pa.array(KINDS)).cast(pa.int8())


def noun_of(kinds: Iterable[str]) -> str:
    """Return what rows of these kinds are called in a message: pairs, images, or both."""
    is_pair = {kind == PAIR for kind in kinds}
    return "pairs and images" if len(is_pair) == 2 else "images" if is_pair == {False} else "pairs"


def joined_rows(storage: Storage, snapshot: Snapshot, selection: Selection) -> pa.Table:
    """Join the selected rows with where their latents lie; rows without kept latents or prompt are left out.

    Args:
        storage: The data set's storage.
        snapshot: The pinned versions.
        selection: The rows.

    Returns:
        Key, prompt, label, `kind` as its number in `KINDS`, weight, origin, bucket and place of each row.

    Raises:
        SnapshotError: A selected row, or its prompt, was never encoded under the run's fingerprints.
    """
    columns = ["pair_key", "prompt_id", "label_0", "kind", "weight", "source_uri", "source_row"]
    rows = _selected(pairs_table(storage, snapshot.pairs_version), columns, selection)
    kinds = [KINDS[number] for number in rows["kind"].unique().to_pylist()]
    what = f"{selection.split} {noun_of(kinds)}"
    latents = latents_table(storage, snapshot.latents_fingerprint, snapshot.latents_version)
    encoded = _encoded(latents.read(["pair_key", "status", "bucket_height", "bucket_width", *PLACE]))
    texts = text_table(storage, snapshot.text_fingerprint, snapshot.text_version).read(["prompt_id", "status"])
    at = pc.index_in(rows["pair_key"], value_set=encoded["pair_key"])
    _check_whole(f"{what} have no latents", at, snapshot.latents_fingerprint)
    text_at = pc.index_in(rows["prompt_id"], value_set=texts["prompt_id"])
    _check_whole(f"{what} have no embedding of their prompt", text_at, snapshot.text_fingerprint)
    statuses = (encoded["status"].take(at), texts["status"].take(text_at))
    kept = pc.and_(*(pc.equal(status, str(Status.KEPT)) for status in statuses))
    rows, encoded = rows.filter(kept), encoded.drop_columns(["pair_key", "status"]).take(at.filter(kept))
    for name in encoded.column_names:
        rows = rows.append_column(name, encoded[name])
    if selection.labels == "hard":
        rounded = pc.greater(rows["label_0"], PREFERRED).cast(pa.float64())
        rows = rows.set_column(rows.column_names.index("label_0"), "label_0", rounded)
    return rows


def _selected(table: Table, columns: list[str], selection: Selection) -> pa.Table:
    types = {name: table.schema.field(name).type for name in columns} | {"kind": pa.int8()}
    place = columns.index("kind")
    batches = (
        batch.set_column(place, "kind", kind_numbers(batch)) for batch in table.batches(columns, selection.where)
    )
    return _encoded(pa.Table.from_batches(batches, pa.schema(list(types.items()))))


def _encoded(rows: pa.Table) -> pa.Table:
    """Store repeated text once."""
    for name in REPEATED & set(rows.column_names):
        encoded = rows[name].dictionary_encode().unify_dictionaries()
        rows = rows.set_column(rows.column_names.index(name), name, encoded)
    return rows


def _check_whole(what: str, at: pa.ChunkedArray, fingerprint: str) -> None:
    if at.null_count:
        raise SnapshotError(
            f"{at.null_count:,} of {len(at):,} {what} under the fingerprint {fingerprint}",
            "run `mapo encode` with this configuration; output of another model, VAE, type or geometry does not count",
        )
