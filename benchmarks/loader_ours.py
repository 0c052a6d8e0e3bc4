"""Our hand of `benchmarks.loader`: latents once a pair, text once a prompt, every sample checked by its CRC-32."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import safetensors.torch
import torch

from benchmarks.loader_samples import (
    BATCH_SIZE,
    PAIRS_A_PROMPT,
    SHARD_BYTES,
    STEP,
    TIME_IDS,
    Batches,
    sample,
)
from pipelines.dataset.layout import LATENTS_SCHEMA, TEXT_SCHEMA, latents_table, pairs_table, text_table
from pipelines.dataset.pair import NULL_PROMPT_ID, PAIRS_SCHEMA
from pipelines.dataset.shard import write_shard
from pipelines.dataset.storage import Storage
from training.data.index import PairRecord, load_index, load_texts
from training.data.loader import PairLoader, PairReader
from training.data.order import Plan
from training.data.reader import MAX_TEXT_BYTES
from training.data.shard_cache import ShardCache
from training.spec import Snapshot

LATENTS, TEXT = "a" * 32, "b" * 32
MAX_CACHE_BYTES = 1 << 40


class Ours:
    """`PairLoader` in the order of `Plan`."""

    modules = ("deltalake", "training.data.loader")
    s3_modules = ("s3fs",)
    max_text_bytes = MAX_TEXT_BYTES
    keeps_shards = False

    def write(self, folder: Path, num_pairs: int) -> None:
        """As ingest and encode leave it."""
        storage = Storage(str(folder))
        pairs = [
            {
                "pair_key": f"{i:032x}", "prompt_id": _prompt(i), "label_0": 1.0 - i % 2, "status": "kept",
                "split": "train", "unit": "unit", "source_uri": "memory", "source_row": i,
            }
            for i in range(num_pairs)
        ]  # fmt: skip
        pairs_table(storage).append("unit", pa.Table.from_pylist(pairs, PAIRS_SCHEMA))
        first_of = {NULL_PROMPT_ID: 0} | {_prompt(i): i for i in range(0, num_pairs, PAIRS_A_PROMPT)}
        latents = ((f"{i:032x}", _latents(i)) for i in range(num_pairs))
        for number, members in enumerate(_shards(latents)):
            _commit(storage, f"dataset/latents/{LATENTS}/{number:05d}.tar", members)
        texts = ((prompt, _text(i)) for prompt, i in first_of.items())
        for number, members in enumerate(_shards(texts)):
            _commit(storage, f"dataset/text/{TEXT}/{number:05d}.tar", members)

    def batches(self, url: str, cache: Path, state: dict[str, Any]) -> Batches:
        """The index is opened, and the first step is asked for."""
        torch.set_num_threads(1)
        storage = Storage(url)
        versions = [table.version or 0 for table in (latents_table(storage, LATENTS), text_table(storage, TEXT))]
        snapshot = Snapshot(0, LATENTS, versions[0], TEXT, versions[1])
        index = load_index(storage, snapshot, "train")
        plan = Plan(index.bucket_sizes, BATCH_SIZE, BATCH_SIZE, seed=0)
        first = int(state.get("step", 0))

        def groups() -> Iterator[tuple[int, list[PairRecord]]]:
            for step in range(first, first + len(index) // BATCH_SIZE):
                group = plan.group(step, 0)
                yield step, [index.pair(group.bucket, int(element)) for element in group.elements]

        shards = ShardCache(storage, cache, MAX_CACHE_BYTES) if self.keeps_shards else None
        reader = PairReader(storage, load_texts(storage, snapshot), shards, max_text_bytes=self.max_text_bytes)
        for _, batch in PairLoader(reader, groups()):
            yield [int(record.origin.rpartition(" ")[2]) for record in batch.records], batch.chosen_BCHW
        if shards:
            shards.close()

    def save(self, _: str, __: int) -> dict[str, Any]:
        """A step number is all of it."""
        return {"step": STEP}


class OursWithoutTexts(Ours):
    """No prompt stays in memory: each pair reads its own, as with far more prompts than memory holds."""

    max_text_bytes = 0


class OursWithCache(Ours):
    """With a shard cache, empty at first."""

    keeps_shards = True


def _prompt(number: int) -> str:
    return f"{number // PAIRS_A_PROMPT + 1:032x}"


def _latents(number: int) -> bytes:
    found, chosen = sample(number), number % 2
    sides = {f"latents_{chosen}": found["chosen"], f"latents_{1 - chosen}": found["rejected"]}
    metadata = {f"time_ids_{side}": json.dumps(TIME_IDS) for side in (0, 1)}
    return safetensors.torch.save({name: torch.from_numpy(side.copy()) for name, side in sides.items()}, metadata)


def _text(number: int) -> bytes:
    found = sample(number)
    parts = {"prompt_embeds": found["prompt_embeds"], "pooled_prompt_embeds": found["pooled"]}
    return safetensors.torch.save({name: torch.from_numpy(part.copy()) for name, part in parts.items()})


def _shards(members: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    shard: list[tuple[str, bytes]] = []
    for key, data in members:
        shard.append((f"{key}.safetensors", data))
        if len(shard) * len(data) >= SHARD_BYTES:
            yield shard
            shard = []
    if shard:
        yield shard


def _commit(storage: Storage, shard: str, members: list[tuple[str, bytes]]) -> None:
    with storage.unfinished(shard) as file:
        written, num_bytes, sha256 = write_shard(file, members)
        storage.upload(shard, file)
    is_text = TEXT in shard
    own = {} if is_text else {"bucket_height": 1024, "bucket_width": 1024}
    rows = [
        {
            "prompt_id" if is_text else "pair_key": member.name.split(".")[0], "status": "kept", "unit": shard,
            "shard": shard, "shard_bytes": num_bytes, "shard_sha256": sha256, "offset": member.offset,
            "length": member.length, "sha256": member.sha256, "crc32": member.crc32, **own,
        }
        for member in written
    ]  # fmt: skip
    table = text_table(storage, TEXT) if is_text else latents_table(storage, LATENTS)
    table.append(shard, pa.Table.from_pylist(rows, TEXT_SCHEMA if is_text else LATENTS_SCHEMA))
