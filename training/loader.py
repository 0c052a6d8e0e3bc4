"""Pairs as tensors: ranged reads ahead of the step.

Every sample is checked against its digest and knows its origin. No rank waits for another's data; memory is
bounded by the groups in flight. Letters: B pairs, C channels, H and W of latents, S tokens, D and P embedding sizes.
"""

import functools
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from pipelines.dataset.errors import MapoError, ShardCorrupt
from pipelines.dataset.pair import NULL_PROMPT_ID
from pipelines.dataset.storage import Storage
from training.index import Location, PairRecord

NUM_READERS = 16  # requests in flight; a pair is 256 KiB at 1024 x 1024
GROUPS_AHEAD = 8
TEXTS_CACHED = 4096  # 311 KiB each for SDXL: 1.3 GB at most

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class PairTensors:
    """One pair, label applied; stored types."""

    record: PairRecord
    chosen_CHW: Tensor
    rejected_CHW: Tensor
    chosen_time_ids: list[int]  # original h, w, crop top, left, target h, w
    rejected_time_ids: list[int]
    prompt_embeds_SD: Tensor
    pooled_P: Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch: pairs of one shape, on the CPU, in stored types."""

    records: list[PairRecord]
    chosen_BCHW: Tensor
    rejected_BCHW: Tensor
    chosen_time_ids_B6: Tensor  # float32
    rejected_time_ids_B6: Tensor
    prompt_embeds_BSD: Tensor
    pooled_BP: Tensor


class PairReader:
    """Reads single pairs and prompts by range, in threads; prompts are cached."""

    def __init__(self, storage: Storage, texts: dict[str, Location]) -> None:
        self._storage = storage
        self._texts = texts
        self.text = functools.lru_cache(TEXTS_CACHED)(self._read_text)

    def _tensors(self, where: Location) -> tuple[dict[str, Tensor], dict[str, str]]:
        data = self._storage.read_range(where.shard, where.offset, where.length, where.sha256)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return safetensors.torch.load(data), header.get("__metadata__", {})

    def _read_text(self, prompt_id: str) -> tuple[Tensor, Tensor]:
        tensors, _ = self._tensors(self._texts[prompt_id])
        return tensors["prompt_embeds"], tensors["pooled_prompt_embeds"]

    @property
    def null_conditioning(self) -> tuple[Tensor, Tensor]:
        """What a dropped prompt becomes: embeddings (S, D) and pooled (P,)."""
        return self.text(NULL_PROMPT_ID)

    def pair(self, record: PairRecord) -> PairTensors:
        """One pair with its prompt; an error names the pair, its shard and its source row."""
        try:
            tensors, metadata = self._tensors(record.latents)
            text = self.text(record.prompt_id)
        except (MapoError, KeyError, ValueError) as error:
            raise ShardCorrupt(
                f"cannot read pair {record.pair_key} ({record.latents.shard} at {record.latents.offset}, "
                f"from {record.origin}): {getattr(error, 'message', error)}",
                "`mapo data verify` lists what is damaged; `mapo encode` makes what is missing",
            ) from error
        chosen, rejected = record.chosen, 1 - record.chosen
        return PairTensors(
            record=record,
            chosen_CHW=tensors[f"latents_{chosen}"],
            rejected_CHW=tensors[f"latents_{rejected}"],
            chosen_time_ids=json.loads(metadata[f"time_ids_{chosen}"]),
            rejected_time_ids=json.loads(metadata[f"time_ids_{rejected}"]),
            prompt_embeds_SD=text[0],
            pooled_P=text[1],
        )


class PairLoader(Generic[Tag]):
    """Batches of given groups of pairs, in order, read ahead.

    Args:
        reader: Reads one pair.
        groups: What to load: a tag of the caller's, and the pairs of one shape.
    """

    def __init__(self, reader: PairReader, groups: Iterable[tuple[Tag, Sequence[PairRecord]]]) -> None:
        self._reader = reader
        self._groups = groups

    def __iter__(self) -> Iterator[tuple[Tag, Batch]]:
        ahead: deque[tuple[Tag, list[Future[PairTensors]]]] = deque()
        pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="pair-reader")
        try:
            for tag, records in self._groups:
                ahead.append((tag, [pool.submit(self._reader.pair, record) for record in records]))
                if len(ahead) > GROUPS_AHEAD:
                    yield _collate(*ahead.popleft())
            while ahead:
                yield _collate(*ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _collate(tag: Tag, futures: list[Future[PairTensors]]) -> tuple[Tag, Batch]:
    pairs = [future.result() for future in futures]
    return tag, Batch(
        records=[pair.record for pair in pairs],
        chosen_BCHW=torch.stack([pair.chosen_CHW for pair in pairs]),
        rejected_BCHW=torch.stack([pair.rejected_CHW for pair in pairs]),
        chosen_time_ids_B6=torch.tensor([pair.chosen_time_ids for pair in pairs], dtype=torch.float32),
        rejected_time_ids_B6=torch.tensor([pair.rejected_time_ids for pair in pairs], dtype=torch.float32),
        prompt_embeds_BSD=torch.stack([pair.prompt_embeds_SD for pair in pairs]),
        pooled_BP=torch.stack([pair.pooled_P for pair in pairs]),
    )


@dataclass
class Consumed:
    """The account of what a rank has trained on: how many pairs, and a running digest of their keys."""

    num_pairs: int = 0
    digest: str = ""

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        keys = "".join(record.pair_key for record in batch.records)
        self.digest = hashlib.sha256((self.digest + keys).encode()).hexdigest()[:16]
        self.num_pairs += len(batch.records)
