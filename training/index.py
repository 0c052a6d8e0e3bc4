"""The pinned index of a run: which pairs there are, in a fixed order, and where their bytes lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.pair import NULL_PROMPT_ID, Status
from pipelines.dataset.storage import Storage
from training.spec import Snapshot

PREFERRED = 0.5  # image_0 is chosen where label_0 is this or above

Labels = Literal["soft", "hard"]
PLACE = ["shard", "offset", "length", "sha256", "shard_bytes", "shard_sha256"]


@dataclass(frozen=True)
class Location:
    """Where one safetensors member lies; what its whole shard is, for who keeps shards (0 and "" if unknown)."""

    shard: str
    offset: int
    length: int
    sha256: str
    shard_bytes: int = 0
    shard_sha256: str = ""


@dataclass(frozen=True)
class PairRecord:
    """One pair of the index, with its origin, so that an error can name it."""

    pair_key: str
    prompt_id: str
    label_0: float
    latents: Location
    origin: str  # source URI and row

    @property
    def chosen(self) -> int:
        """0 or 1: which image is preferred; image 0 of a tie."""
        return 0 if self.label_0 >= PREFERRED else 1

    @property
    def preference(self) -> float:
        """The probability that the chosen image is preferred: 0.5 for a tie, 1 where all agree."""
        return max(self.label_0, 1.0 - self.label_0)


class PairIndex:
    """All usable pairs of one split, grouped by aspect bucket, ordered by key within a bucket.

    The order follows from the pairs alone: not from the number of shards, workers or commits. A pair is looked up in
    constant time: numbers lie in numpy, text in Arrow, repeated text once.
    """

    def __init__(self, rows: pa.Table) -> None:
        """Take the joined rows of pairs and latents."""
        rows = rows.sort_by(
            [("bucket_height", "ascending"), ("bucket_width", "ascending"), ("pair_key", "ascending")]
        ).combine_chunks()
        shapes = np.stack([rows[name].to_numpy() for name in ("bucket_height", "bucket_width")], axis=1)
        changes = np.flatnonzero(np.any(np.diff(shapes, axis=0) != 0, axis=1)) + 1
        starts = np.concatenate([np.zeros(min(len(shapes), 1), np.int64), changes])
        self.buckets: list[tuple[int, int]] = [(int(height), int(width)) for height, width in shapes[starts]]
        self._starts: list[int] = [*starts.tolist(), len(shapes)]
        numbers = ("label_0", "source_row", "offset", "length", "shard_bytes")
        self._numbers: dict[str, NDArray[Any]] = {name: rows[name].to_numpy() for name in numbers}
        texts = ("pair_key", "prompt_id", "sha256")
        self._texts: dict[str, pa.Array] = {name: _whole(rows[name]) for name in texts}
        repeated = ("shard", "shard_sha256", "source_uri")
        self._repeated = {name: _codes(rows[name]) for name in repeated}

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def bucket_sizes(self) -> list[int]:
        """Pairs in each bucket."""
        return [int(size) for size in np.diff(self._starts)]

    def pair(self, bucket: int, element: int) -> PairRecord:
        """The pair number `element` of a bucket."""
        row = self._starts[bucket] + element
        number = {name: column[row].item() for name, column in self._numbers.items()}
        text = {name: column[row].as_py() for name, column in self._texts.items()}
        text |= {name: values[codes[row]] for name, (values, codes) in self._repeated.items()}
        return PairRecord(
            pair_key=text["pair_key"],
            prompt_id=text["prompt_id"],
            label_0=number["label_0"],
            latents=Location(*((number | text)[name] for name in PLACE)),
            origin=f"{text['source_uri']} row {number['source_row']}",
        )


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column without chunks, in which an element is found at once."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([pa.array([], column.type), *column.chunks])


def _codes(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int32]]:
    """Distinct values, and which of them each row has."""
    encoded = _whole(column.dictionary_encode())
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def load_index(storage: Storage, snapshot: Snapshot, split: str, *, labels: Labels = "soft") -> PairIndex:
    """The kept pairs of a split whose latents and whose prompt's embedding were kept.

    Args:
        storage: Of the data set.
        snapshot: The pinned versions.
        split: train, validation or test.
        labels: soft takes labels as they are; hard rounds them to 0 and 1 and leaves kept ties out.

    Raises:
        SnapshotError: A kept pair, or its prompt, was never encoded under the run's fingerprints.
    """
    where = (pc.field("status") == str(Status.KEPT)) & (pc.field("split") == split)
    if labels == "hard":
        where &= pc.field("label_0") != PREFERRED
    columns = ["pair_key", "prompt_id", "label_0", "source_uri", "source_row"]
    pairs = pairs_table(storage, snapshot.pairs_version).read(columns, where)
    encoded = latents_table(storage, snapshot.latents_fingerprint, snapshot.latents_version).read(
        ["pair_key", "status", "bucket_height", "bucket_width", *PLACE]
    )
    texts = text_table(storage, snapshot.text_fingerprint, snapshot.text_version).read(["prompt_id", "status"])
    joined = pairs.join(encoded, "pair_key", join_type="inner")
    _check_whole(f"{split} pairs have no latents", pairs.num_rows, joined.num_rows, snapshot.latents_fingerprint)
    joined = joined.join(texts, "prompt_id", join_type="inner", right_suffix="_of_text")
    _check_whole(
        f"{split} pairs have no embedding of their prompt", pairs.num_rows, joined.num_rows, snapshot.text_fingerprint
    )
    kept = pc.and_(*(pc.equal(joined[name], str(Status.KEPT)) for name in ("status", "status_of_text")))
    rows = joined.filter(kept).drop_columns(["status", "status_of_text"])
    if labels == "hard":
        rounded = pc.greater(rows["label_0"], PREFERRED).cast(pa.float64())
        rows = rows.set_column(rows.column_names.index("label_0"), "label_0", rounded)
    return PairIndex(rows)


def _check_whole(what: str, num_pairs: int, num_found: int, fingerprint: str) -> None:
    if num_found < num_pairs:
        raise SnapshotError(
            f"{num_pairs - num_found:,} of {num_pairs:,} {what} under the fingerprint {fingerprint}",
            "run `mapo encode` with this configuration; what another model, VAE, type or geometry gave does not count",
        )


def load_texts(storage: Storage, snapshot: Snapshot) -> dict[str, Location]:
    """Where each prompt's embeddings lie, by prompt_id; NULL_PROMPT_ID is the null conditioning.

    Raises:
        SnapshotError: The null conditioning is missing.
    """
    table = text_table(storage, snapshot.text_fingerprint, snapshot.text_version)
    rows = table.read(["prompt_id", *PLACE], pc.field("status") == str(Status.KEPT))
    columns: list[Sequence[Any]] = [rows[name].to_pylist() for name in rows.column_names]
    texts = {prompt: Location(*place) for prompt, *place in zip(*columns, strict=True)}
    if NULL_PROMPT_ID not in texts:
        raise SnapshotError(
            f"the text embeddings under {snapshot.text_fingerprint} lack the null conditioning", "run `mapo encode`"
        )
    return texts
