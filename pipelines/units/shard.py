"""The shard that a unit writes, and the table row of each of its members."""

import contextlib

import pyarrow as pa

from pipelines.dataset.pair import Reason, Status
from pipelines.dataset.shard import ShardWriter
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import Row
from pipelines.units.stats import Effort


class UnitShard:
    """The shard of one unit: written to a local file, then uploaded; a unit without members has no shard.

    Args:
        storage: The storage of the shard.
        name: The shard's name on it.
        unit: The unit's id, recorded in every row.
        schema: Schema of the table for the rows.
        effort: Counts the time of the upload.
    """

    def __init__(self, storage: Storage, name: str, unit: str, schema: pa.Schema, effort: Effort) -> None:
        self._storage, self._name, self._unit, self._schema, self._effort = storage, name, unit, schema, effort
        self._rows: list[Row] = []
        self._num_members = 0

    def __enter__(self) -> "UnitShard":
        self._open = contextlib.ExitStack()
        self._file = self._open.enter_context(self._storage.unfinished(self._name))
        self._out = self._open.enter_context(self._file.open("wb"))
        self._writer = ShardWriter(self._out)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def keep(self, row: Row, name: str, data: bytes) -> None:
        """Append a member, named `<key>.<part>`, and its row."""
        member = self._writer.add(name, data)
        self._num_members += 1
        place = {name: getattr(member, name) for name in ("offset", "length", "sha256", "crc32")}
        self._rows.append({**row, **place, "status": str(Status.KEPT), "unit": self._unit, "shard": self._name})

    def attach(self, name: str, data: bytes) -> None:
        """Append another member of the item that `keep` was last called for; it has no row of its own."""
        self._writer.add(name, data)

    def quarantine(self, row: Row, reason: Reason) -> None:
        """Add the row of an item that is not kept, with the reason."""
        self._rows.append({**row, "status": str(Status.QUARANTINED), "reason": str(reason), "unit": self._unit})

    def publish(self) -> pa.Table:
        """Close and upload the shard; return its rows for the commit."""
        sha256 = self._writer.close()
        if self._num_members:
            with self._effort.measured("upload"):
                self._storage.upload(self._name, self._file)
        for row in self._rows:
            if row.get("shard"):
                row.update(shard_bytes=self._writer.num_bytes, shard_sha256=sha256)
        return pa.Table.from_pylist(self._rows, schema=self._schema)
