"""Range reads of pairs and single images: every sample is checked against its CRC-32 and knows its origin."""

import contextlib
import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from pipelines.dataset.errors import MapoError, ShardCorrupt
from pipelines.dataset.layout import FLIPPED, UNFLIPPED
from pipelines.dataset.pair import EMPTY_PROMPT_ID, NULL_PROMPT_ID
from pipelines.dataset.storage import Storage
from training.data.batch import Batch, BatchRows
from training.data.index import Location, PairRecord
from training.data.shard_cache import ShardCache
from training.data.tensors import layout_of

MAX_TEXT_BYTES = 512 << 20  # 1,688 prompts of SDXL
READS_BESIDE_FETCHES = 4  # in flight: a shard brings a thousand pairs for the work of thirty such reads
SIDES = "chosen_BCHW", "rejected_BCHW"  # a single image has the first alone
EMBEDS, POOLED = "prompt_embeds", "pooled_prompt_embeds"


class PairReader:
    """Reader of pairs and prompts by range, from any thread; keeps the most recent prompts in memory.

    Args:
        storage: The data set's storage.
        texts: Where each prompt's embeddings lie.
        cache: Whole shards on this node, tried first.
        max_text_bytes: Size limit of the prompts in memory.
    """

    def __init__(
        self,
        storage: Storage,
        texts: dict[str, Location],
        cache: ShardCache | None = None,
        *,
        max_text_bytes: int = MAX_TEXT_BYTES,
    ) -> None:
        self._storage = storage
        self._texts = texts
        self._cache = cache
        self._few = threading.BoundedSemaphore(READS_BESIDE_FETCHES)
        self._recent = _Recent(max_text_bytes)

    def _read(self, where: Location) -> bytes:
        """Return the bytes of one member, as they were written."""
        found = self._cache.read(where) if self._cache else None
        if found is None:
            is_fetching = self._cache is not None and self._cache.is_fetching
            with self._few if is_fetching else contextlib.nullcontext():
                found = self._storage.read_range(where.shard, where.offset, where.length, where.sha256, where.crc32)
        return found

    def _read_text(self, prompt_id: str) -> bytes:
        found = self._recent.get(prompt_id)
        if found is None:
            found = self._read(self._texts[prompt_id])
            self._recent.put(prompt_id, found)
        return found

    @functools.cached_property
    def null_conditioning(self) -> tuple[Tensor, Tensor | None]:
        """Return the null conditioning of guidance: embeddings (S, D) and pooled (P,), if the base has them."""
        return self._embedded(NULL_PROMPT_ID)

    @functools.cached_property
    def empty_conditioning(self) -> tuple[Tensor, Tensor | None]:
        """Return the embedding of "" in the same parts.

        Raises:
            KeyError: It is not stored; see `load_texts`.
        """
        return self._embedded(EMPTY_PROMPT_ID)

    def _embedded(self, prompt_id: str) -> tuple[Tensor, Tensor | None]:
        data = self._read_text(prompt_id)
        parts = layout_of(data).parts
        return parts[EMBEDS].tensor(data), parts[POOLED].tensor(data) if POOLED in parts else None

    def fill(self, rows: BatchRows, row: int) -> None:
        """Read one pair or single image of a micro-batch, with its prompt, into its row.

        Raises:
            ShardCorrupt: It cannot be read; the message names the pair or image, its shard and its source row.
        """
        record = rows.records[row]
        try:
            self._fill_latents(rows, row, record)
            self._fill_text(rows, row, record)
        except (MapoError, KeyError, ValueError) as error:
            raise ShardCorrupt(
                f"cannot read {record.noun} {record.pair_key} ({record.latents.shard} at {record.latents.offset}, "
                f"from {record.origin}): {_reason(error)}",
                "`mapo data verify` lists what is damaged; `mapo encode` makes what is missing",
            ) from error

    def _fill_latents(self, rows: BatchRows, row: int, record: PairRecord) -> None:
        data = self._read(record.latents)
        layout = layout_of(data)
        times = []
        for name, side in zip(SIDES, record.sides, strict=False):
            latents, time_ids = FLIPPED if record.flipped[side] else UNFLIPPED
            rows.write(name, row, data, layout.parts[f"{latents}_{side}"])
            times.append(_time_ids(layout.metadata[f"{time_ids}_{side}"]))
        rows.write_time_ids(row, *times)

    def _fill_text(self, rows: BatchRows, row: int, record: PairRecord) -> None:
        data = self._read_text(record.prompt_id)
        parts = layout_of(data).parts
        rows.write("prompt_embeds_BSD", row, data, parts[EMBEDS])
        if POOLED in parts:
            rows.write("pooled_BP", row, data, parts[POOLED])

    def read(self, records: Sequence[PairRecord]) -> Batch:
        """Read one micro-batch, pair after pair; an error names the pair, its shard and its source row."""
        rows = BatchRows(records)
        for row in range(len(rows.records)):
            self.fill(rows, row)
        return rows.finish()


def _reason(error: Exception) -> str:
    if isinstance(error, MapoError):
        return error.message
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


@functools.lru_cache(4096)
def _time_ids(text: str) -> list[float]:
    return [float(number) for number in json.loads(text)]


class _Recent:
    """The bytes that were used last, up to a number of them; for many threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = data
            self._num_bytes += len(data)
            while self._num_bytes > self._max_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._num_bytes -= len(dropped)
