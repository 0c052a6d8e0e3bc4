"""The one shard that a unit of encoding writes: tensors as safetensors members, and the table row of each.

Bytes are a pure function of names, numbers and order: safetensors itself writes its metadata in an order that
changes from call to call.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.dataset.pair import Reason, Status
from pipelines.dataset.shard import ShardWriter
from pipelines.dataset.storage import Storage
from pipelines.units.effort import Effort

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]


def pack(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as one safetensors file, the same bytes every time."""
    from safetensors.torch import save

    data = save(dict(tensors), dict(metadata) if metadata else None)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[start:]


class UnitShard:
    """Gather the members of one unit in a local file, then upload it; a unit without members has no shard.

    Args:
        storage: Where the shard goes.
        name: Its name there.
        unit: Noted in every row.
        schema: Of the table that the rows are for.
        effort: Where the time of the upload is counted.
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

    def keep(self, row: Row, key: str, data: bytes) -> None:
        """Append a member and its row."""
        member = self._writer.add(f"{key}.safetensors", data)
        self._num_members += 1
        place = {name: getattr(member, name) for name in ("offset", "length", "sha256", "crc32")}
        self._rows.append({**row, **place, "status": str(Status.KEPT), "unit": self._unit, "shard": self._name})

    def quarantine(self, row: Row, reason: Reason) -> None:
        """Note what is not kept, and why."""
        self._rows.append({**row, "status": str(Status.QUARANTINED), "reason": str(reason), "unit": self._unit})

    def publish(self) -> pa.Table:
        """Close and upload the shard; returns its rows for the commit."""
        sha256 = self._writer.close()
        if self._num_members:
            with self._effort.measured("upload"):
                self._storage.upload(self._name, self._file)
        for row in self._rows:
            if row.get("shard"):
                row.update(shard_bytes=self._writer.num_bytes, shard_sha256=sha256)
        return pa.Table.from_pylist(self._rows, schema=self._schema)


def to_ipc(rows: pa.Table) -> bytes:
    """Rows as Arrow IPC bytes, to travel in one cell of a Ray Data row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as out:
        out.write_table(rows)
    return bytes(sink.getvalue().to_pybytes())


def from_ipc(data: bytes) -> pa.Table:
    """The rows that `to_ipc` wrote."""
    return pa.ipc.open_stream(data).read_all()
