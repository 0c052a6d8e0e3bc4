"""Finds shards with members that no row references: from the table's offsets, with one small read per shard."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.pair import PAIRS_SCHEMA
from pipelines.dataset.shard import BLOCK_BYTES
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.dataset.values import Row
from pipelines.ingest.pair_shards import RECORD, record_of

SHARD = ["shard", "shard_bytes", "shard_sha256"]
PLACED = pc.field("shard").is_valid()


@dataclass(frozen=True)
class Occupied:
    """A shard and the members that rows point to.

    Args:
        name: The shard's name on the storage.
        num_bytes: Size of the whole shard.
        sha256: Digest of the whole shard.
        keys: Keys of pairs, single images or prompts, in the order of their members.
        extents: For each key's members, the first byte of the first header and the byte after the last block.
    """

    name: str
    num_bytes: int
    sha256: str
    keys: tuple[str, ...]
    extents: tuple[tuple[int, int], ...]

    def has_dead_members(self, storage: Storage) -> bool:
        """Return whether the shard has members that no row references; reads a block if only its end can tell."""
        position = 0
        for start, end in self.extents:
            if start != position:
                return True
            position = end
        if position + BLOCK_BYTES > self.num_bytes:
            return True  # no room for the tar's end: the extents are not what is there
        return any(storage.read_range(self.name, position, BLOCK_BYTES))


def pair_shards(table: Table) -> Iterator[Occupied]:
    """Yield the shards of the table of pairs, by name."""
    columns = [*SHARD, "offset_0", "length_0", "offset_1", "length_1", "kind", *RECORD]
    rows = table.read([name for name in PAIRS_SCHEMA.names if name in columns], PLACED)

    def extent(row: Row) -> tuple[int, int]:
        last = 0 if row["offset_1"] is None else 1  # a single image has no image 1
        images_end = row[f"offset_{last}"] + padded(row[f"length_{last}"])
        return row["offset_0"] - BLOCK_BYTES, images_end + BLOCK_BYTES + padded(len(record_of(row)))

    for shard in _by_shard(rows, "offset_0"):
        yield _occupied(shard, "pair_key", [extent(row) for row in shard])


def tensor_shards(table: Table, key: str, without: frozenset[str]) -> Iterator[Occupied]:
    """Yield the shards of a table of latents or texts, by name; rows of the keys `without` count as gone."""
    rows = table.read([*SHARD, key, "offset", "length"], PLACED)
    for shard in _by_shard(rows, "offset"):
        live = [row for row in shard if row[key] not in without]
        extents = [(row["offset"] - BLOCK_BYTES, row["offset"] + padded(row["length"])) for row in live]
        yield _occupied(live or shard[:1], key, extents)


def padded(length: int) -> int:
    """Return the bytes that a payload takes in a tar."""
    return length + -length % BLOCK_BYTES


def _by_shard(rows: pa.Table, offset: str) -> Iterator[list[Row]]:
    rows = rows.sort_by([("shard", "ascending"), (offset, "ascending")]).combine_chunks()
    for start, end in runs(rows["shard"]):
        yield rows.slice(start, end - start).to_pylist()


def runs(column: pa.ChunkedArray) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each run of equal values; `group_by` would not keep the order of groups."""
    start = 0
    for end in pc.run_end_encode(column.combine_chunks()).run_ends.to_pylist() if len(column) else ():
        yield start, end
        start = end


def _occupied(rows: Sequence[Row], key: str, extents: list[tuple[int, int]]) -> Occupied:
    first = rows[0]
    keys = tuple(row[key] for row in rows[: len(extents)])
    return Occupied(first["shard"], first["shard_bytes"], first["shard_sha256"], keys, tuple(extents))
