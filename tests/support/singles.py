"""Single images with verdicts, as rows and files of the format `judged`, ingested without Ray."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from encode_steps import ingest_in_process
from factories import SIZES, Row, encoded, picture

from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset.storage import Storage

JUDGED_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("prompt", pa.string()),
        ("good", pa.bool_()),
        ("prior", pa.bool_()),
        ("weight", pa.float64()),
        ("split", pa.string()),
    ]
)


def judged_rows(num_good: int, num_bad: int, num_prior: int = 0, *, seed: int = 0) -> list[Row]:
    """Good images, then bad ones, then images of a class."""
    rng = np.random.default_rng(seed)
    verdicts: list[Row] = [{"good": True}] * num_good + [{"good": False}] * num_bad + [{"prior": True}] * num_prior
    return [
        {"image": encoded(picture(rng, *SIZES[i % len(SIZES)]), "PNG"), "prompt": f"single {seed} {i}", **verdict}
        for i, verdict in enumerate(verdicts)
    ]


def write_judged(file: Path, rows: Sequence[Row], row_group_size: int = 64) -> Path:
    """Rows as a parquet file; columns that no row has are null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=JUDGED_SCHEMA), file, row_group_size=row_group_size)
    return file


def ingest(storage: Storage, *sources: SourceConfig | Path, **settings: Any) -> None:
    """Ingest sources; a file is one of the format `judged`."""
    configs = [SourceConfig(format="judged", path=str(each)) if isinstance(each, Path) else each for each in sources]
    settings = {"max_drop_ratio": 1.0, "max_shard_bytes": 65_536, "validation_ratio": 0.0, **settings}
    ingest_in_process(IngestConfig(sources=tuple(configs), **settings), storage)
