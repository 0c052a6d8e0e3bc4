"""From the rounds of a model to the pairs and source rows that it was trained on, as a stream of rows."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestration.rounds.seen_pairs import TrainedRound, seen_pairs
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.key_map import KeyMap, keys_of
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import Reason, Status
from pipelines.dataset.storage import Storage, absolute_url
from pipelines.dataset.values import JsonObject
from training.spec import Snapshot

REMOVED = pc.field("reason") == str(Reason.REMOVED)
ROWS_SCHEMA = pa.schema(
    [
        ("pair_key", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("source_uri", pa.string()),
        ("source_row", pa.int64()),
        ("label_0", pa.float64()),  # in the snapshot of that round
        ("split", pa.string()),
        ("unit", pa.string()),
        ("shard", pa.string()),
        ("first_round", pa.int32()),  # that trained on it
        ("removed", pa.bool_()),  # since, by `mapo data remove`
    ]
)
"""One row per pair that a model was trained on."""


@dataclass
class Survey:
    """Counts of what a model was trained on, over all its rounds.

    Args:
        rounds: By number: pairs in the snapshot, pairs trained on, and pairs trained on for the first time.
        sources: By format and URI: rows by split and status in the last round's snapshot; `trained_on` and `removed`
            count pairs that were trained on, and those of them that were removed since.
    """

    rounds: dict[int, dict[str, int]] = field(default_factory=dict)
    sources: dict[tuple[str, str], JsonObject] = field(default_factory=dict)

    def source(self, name: str, uri: str) -> JsonObject:
        """Return the counts of one source."""
        return self.sources.setdefault((name, uri), {"rows": {}, "trained_on": 0, "removed": 0})


def survey(storage: Storage, rounds: Sequence[TrainedRound], rows: str | None = None) -> Survey:
    """Count the pairs that the rounds were trained on, and optionally write a row for each.

    Args:
        storage: The data set's storage.
        rounds: The rounds, from the first on.
        rows: Also write a row per pair to this new parquet file; a path or an fsspec URL.

    Raises:
        ConfigError: The file already exists, or its name does not end with .parquet.
        SnapshotError: A version that a round read no longer exists.
        StorageError: The tables cannot be read, or the file cannot be written.
    """
    found, first = Survey(), KeyMap()
    for each in rounds:
        before, seen = len(first), seen_pairs(storage, each)
        trained = seen.keys[seen.is_seen]
        first.add(trained, np.full(len(trained), each.number, np.float32))
        counted = {"pairs": len(seen.keys), "trained_on": len(trained), "first_time": len(first) - before}
        found.rounds[each.number] = counted
        del seen, trained
    gone = _removed(storage)
    with tempfile.TemporaryDirectory(prefix="mapo-lineage-") as work:
        file, place, name = Path(work) / "rows.parquet", *_target(rows)
        with pq.ParquetWriter(file, ROWS_SCHEMA) as writer:
            for part in _trained_rows(storage, rounds, first, gone):
                for row in (
                    part.group_by(["source", "source_uri"])
                    .aggregate([([], "count_all"), ("removed", "sum")])
                    .to_pylist()
                ):
                    counts = found.source(row["source"], row["source_uri"])
                    counts["trained_on"] += row["count_all"]
                    counts["removed"] += row["removed_sum"] or 0
                if rows is not None:
                    writer.write_table(part)
        if place is not None:
            place.upload(name, file)
    _count_rows(storage, rounds[-1].snapshot, found)
    return found


def _target(rows: str | None) -> tuple[Storage | None, str]:
    if rows is None:
        return None, ""
    parent, _, name = absolute_url(rows).rpartition("/")
    place = Storage(parent or "/")
    if not name.endswith(".parquet"):
        raise ConfigError(f"--rows {rows}: not the name of a parquet file", "give a name that ends with .parquet")
    if place.exists(name):
        raise ConfigError(f"{place.uri(name)} already exists", "give a new file")
    return place, name


def _removed(storage: Storage) -> KeyMap:
    """Return the keys of pairs that are removed in the newest version."""
    gone = KeyMap()
    for batch in pairs_table(storage).batches(["pair_key"], REMOVED & pc.field("pair_key").is_valid()):
        keys = keys_of(batch["pair_key"])
        gone.add(keys, np.ones(len(keys), np.float32))
    return gone


def _trained_rows(storage: Storage, rounds: Sequence[TrainedRound], first: KeyMap, gone: KeyMap) -> Iterator[pa.Table]:
    """Yield a row per pair, from the snapshot of the round that trained on it first."""
    names = [name for name in ROWS_SCHEMA.names if name not in ("first_round", "removed")]
    for each in rounds:
        for batch in pairs_table(storage, each.snapshot.pairs_version).batches(names, each.pairs):
            keys = keys_of(batch["pair_key"])
            is_here = first.get(keys) == each.number
            if is_here.any():
                rows = pa.Table.from_batches([batch.filter(pa.array(is_here))])
                rows = rows.append_column("first_round", pa.array(np.full(rows.num_rows, each.number, np.int32)))
                rows = rows.append_column("removed", pa.array(~np.isnan(gone.get(keys[is_here]))))
                yield rows.select(ROWS_SCHEMA.names).cast(ROWS_SCHEMA)


def _count_rows(storage: Storage, snapshot: Snapshot, found: Survey) -> None:
    """Count the rows read, by source, split and status."""
    names = ["source", "source_uri", "split", "status"]
    counted: Counter[tuple[str, str, str, str]] = Counter()
    for batch in pairs_table(storage, snapshot.pairs_version).batches(names):
        counts = pa.Table.from_batches([batch]).group_by(names).aggregate([([], "count_all")])
        for row in counts.to_pylist():
            counted[row["source"], row["source_uri"], row["split"] or "none", row["status"]] += row["count_all"]
    for (source, uri, split, status), count in sorted(counted.items()):
        found.source(source, uri)["rows"].setdefault(split, {})[status] = count


def find_pair(storage: Storage, rounds: Sequence[TrainedRound], asked: str) -> list[JsonObject]:
    """Describe what the rounds did with a pair, or with the pairs of a source row.

    Args:
        storage: The data set's storage.
        rounds: The rounds, from the first on.
        asked: A `pair_key`, or `URI#ROW` with the table's values.

    Returns:
        For each pair its key, whether it was removed since, its rows in the newest version, and for each round
        `in_snapshot` (whether it could be trained on), `trained_on`, and the status, split and label of its row there.

    Raises:
        ConfigError: `asked` is neither a key nor a row.
        SnapshotError: A version that a round read no longer exists.
    """
    where = _condition(asked)
    versions = {each.snapshot.pairs_version for each in rounds}
    keys = {key for version in (*versions, None) for key in _keys(storage, version, where)}
    seen = {each.number: seen_pairs(storage, each) for each in rounds} if keys else {}
    return [
        _pair(storage, rounds, key, {number: pairs.has(key) for number, pairs in seen.items()}) for key in sorted(keys)
    ]


def _condition(asked: str) -> Any:
    if len(asked) == 32 and not set(asked) - set("0123456789abcdef"):
        return pc.field("pair_key") == asked
    uri, _, row = asked.rpartition("#")
    if not uri or not row.isdigit():
        raise ConfigError(
            f"--pair {asked}: neither a pair_key nor a source row",
            "give 32 hex digits, or URI#ROW such as data/a.parquet#17",
        )
    return pc.field("source_uri").isin([uri, absolute_url(uri)]) & (pc.field("source_row") == int(row))


def _keys(storage: Storage, version: int | None, where: Any) -> list[str]:
    rows = pairs_table(storage, version).read(["pair_key"], where & pc.field("pair_key").is_valid())
    return list(rows["pair_key"].unique().to_pylist())


def _pair(storage: Storage, rounds: Sequence[TrainedRound], key: str, seen: dict[int, bool | None]) -> JsonObject:
    columns, of_key = ["status", "reason", "split", "label_0", "source_uri", "source_row"], pc.field("pair_key") == key
    now = pairs_table(storage).read(columns, of_key).to_pylist()
    of_rounds = []
    for each in rounds:
        rows = pairs_table(storage, each.snapshot.pairs_version).read(columns, of_key).to_pylist()
        row = next((row for row in rows if row["status"] == str(Status.KEPT)), rows[0] if rows else {})
        is_seen = seen[each.number]
        use = {"round": each.number, "in_snapshot": is_seen is not None, "trained_on": bool(is_seen)}
        of_rounds.append(use | {name: row.get(name) for name in ("status", "reason", "split", "label_0")})
    removed = any(row["reason"] == str(Reason.REMOVED) for row in now)
    return {"pair_key": key, "removed": removed, "rounds": of_rounds, "rows": now}
