"""The pinned index of a run: which pairs there are, in a fixed order, and where their bytes lie."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.pair import NULL_PROMPT_ID, Status
from pipelines.dataset.storage import Storage
from training.spec import Snapshot

PREFERRED = 0.5  # image_0 is chosen where label_0 is above


@dataclass(frozen=True)
class Location:
    """Where one safetensors member lies."""

    shard: str
    offset: int
    length: int
    sha256: str


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
        """0 or 1: which image is preferred."""
        return 0 if self.label_0 > PREFERRED else 1


class PairIndex:
    """All usable pairs of one split, grouped by aspect bucket, ordered by key within a bucket.

    The order follows from the pairs alone: not from the number of shards, workers or commits.
    """

    def __init__(self, rows: pa.Table) -> None:
        """Take the joined rows of pairs and latents."""
        self._rows = rows.sort_by(
            [("bucket_height", "ascending"), ("bucket_width", "ascending"), ("pair_key", "ascending")]
        ).combine_chunks()
        heights = self._rows["bucket_height"].to_numpy()
        widths = self._rows["bucket_width"].to_numpy()
        shapes = np.stack([heights, widths], axis=1)
        buckets, starts = np.unique(shapes, axis=0, return_index=True) if len(shapes) else (shapes, np.empty(0, int))
        self.buckets: list[tuple[int, int]] = [(int(h), int(w)) for h, w in buckets]
        self._starts: NDArray[np.int64] = np.append(starts, len(shapes)).astype(np.int64)

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    @property
    def bucket_sizes(self) -> list[int]:
        """Pairs in each bucket."""
        return [int(n) for n in np.diff(self._starts)]

    def pair(self, bucket: int, element: int) -> PairRecord:
        """The pair number `element` of a bucket."""
        position = int(self._starts[bucket]) + element
        row: dict[str, Any] = {name: self._rows[name][position].as_py() for name in self._rows.column_names}
        return PairRecord(
            pair_key=row["pair_key"],
            prompt_id=row["prompt_id"],
            label_0=row["label_0"],
            latents=Location(row["shard"], row["offset"], row["length"], row["sha256"]),
            origin=f"{row['source_uri']} row {row['source_row']}",
        )


def load_index(storage: Storage, snapshot: Snapshot, split: str) -> PairIndex:
    """The kept pairs of a split whose latents and whose prompt's embedding were kept.

    Raises:
        SnapshotError: A kept pair, or its prompt, was never encoded under the run's fingerprints.
    """
    where = (pc.field("status") == str(Status.KEPT)) & (pc.field("split") == split)
    where &= pc.field("label_0") != PREFERRED  # a kept tie has no chosen image
    columns = ["pair_key", "prompt_id", "label_0", "source_uri", "source_row"]
    pairs = pairs_table(storage, snapshot.pairs_version).read(columns, where)
    encoded = latents_table(storage, snapshot.latents_fingerprint, snapshot.latents_version).read(
        ["pair_key", "status", "bucket_height", "bucket_width", "shard", "offset", "length", "sha256"]
    )
    texts = text_table(storage, snapshot.text_fingerprint, snapshot.text_version).read(["prompt_id", "status"])
    joined = pairs.join(encoded, "pair_key", join_type="inner")
    _check_whole(f"{split} pairs have no latents", pairs.num_rows, joined.num_rows, snapshot.latents_fingerprint)
    joined = joined.join(texts, "prompt_id", join_type="inner", right_suffix="_of_text")
    _check_whole(
        f"{split} pairs have no embedding of their prompt", pairs.num_rows, joined.num_rows, snapshot.text_fingerprint
    )
    kept = pc.and_(*(pc.equal(joined[name], str(Status.KEPT)) for name in ("status", "status_of_text")))
    return PairIndex(joined.filter(kept).drop_columns(["status", "status_of_text"]))


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
    rows = table.read(["prompt_id", "shard", "offset", "length", "sha256"], pc.field("status") == str(Status.KEPT))
    texts = {
        prompt: Location(*where)
        for prompt, *where in zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True)
    }
    if NULL_PROMPT_ID not in texts:
        raise SnapshotError(
            f"the text embeddings under {snapshot.text_fingerprint} lack the null conditioning", "run `mapo encode`"
        )
    return texts
