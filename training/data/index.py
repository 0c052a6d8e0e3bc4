"""The pinned index of a run: its pairs in a fixed order, and where their bytes lie."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.pair import EMPTY_PROMPT_ID, NULL_PROMPT_ID, Status
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from training.spec import Snapshot

PREFERRED = 0.5  # image_0 is chosen where label_0 is this or above

Labels = Literal["soft", "hard"]
KEY_DIGITS, SHA256_DIGITS = 32, 64  # hex
PLACE = ["shard", "offset", "length", "sha256", "crc32", "shard_bytes", "shard_sha256"]
NO_CRC32 = -1


@dataclass(frozen=True)
class Location:
    """Where one safetensors member lies, with size and digest of its shard for the shard cache (0 and "" if unknown).

    The CRC-32 is None in data sets that were encoded before mapo stored one.
    """

    shard: str
    offset: int
    length: int
    sha256: str
    crc32: int | None = None
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
    flipped: tuple[bool, bool] = (False, False)
    """Whether image 0, and image 1, is read mirrored."""

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

    The order follows from the pairs alone: not from the number of shards, workers or commits. A pair takes about 130
    bytes and is found in constant time: hex digits are stored as bytes, repeated text once.
    """

    def __init__(self, rows: pa.Table) -> None:
        """Build the index from the joined rows of pairs and latents."""
        keys = _from_hex(rows["pair_key"], KEY_DIGITS)
        high, low = keys.view(">u8").astype(np.uint64).T
        heights, widths = (rows[name].to_numpy() for name in ("bucket_height", "bucket_width"))
        order = np.lexsort((low, high, widths, heights))
        shapes = np.stack([heights[order], widths[order]], axis=1)
        changes = np.flatnonzero(np.any(np.diff(shapes, axis=0) != 0, axis=1)) + 1
        starts = np.concatenate([np.zeros(min(len(shapes), 1), np.int64), changes])
        self.buckets: list[tuple[int, int]] = [(int(height), int(width)) for height, width in shapes[starts]]
        self._starts: list[int] = [*starts.tolist(), len(shapes)]
        self._keys = keys[order]
        self._prompts = _from_hex(rows["prompt_id"], KEY_DIGITS)[order]
        self._sha256 = _from_hex(rows["sha256"], SHA256_DIGITS)[order]
        numbers = ("label_0", "source_row", "offset", "length", "shard_bytes")
        self._label_0, self._source_row, self._offset, self._length, self._shard_bytes = (
            rows[name].to_numpy()[order] for name in numbers
        )
        self._crc32 = pc.fill_null(rows["crc32"], NO_CRC32).to_numpy()[order]
        repeated = ("shard", "shard_sha256", "source_uri")
        self._shard, self._shard_sha256, self._source_uri = (_Repeated(rows[name], order) for name in repeated)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def bucket_sizes(self) -> list[int]:
        """Pairs in each bucket."""
        return [int(size) for size in np.diff(self._starts)]

    def pair(self, bucket: int, element: int, flipped: tuple[bool, bool] = (False, False)) -> PairRecord:
        """Return pair number `element` of a bucket; `flipped` says which of its two images are read mirrored."""
        row = self._starts[bucket] + element
        return PairRecord(
            pair_key=self._keys[row].tobytes().hex(),
            prompt_id=self._prompts[row].tobytes().hex(),
            label_0=float(self._label_0[row]),
            latents=Location(
                self._shard[row],
                int(self._offset[row]),
                int(self._length[row]),
                self._sha256[row].tobytes().hex(),
                None if (crc32 := int(self._crc32[row])) == NO_CRC32 else crc32,
                int(self._shard_bytes[row]),
                self._shard_sha256[row],
            ),
            origin=f"{self._source_uri[row]} row {self._source_row[row]}",
            flipped=flipped,
        )


def _from_hex(column: pa.ChunkedArray, digits: int) -> NDArray[np.uint8]:
    """Turn strings of `digits` hex digits into a row of bytes each."""
    parts = [np.empty((0, digits // 2), np.uint8)]
    for chunk in column.chunks:
        fixed = chunk.cast(pa.binary()).cast(pa.binary(digits))
        text = memoryview(fixed.buffers()[1])[fixed.offset * digits :][: len(fixed) * digits]
        parts.append(np.frombuffer(bytes.fromhex(str(text, "ascii")), np.uint8).reshape(-1, digits // 2))
    return np.concatenate(parts)


class _Repeated:
    """A column of few distinct strings: each is stored once and shared."""

    def __init__(self, column: pa.ChunkedArray, order: NDArray[np.int64]) -> None:
        column = column.dictionary_encode().unify_dictionaries()
        self._values: list[str] = column.chunk(0).dictionary.to_pylist() if column.num_chunks else []
        codes = [np.empty(0, np.int32), *(chunk.indices.to_numpy() for chunk in column.chunks)]
        self._codes: NDArray[np.int32] = np.concatenate(codes)[order]

    def __getitem__(self, row: int) -> str:
        return self._values[int(self._codes[row])]


def load_index(storage: Storage, snapshot: Snapshot, split: str, *, labels: Labels = "soft") -> PairIndex:
    """Load the kept pairs of a split whose latents and prompt embedding were kept as well.

    Args:
        storage: The data set's storage.
        snapshot: The pinned versions.
        split: train, validation or test.
        labels: soft keeps the stored labels; hard rounds them to 0 and 1 and leaves kept ties out.

    Raises:
        SnapshotError: A kept pair, or its prompt, was never encoded under the run's fingerprints.
    """
    index = PairIndex(_rows(storage, snapshot, split, labels))
    pa.default_memory_pool().release_unused()  # hundreds of MB for a large data set, in every rank
    return index


def _rows(storage: Storage, snapshot: Snapshot, split: str, labels: Labels) -> pa.Table:
    """Join pairs with where their latents lie."""
    where = (pc.field("status") == str(Status.KEPT)) & (pc.field("split") == split)
    if labels == "hard":
        where &= pc.field("label_0") != PREFERRED
    columns = ["pair_key", "prompt_id", "label_0", "source_uri", "source_row"]
    pairs = _read(pairs_table(storage, snapshot.pairs_version), columns, where)
    latents = latents_table(storage, snapshot.latents_fingerprint, snapshot.latents_version)
    encoded = _read(latents, ["pair_key", "status", "bucket_height", "bucket_width", *PLACE])
    texts = text_table(storage, snapshot.text_fingerprint, snapshot.text_version).read(["prompt_id", "status"])
    at = pc.index_in(pairs["pair_key"], value_set=encoded["pair_key"])
    _check_whole(f"{split} pairs have no latents", at, snapshot.latents_fingerprint)
    text_at = pc.index_in(pairs["prompt_id"], value_set=texts["prompt_id"])
    _check_whole(f"{split} pairs have no embedding of their prompt", text_at, snapshot.text_fingerprint)
    statuses = (encoded["status"].take(at), texts["status"].take(text_at))
    kept = pc.and_(*(pc.equal(status, str(Status.KEPT)) for status in statuses))
    rows, encoded = pairs.filter(kept), encoded.drop_columns(["pair_key", "status"]).take(at.filter(kept))
    for name in encoded.column_names:
        rows = rows.append_column(name, encoded[name])
    if labels == "hard":
        rounded = pc.greater(rows["label_0"], PREFERRED).cast(pa.float64())
        rows = rows.set_column(rows.column_names.index("label_0"), "label_0", rounded)
    return rows


def _read(table: Table, columns: list[str], where: ds.Expression | None = None) -> pa.Table:
    """Read rows of a table, repeated text once."""
    rows = table.read(columns, where)
    for name in set(columns) & {"shard", "shard_sha256", "source_uri"}:
        encoded = rows[name].dictionary_encode().unify_dictionaries()
        rows = rows.set_column(rows.column_names.index(name), name, encoded)
    return rows


def _check_whole(what: str, at: pa.ChunkedArray, fingerprint: str) -> None:
    if at.null_count:
        raise SnapshotError(
            f"{at.null_count:,} of {len(at):,} {what} under the fingerprint {fingerprint}",
            "run `mapo encode` with this configuration; output of another model, VAE, type or geometry does not count",
        )


def load_texts(storage: Storage, snapshot: Snapshot, *, include_empty_prompt: bool = False) -> dict[str, Location]:
    """Load where each prompt's embeddings lie, by prompt_id; NULL_PROMPT_ID is the null conditioning.

    Args:
        storage: The data set's storage.
        snapshot: The pinned versions.
        include_empty_prompt: Whether the embedding of "" is needed, as EMPTY_PROMPT_ID.

    Raises:
        SnapshotError: The null conditioning is missing, or the embedding of "".
    """
    table = text_table(storage, snapshot.text_fingerprint, snapshot.text_version)
    rows = table.read(["prompt_id", *PLACE], pc.field("status") == str(Status.KEPT))
    columns: list[Any] = [rows[name].to_pylist() for name in rows.column_names]
    shared = {text: text for name in ("shard", "shard_sha256") for text in pc.unique(rows[name]).to_pylist()}
    texts = {
        prompt: Location(shared[shard], offset, length, sha256, crc32, num_bytes, shared[shard_sha256])
        for prompt, shard, offset, length, sha256, crc32, num_bytes, shard_sha256 in zip(*columns, strict=True)
    }
    if NULL_PROMPT_ID not in texts:
        raise SnapshotError(
            f"the text embeddings under {snapshot.text_fingerprint} have no null conditioning", "run `mapo encode`"
        )
    if include_empty_prompt and EMPTY_PROMPT_ID not in texts:
        raise SnapshotError(
            f'the text embeddings under {snapshot.text_fingerprint} have no embedding of "", which '
            "`train.null_prompt: empty` needs for dropped prompts",
            "run `mapo encode` with this configuration to add it",
        )
    return texts
