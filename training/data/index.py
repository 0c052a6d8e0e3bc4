"""The pinned index of a run: its pairs and single images in a fixed order, and where their bytes lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import text_table
from pipelines.dataset.pair import EMPTY_PROMPT_ID, JUDGED, KINDS, NULL_PROMPT_ID, PAIR, Status
from pipelines.dataset.storage import Storage
from training.data.order import num_visits
from training.data.rows import PLACE, PREFERRED, Labels, Selection, joined_rows
from training.spec import Snapshot

KEY_DIGITS, SHA256_DIGITS = 32, 64  # hex
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
    """One pair or single image of the index, with its origin, so that an error can name it."""

    pair_key: str
    prompt_id: str
    label_0: float
    latents: Location
    origin: str  # source URI and row
    flipped: tuple[bool, bool] = (False, False)
    """Whether image 0, and image 1, is read mirrored."""
    kind: str = PAIR
    """`PAIR`, or a single image, which is image 0: `JUDGED` or `PRIOR`."""
    weight: float = 1.0
    """Weight of its loss, divided by the mean weight of the index."""

    @property
    def is_pair(self) -> bool:
        """Whether there are two images."""
        return self.kind == PAIR

    @property
    def noun(self) -> str:
        """What it is called in a message."""
        return "pair" if self.is_pair else "image"

    @property
    def chosen(self) -> int:
        """0 or 1: which image is preferred; image 0 of a tie, and the only one of a single."""
        return 0 if not self.is_pair or self.label_0 >= PREFERRED else 1

    @property
    def sides(self) -> tuple[int, ...]:
        """The images in the order of a micro-batch: chosen, then rejected; or the only one."""
        return (self.chosen, 1 - self.chosen) if self.is_pair else (0,)

    @property
    def preference(self) -> float:
        """The probability that the chosen image is preferred: 0.5 for a tie, 1 where all agree and for a single."""
        return max(self.label_0, 1.0 - self.label_0) if self.is_pair else 1.0

    @property
    def is_good(self) -> bool:
        """Whether the image is one to learn from: False only for a single image that was judged bad."""
        return self.kind != JUDGED or self.label_0 >= PREFERRED


class PairIndex:
    """All usable pairs and single images of one split, by bucket, and by key within a bucket.

    A bucket has one aspect and one kind; buckets are ordered by height, width and kind, pairs first. The order follows
    from the rows alone: not from the number of shards, workers or commits. A row takes about 130 bytes and is found in
    constant time: hex digits are stored as bytes, repeated text once, weights only if one of them is not 1.

    Args:
        rows: From `joined_rows`.
        balance: Whether images of a class and all others are visited about equally often; see `num_visits`.
    """

    buckets: list[tuple[int, int]]
    """Height and width of each bucket, in pixels."""
    kinds: list[str]
    """Kind of each bucket, of `KINDS`."""
    mean_weight: float
    """Mean of the weights in the table over the visits of an epoch; the weights of records are divided by it."""

    def __init__(self, rows: pa.Table, *, balance: bool = False) -> None:
        keys = _from_hex(rows["pair_key"], KEY_DIGITS)
        high, low = keys.view(">u8").astype(np.uint64).T
        columns = [rows[name].to_numpy() for name in ("bucket_height", "bucket_width", "kind")]
        order = np.lexsort((low, high, *reversed(columns)))
        places = np.stack([column[order] for column in columns], axis=1)
        changes = np.flatnonzero(np.any(np.diff(places, axis=0) != 0, axis=1)) + 1
        starts = np.concatenate([np.zeros(min(len(places), 1), np.int64), changes])
        self.buckets = [(height, width) for height, width, _ in places[starts].tolist()]
        self.kinds = [KINDS[kind] for _, _, kind in places[starts].tolist()]
        self._starts: list[int] = [*starts.tolist(), len(places)]
        self._sizes: list[int] = np.diff(self._starts).tolist()
        self._num_visits = num_visits(self._sizes, self.kinds) if balance else [1] * len(self._sizes)
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
        self.mean_weight, self._weight = 1.0, None
        if rows["weight"].null_count < len(rows):
            self.mean_weight, self._weight = self._relative(pc.fill_null(rows["weight"], 1.0).to_numpy()[order])

    def _relative(self, weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float32] | None]:
        """Return the mean of the weights over the visits of an epoch, and each divided by it; None if all are 1."""
        if (weights == 1).all():
            return 1.0, None
        mean = float(np.average(weights, weights=np.repeat(self._num_visits, self._sizes)))
        return mean, (weights / mean).astype(np.float32)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def bucket_sizes(self) -> list[int]:
        """Elements of each bucket: its rows, each as often as an epoch visits it."""
        return [size * visits for size, visits in zip(self._sizes, self._num_visits, strict=True)]

    def pair(self, bucket: int, element: int, flipped: tuple[bool, bool] = (False, False)) -> PairRecord:
        """Return element number `element` of a bucket; `flipped` says which of its two images are read mirrored."""
        row = self._starts[bucket] + element % self._sizes[bucket]
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
            kind=self.kinds[bucket],
            weight=1.0 if self._weight is None else float(self._weight[row]),
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


def load_index(
    storage: Storage,
    snapshot: Snapshot,
    split: str,
    *,
    labels: Labels = "soft",
    kinds: Sequence[str] = (PAIR,),
    only_good: bool = False,
    balance: bool = False,
) -> PairIndex:
    """Load the kept rows of a split whose latents and prompt embedding were kept as well.

    Args:
        storage: The data set's storage.
        snapshot: The pinned versions.
        split: train, validation or test.
        labels: soft keeps the stored labels; hard rounds them to 0 and 1 and leaves kept ties out.
        kinds: The kinds of rows: pairs, single images that were judged, images of a class for prior preservation.
        only_good: Whether to leave out single images that were judged bad.
        balance: Whether images of a class and all others are visited about equally often; see `num_visits`.

    Raises:
        SnapshotError: A kept row, or its prompt, was never encoded under the run's fingerprints.
    """
    index = PairIndex(joined_rows(storage, snapshot, Selection(split, labels, kinds, only_good)), balance=balance)
    pa.default_memory_pool().release_unused()  # hundreds of MB for a large data set, in every rank
    return index


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
