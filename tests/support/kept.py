"""A small data set of pairs, made as ingest makes it but without Ray: units written and committed one by one."""

from pathlib import Path
from typing import Any

from factories import Row, write_parquet

from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.storage import Storage
from pipelines.ingest.committer import Committer
from pipelines.ingest.execution import pending_of, plan_units
from pipelines.ingest.pair_shards import write_unit
from pipelines.ingest.policy import Policy


def keep(storage: Storage, *files: Path, **settings: Any) -> int:
    """Ingest Pick-a-Pic parquet files; how many units were new."""
    sources = tuple(SourceConfig(format="pickapic", path=str(file)) for file in files)
    config = IngestConfig(sources=sources, max_drop_ratio=1.0, **{"max_shard_bytes": 65_536, **settings})
    units = pending_of(plan_units(config), storage)
    committer = Committer(pairs_table(storage), Policy.of(config))
    for unit in units:
        committer.append(unit.id, write_unit(unit, storage))
    return len(units)


def keep_rows(storage: Storage, file: Path, rows: list[Row], **settings: Any) -> int:
    """The same of rows, by way of a parquet file."""
    return keep(storage, write_parquet(file, rows, row_group_size=8), **settings)


def rows_in(storage: Storage, version: int | None = None) -> list[Row]:
    """All rows, by source."""
    rows = pairs_table(storage, version).read().to_pylist()
    return sorted(rows, key=lambda row: (row["source_uri"], row["source_row"]))


def images_in(storage: Storage, version: int | None = None) -> dict[str, tuple[bytes, bytes]]:
    """The image bytes of every pair that has a place, each held to its digest."""
    return {
        row["pair_key"]: tuple(
            storage.read_range(row["shard"], row[f"offset_{side}"], row[f"length_{side}"], row[f"image_{side}_sha256"])
            for side in (0, 1)
        )
        for row in rows_in(storage, version)
        if row["shard"]
    }
