"""Arrow tables as bytes, to travel in one cell of a Ray Data row."""

import pyarrow as pa


def to_ipc(rows: pa.Table) -> bytes:
    """Return the rows as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as out:
        out.write_table(rows)
    return bytes(sink.getvalue().to_pybytes())


def from_ipc(data: bytes) -> pa.Table:
    """Read the output of `to_ipc`."""
    return pa.ipc.open_stream(data).read_all()
