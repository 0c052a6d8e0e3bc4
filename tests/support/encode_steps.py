"""Ingest and encode without Ray: the same units, shards and commits; for tests of encode."""

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from pipelines.config import EncodeConfig, IngestConfig, SourceConfig
from pipelines.dataset.layout import LATENTS, TEXT, latents_table, pairs_table, text_table
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import Row
from pipelines.encode.encoders import Embedded, LatentEncoder, Launched, TextEncoder
from pipelines.encode.fingerprint import fingerprint_of, latents_fingerprint, note_parts
from pipelines.encode.geometry import Bucket, Placed, choose_bucket, open_image, place
from pipelines.encode.latents import LatentWriter
from pipelines.encode.plan import Pending, pending
from pipelines.encode.texts import TextWriter
from pipelines.ingest.committer import Committer
from pipelines.ingest.execution import bring_up_to_date, plan_units, write_unit
from pipelines.ingest.pair_shards import WriteShards
from pipelines.sources.unit import SourceUnit


@dataclass
class Counting:
    """A VAE that counts the images it is given."""

    encoder: LatentEncoder
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def launch(self, images: Any) -> Launched:
        self.shapes += [image.shape for image in images]
        return self.encoder.launch(images)


@dataclass
class CountingTexts:
    """Text encoders that note the prompts they are given."""

    encoder: TextEncoder
    prompts: list[str] = field(default_factory=list)

    def __call__(self, prompts: list[str]) -> list[Embedded]:
        self.prompts += prompts
        return self.encoder(prompts)

    def null(self) -> Embedded:
        return self.encoder.null()


def write_latents(
    unit: str, rows: Any, config: EncodeConfig, storage: Storage, fingerprint: str, vae: Any, num_threads: int = 1
) -> Any:
    """The rows of a single unit of pairs, whose shard is written."""
    return LatentWriter(config, storage, fingerprint, vae, num_threads).write(unit, rows)[0]


def write_texts(unit: str, rows: Any, config: EncodeConfig, storage: Storage, fingerprint: str, text: Any) -> Any:
    """The rows of a single unit of prompts, whose shard is written."""
    return TextWriter(config, storage, fingerprint, text).write(unit, rows)[0]


def ingest_here(storage: Storage, *files: Path, image_check: Literal["full", "header"] = "full") -> None:
    """Ingest without Ray: the same units, shards and commits."""
    table = pairs_table(storage)
    sources = tuple(SourceConfig(format="pickapic", path=str(file)) for file in files)
    units = {unit.id: unit for unit in plan_units(IngestConfig(sources=sources, image_check=image_check))}
    for identity in table.uncommitted(list(units)):
        Committer(table).append(identity, write_unit(units[identity], storage))


def ingest_in_process(config: IngestConfig, storage: Storage) -> None:
    """Do all that `ingest` does, but read the units in this process and not on Ray Data."""
    bring_up_to_date(config, storage, None, _write_here)


def _write_here(units: Sequence[SourceUnit], config: IngestConfig, storage: Storage, say: object) -> Generator[Row]:
    task = {"unit": [unit.to_json() for unit in units], "storage": [storage.url] * len(units)}
    for batch in WriteShards()(task):
        yield {name: value for name, (value,) in batch.items()}


def encode_here(
    config: EncodeConfig,
    storage: Storage,
    vae: Any,
    text: Any,
    num_threads: int = 1,
    *,
    include_empty_prompt: bool = False,
) -> Pending:
    """Encode without Ray: the same units, shards and commits."""
    todo = pending(config, storage, include_empty_prompt=include_empty_prompt)
    for folder, parts in ((LATENTS, todo.latents_parts), (TEXT, todo.text_parts)):
        note_parts(storage, folder, parts)
    name = fingerprint_of(todo.text_parts)
    for unit in todo.texts:
        rows = write_texts(unit.id, unit.rows, config, storage, name, text)
        text_table(storage, name).append(unit.id, rows)
    name = fingerprint_of(todo.latents_parts)
    for unit in todo.latents:
        rows = write_latents(unit.id, unit.rows, config, storage, name, vae, num_threads)
        latents_table(storage, name).append(unit.id, rows)
    return todo


def place_pair(data_0: bytes, data_1: bytes, buckets: tuple[Bucket, ...]) -> tuple[Bucket, Placed, Placed]:
    """Return both images of a pair, decoded and in their common bucket."""
    image_0, image_1 = open_image(data_0), open_image(data_1)
    bucket = choose_bucket((image_0.height, image_0.width), (image_1.height, image_1.width), buckets)
    return bucket, place(image_0, bucket), place(image_1, bucket)


def files_of(storage: Storage) -> dict[str, int]:
    root = Path(storage.path())
    return {str(file.relative_to(root)): file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file()}


def latents_of(
    storage: Storage, config: EncodeConfig
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, list[int]]]]:
    """Tensors and time ids of every row of latents."""
    found = {}
    for row in latents_table(storage, latents_fingerprint(config)).read().to_pylist():
        data = storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"])
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        time_ids = {name: json.loads(text) for name, text in header["__metadata__"].items()}
        found[row["pair_key"]] = (safetensors.torch.load(data), time_ids)
    return found
