"""Compact: rewrites shards without the members that no row references, and updates the rows in one commit.

A new shard is named by its bytes and written next to the old one; nobody sees it before the commit, and after the
commit only older versions of the table need the old one. `gc` deletes leftovers, including those of a crash.
"""

import hashlib
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import ShardCorrupt, SnapshotError
from pipelines.dataset.layout import LATENTS, SHARDS, TEXT, fingerprints, latents_table, pairs_table, text_table
from pipelines.dataset.pair import Reason
from pipelines.dataset.shard import Member, ShardWriter
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.maintenance.occupancy import Occupied, pair_shards, tensor_shards
from pipelines.maintenance.remove import PRESENT
from pipelines.units.prefetch import in_parallel

BLOCK_BYTES = 8 << 20
REMOVED = pc.field("reason") == str(Reason.REMOVED)


@dataclass(frozen=True)
class Rewritten:
    """An old shard and its replacement, which is None if no members are live."""

    old: Occupied
    name: str | None = None
    num_bytes: int = 0
    sha256: str = ""
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Compacted:
    """The result for one table and its shards."""

    what: str
    num_rewritten: int
    bytes_before: int
    """Bytes of the shards that were rewritten."""
    bytes_after: int
    rows_deleted: int
    files_before: int
    """Number of parquet files of the table."""
    files_after: int


def compact(storage: Storage, *, on_cluster: bool = False) -> Iterator[Compacted]:
    """Compact pairs, then latents and texts of every fingerprint; each is committed before the next begins.

    Args:
        storage: The data set's storage.
        on_cluster: Rewrite on the Ray cluster that this process is connected to, not in its own threads.

    Raises:
        SnapshotError: There is no data set.
        ShardCorrupt: A shard to rewrite differs from what was committed.
        StorageError: A read, a write or a commit failed.
    """
    pairs = pairs_table(storage)
    if pairs.version is None:
        raise SnapshotError(
            f"there is no data set at {storage.url}", "`mapo ingest CONFIG` creates one; is the storage URL right?"
        )
    storage.check_writable()
    rewritten = _rewrite(storage, pair_shards(pairs), SHARDS, on_cluster)
    _commit(pairs, "pair_key", rewritten, _places(rewritten, {"0": "offset_0", "1": "offset_1"}), frozenset())
    yield _report("pairs", pairs, rewritten, 0)
    for what, folder, key, table_of in (
        ("latents", LATENTS, "pair_key", latents_table),
        ("text", TEXT, "prompt_id", text_table),
    ):
        gone = _gone(pairs, key)
        for fingerprint in fingerprints(storage, folder):
            table = table_of(storage, fingerprint)
            if table.version is not None:
                yield _compact_tensors(storage, table, f"{folder}/{fingerprint}", what, key, gone, on_cluster)


def _gone(pairs: Table, key: str) -> frozenset[str]:
    """Return the keys of removed rows that no other row has."""
    removed = pairs.read([key], REMOVED)[key].drop_null().unique()
    if not len(removed):
        return frozenset()
    rest = pairs.read([key], pc.field(key).isin(removed) & PRESENT)
    return frozenset(removed.to_pylist()) - frozenset(rest[key].to_pylist())


def _rewrite(storage: Storage, shards: Iterable[Occupied], folder: str, on_cluster: bool) -> list[Rewritten]:
    found = in_parallel(partial(_rewritten, storage, folder), list(shards), on_cluster=on_cluster)
    return [shard for shard in found if shard is not None]


def _rewritten(storage: Storage, folder: str, shard: Occupied) -> Rewritten | None:
    """Rewrite the shard; return None if everything in it is needed."""
    if not shard.keys:
        return Rewritten(shard)
    if not shard.has_dead_members(storage):
        return None
    with tempfile.TemporaryDirectory(prefix="mapo-compact-") as work:
        old, new = Path(work) / "old.tar", Path(work) / "new.tar"
        _download(storage, shard, old)
        members = []
        wanted = frozenset(shard.keys)
        with old.open("rb") as opened, new.open("wb") as out:
            writer = ShardWriter(out)
            for name, payload in _members(opened):
                if name.partition(".")[0] in wanted:
                    members.append(writer.add(name, payload))
            sha256 = writer.close()
        if sha256 == shard.sha256:
            return None
        if missing := wanted - {member.name.partition(".")[0] for member in members}:
            raise ShardCorrupt(
                f"{len(missing):,} of {len(wanted):,} keys that rows point to are missing in {storage.uri(shard.name)}",
                "`mapo data verify` lists what is damaged",
            )
        # Always put, even if it is there: a leftover must not look old to a `gc` at the same time.
        name = f"{folder}/{sha256[:32]}.tar"
        storage.upload(name, new)
    return Rewritten(shard, name, writer.num_bytes, sha256, tuple(members))


def _members(opened: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield name and payload of every member. `tarfile.open` may mistake an unreadable header for the end."""
    while any(header := opened.read(tarfile.BLOCKSIZE)):
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        payload = opened.read(info.size)
        opened.seek(-info.size % tarfile.BLOCKSIZE, 1)
        yield info.name, payload


def _download(storage: Storage, shard: Occupied, file: Path) -> None:
    """Download the shard and check its digest: a damaged one must not get a fresh digest."""
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for start in range(0, shard.num_bytes, BLOCK_BYTES):
            block = storage.read_range(shard.name, start, min(BLOCK_BYTES, shard.num_bytes - start))
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != shard.sha256:
        raise ShardCorrupt(
            f"{storage.uri(shard.name)}: sha256 is {digest.hexdigest()}, but {shard.sha256} was committed",
            "`mapo data verify` lists what is damaged; restore the object from a copy before you compact",
        )


def _places(rewritten: Iterable[Rewritten], offsets: dict[str, str]) -> pa.Table:
    """Return one row for each moved key: where it was, and where its members are now.

    Args:
        rewritten: Shards with live members.
        offsets: The first word of a member's extension, and the column of its offset.
    """
    columns: dict[str, list[object]] = {
        name: [] for name in ("key", "old", "shard", "shard_bytes", "shard_sha256", *offsets.values())
    }
    for shard in rewritten:
        places = {tuple(member.name.split(".")[:2]): member.offset for member in shard.members}
        for key in shard.old.keys if shard.name else ():
            columns["key"].append(key)
            columns["old"].append(shard.old.name)
            columns["shard"].append(shard.name)
            columns["shard_bytes"].append(shard.num_bytes)
            columns["shard_sha256"].append(shard.sha256)
            for part, column in offsets.items():
                columns[column].append(places.get((key, part)))  # a single image has no part 1
    is_text = ("key", "old", "shard", "shard_sha256")
    return pa.table({n: pa.array(v, pa.string() if n in is_text else pa.int64()) for n, v in columns.items()})


def _commit(table: Table, key: str, rewritten: list[Rewritten], places: pa.Table, gone: frozenset[str]) -> None:
    """Delete the rows of dropped keys and update those of moved ones. A pair removed meanwhile stays removed."""
    deleted = pa.array(sorted(gone), pa.string())
    moved_from = pa.array([shard.old.name for shard in rewritten if shard.name], pa.string())

    def change(rows: pa.Table) -> pa.Table:
        rows = rows.filter(pc.invert(pc.is_in(rows[key], deleted)))
        place = pc.index_in(rows[key], places["key"].combine_chunks())
        moved = pc.fill_null(pc.equal(places["old"].take(place), rows["shard"]), False)
        for name in places.column_names[2:]:
            changed = pc.if_else(moved, places[name].take(place), rows[name])
            rows = rows.set_column(rows.column_names.index(name), name, changed)
        return rows

    table.rewrite(change, pc.field("shard").isin(moved_from) | pc.field(key).isin(deleted), name="compact")


def _compact_tensors(
    storage: Storage, table: Table, folder: str, what: str, key: str, gone: frozenset[str], on_cluster: bool
) -> Compacted:
    rewritten = _rewrite(storage, tensor_shards(table, key, gone), folder, on_cluster)
    num_gone = table.count_rows(pc.field(key).isin(pa.array(sorted(gone), pa.string())))
    _commit(table, key, rewritten, _places(rewritten, {"safetensors": "offset"}), gone)
    return _report(f"{what} {folder.rsplit('/', 1)[1]}", table, rewritten, num_gone)


def _report(what: str, table: Table, rewritten: list[Rewritten], rows_deleted: int) -> Compacted:
    before, after = table.merge_files()
    return Compacted(
        what,
        len(rewritten),
        sum(shard.old.num_bytes for shard in rewritten),
        sum(shard.num_bytes for shard in rewritten),
        rows_deleted,
        before,
        after,
    )
