"""Which pairs came before: each pair is kept once, in whatever order its images are listed."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.pair import PAIRS_SCHEMA, Reason, Status
from pipelines.dataset.table import Table

LABEL_TOLERANCE = 1e-6  # 1 - 0.7 is not 0.3
FIRST = pc.field("status").isin([str(Status.KEPT), str(Status.TIE)])
COLUMNS = ["pair_key", "image_0_sha256", "image_1_sha256", "label_0"]
SHARD_COLUMNS = ("shard", "shard_bytes", "shard_sha256", "offset_0", "length_0", "offset_1", "length_1")

Row = dict[str, Any]


class FirstPairs:
    """The first row of every pair in the table: its key, and the label as seen from the image of smaller digest.

    Kept in memory, about 130 bytes a pair, so that a unit costs what it holds and not what the table holds. Read
    anew only when others have written to the table as well.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._version: int | None = None
        self._labels: dict[bytes, float] = {}

    def append(self, unit: str, rows: pa.Table) -> pa.Table:
        """Mark what came before, commit the unit, and give its rows as they were committed."""
        self._catch_up()
        seen: dict[bytes, float] = {}
        marked = pa.Table.from_pylist([self._mark(row, seen) for row in rows.to_pylist()], schema=PAIRS_SCHEMA)
        committed = self._table.append(unit, marked)
        version = self._table.version
        if committed and version == (0 if self._version is None else self._version + 1):
            self._labels.update(seen)
            self._version = version
        return marked

    def _catch_up(self) -> None:
        if (version := self._table.version) == self._version:
            return
        self._labels = {}
        for batch in self._table.batches(COLUMNS, FIRST):
            self._labels.update((_key(row), _canonical(row)) for row in batch.to_pylist())
        self._version = version

    def _mark(self, row: Row, seen: dict[bytes, float]) -> Row:
        """The row, as a duplicate if its pair is known; one whose label says otherwise has a reason of its own."""
        if row["pair_key"] is None:
            return row
        key, label = _key(row), _canonical(row)
        first = self._labels.get(key, seen.get(key))
        if first is None:
            seen[key] = label
            return row
        reason = Reason.REPEATED if abs(label - first) <= LABEL_TOLERANCE else Reason.CONFLICTING_LABEL
        return row | dict.fromkeys(SHARD_COLUMNS) | {"status": str(Status.DUPLICATE), "reason": str(reason)}


def _key(row: Row) -> bytes:
    return bytes.fromhex(row["pair_key"])


def _canonical(row: Row) -> float:
    """The label as seen from the image of smaller digest: the same whichever image is listed first."""
    label = float(row["label_0"])
    return label if row["image_0_sha256"] <= row["image_1_sha256"] else 1.0 - label
