"""Samples of noise, written as the stage writes drawn ones, for tests that draw nothing."""

import io

import numpy as np
import pyarrow as pa

from orchestration.stages.evaluation import Cell
from pipelines.dataset.layout import SAMPLES, SAMPLES_SCHEMA, samples_table
from pipelines.dataset.shard import ShardWriter
from pipelines.dataset.storage import Storage
from pipelines.samples.png import to_png


def put_samples(storage: Storage, cell: Cell, seed: int) -> None:
    """Write samples as the stage does, one shard and one commit; their pixels are noise."""
    out, rng = io.BytesIO(), np.random.default_rng(seed)
    writer, wanted = ShardWriter(out), cell.drawing.wanted.to_pylist()
    pixels = rng.integers(0, 256, (len(wanted), 64, 64, 3), np.uint8)
    members = [writer.add(f"{row['sample_key']}.png", to_png(image)) for row, image in zip(wanted, pixels, strict=True)]
    writer.close()
    shard = f"{SAMPLES}/{cell.drawing.fingerprint}/unit.tar"
    storage.write(shard, out.getvalue())
    rows = [
        row | {"status": "kept", "shard": shard, "offset": member.offset, "length": member.length,
               "sha256": member.sha256, "width": 64, "height": 64}
        for row, member in zip(wanted, members, strict=True)
    ]  # fmt: skip
    table = samples_table(storage, cell.drawing.fingerprint)
    table.append("0" * 32, pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA))
