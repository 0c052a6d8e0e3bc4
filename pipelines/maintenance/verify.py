"""Verify: checks every committed shard against the digests in the tables, reading each object once."""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import MapoError, SnapshotError
from pipelines.dataset.layout import LATENTS, TEXT, fingerprints, latents_table, pairs_table, text_table
from pipelines.dataset.pair import PAIR
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.maintenance.occupancy import runs
from pipelines.units.prefetch import in_parallel

BLOCK_BYTES = 8 << 20  # in memory at once for each reader
COMMITTED = pc.field("shard").is_valid()
HAS_SIDE = {0: COMMITTED, 1: COMMITTED & pc.field("offset_1").is_valid()}
"""Rows with this image in a shard: a single image has no image 1."""


@dataclass(frozen=True)
class CommittedShard:
    """A shard according to the table's rows."""

    name: str
    num_bytes: int
    sha256: str
    members: pa.Table
    """Rows of `what` (for people), `offset`, `length`, and the payload's `sha256` and, if known, `crc32`."""


def committed_shards(storage: Storage) -> list[CommittedShard]:
    """List every shard that a committed row points to: pairs, latents and texts of all fingerprints, by name.

    Raises:
        SnapshotError: There is no data set.
    """
    if pairs_table(storage).version is None:
        raise SnapshotError(
            f"there is no data set at {storage.url}", "`mapo ingest CONFIG` creates one; is the storage URL right?"
        )
    found = list(_shards(pa.concat_tables([_images(pairs_table(storage), side) for side in (0, 1)])))
    for fingerprint in fingerprints(storage, LATENTS):
        found += _shards(_tensors(latents_table(storage, fingerprint), "latents of pair ", "pair_key"))
    for fingerprint in fingerprints(storage, TEXT):
        found += _shards(_tensors(text_table(storage, fingerprint), "embedding of prompt ", "prompt_id"))
    return found


def verify(storage: Storage, shards: Sequence[CommittedShard] | None = None, *, on_cluster: bool = False) -> list[str]:
    """List every difference from what was committed, one per line, in the order of the shards.

    Args:
        storage: The data set's storage.
        shards: The shards to check; all by default.
        on_cluster: Read them on the Ray cluster that this process is connected to, not in its own threads.

    Raises:
        SnapshotError: There is no data set.
    """
    wanted = committed_shards(storage) if shards is None else shards
    found = in_parallel(partial(_differences_of, storage), wanted, on_cluster=on_cluster)
    return [line for lines in found for line in lines]


def _differences_of(storage: Storage, shard: CommittedShard) -> list[str]:
    return list(_differences(storage, shard))


def _differences(storage: Storage, shard: CommittedShard) -> Iterator[str]:
    place, num_rows = storage.uri(shard.name), shard.members.num_rows
    try:
        if not storage.exists(shard.name):
            yield f"{place}: missing, with {num_rows:,} members that rows point to"
            return
        num_bytes = storage.size(shard.name)
        sha256, payloads, checksums = _digests(storage, shard, num_bytes)
    except MapoError as error:
        yield f"{place}: {error.message}"
        return
    if num_bytes != shard.num_bytes:
        yield f"{place}: {num_bytes:,} bytes, but {shard.num_bytes:,} were committed"
    elif sha256 != shard.sha256:
        yield f"{place}: sha256 is {sha256}, but {shard.sha256} was committed"
    for member, payload, crc32 in zip(shard.members.to_pylist(), payloads, checksums, strict=True):
        where = f"{place}: {member['what']} at {member['offset']:,}"
        if member["offset"] + member["length"] > num_bytes:
            yield f"{where} ends at {member['offset'] + member['length']:,}, past the end at {num_bytes:,}"
        elif payload != member["sha256"]:
            yield f"{where}: sha256 is {payload}, but {member['sha256']} was committed"
        elif member["crc32"] not in (None, crc32):
            yield f"{where}: the bytes are as committed, but their CRC-32 is {crc32}, not {member['crc32']}"


def _digests(storage: Storage, shard: CommittedShard, num_bytes: int) -> tuple[str, list[str], list[int]]:
    """Return the digest of the object, and digest and CRC-32 of each member's range, from one pass over the object."""
    whole = hashlib.sha256()
    starts, lengths = shard.members["offset"].to_pylist(), shard.members["length"].to_pylist()
    payloads, checksums = [hashlib.sha256() for _ in starts], [0 for _ in starts]
    first = 0  # members before this one end before the block; they are sorted by offset
    for start in range(0, num_bytes, BLOCK_BYTES):
        block = memoryview(storage.read_range(shard.name, start, min(BLOCK_BYTES, num_bytes - start)))
        whole.update(block)
        while first < len(starts) and starts[first] + lengths[first] <= start:
            first += 1
        for i in range(first, len(starts)):
            if starts[i] >= start + len(block):
                break
            part = block[max(0, starts[i] - start) : max(0, starts[i] + lengths[i] - start)]
            payloads[i].update(part)
            checksums[i] = zlib.crc32(part, checksums[i])
    return whole.hexdigest(), [payload.hexdigest() for payload in payloads], checksums


def _images(table: Table, side: int) -> pa.Table:
    columns = ["shard", "shard_bytes", "shard_sha256", "pair_key"]
    columns += [f"offset_{side}", f"length_{side}", f"image_{side}_sha256"]
    rows = table.read([*columns, "kind"], HAS_SIDE[side])
    is_pair = pc.equal(pc.fill_null(rows["kind"], PAIR), PAIR)
    what = pc.if_else(is_pair, f"image {side} of pair ", "single image ")
    return _members(rows.drop_columns("kind").append_column("crc32", pa.nulls(rows.num_rows, pa.int64())), what)


def _tensors(table: Table, what: str, key: str) -> pa.Table:
    columns = ["shard", "shard_bytes", "shard_sha256", key, "offset", "length", "sha256", "crc32"]
    return _members(table.read(columns, COMMITTED), what)


def _members(rows: pa.Table, what: str | pa.ChunkedArray) -> pa.Table:
    rows = rows.rename_columns(["shard", "shard_bytes", "shard_sha256", "what", "offset", "length", "sha256", "crc32"])
    return rows.set_column(3, "what", pc.binary_join_element_wise(what, rows["what"], ""))


def _shards(members: pa.Table) -> Iterator[CommittedShard]:
    """Yield the members gathered by shard."""
    identity = ["shard", "shard_bytes", "shard_sha256"]
    members = members.sort_by([(name, "ascending") for name in [*identity, "offset"]]).combine_chunks()
    same = pc.binary_join_element_wise(
        members["shard"], members["shard_bytes"].cast(pa.string()), members["shard_sha256"], " "
    )
    for start, end in runs(same):
        rows = members.slice(start, end - start)
        first = rows.slice(0, 1).to_pylist()[0]
        yield CommittedShard(first["shard"], first["shard_bytes"], first["shard_sha256"], rows.drop_columns(identity))
