"""Pick-a-Pic v1 and v2 parquet: `caption`, `jpg_0`, `jpg_1`, `label_0`, `label_1`, `has_label`.

Labels are float64 (0, 0.5, 1) in the official files and int64 in copies; both are read by value.
Source: research/mapo.md, section 2.1 (schema as published on the data set's card).
"""

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import SourceConfig
from pipelines.dataset.errors import SourceError
from pipelines.dataset.pair import Reason
from pipelines.sources.files import open_file, split_of_row
from pipelines.sources.source import SourceFile, SourceRow, Unit, UnitSettings, make_unit

REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL = ("has_label", "user_id", "split")
IMAGES = ("jpg_0", "jpg_1")
ROWS_A_BATCH = 64  # about 20 MB of JPEGs in memory
READ_BYTES = 8 << 20  # of a column at once; otherwise its whole part of a row group, often 150 MB
LABEL_TOLERANCE = 1e-6


class PickapicSource:
    """Rows of Pick-a-Pic parquet files."""

    format = "pickapic"
    suffixes = (".parquet",)

    def units(self, config: SourceConfig, file: SourceFile, settings: UnitSettings) -> list[Unit]:
        """Row groups gathered until their needed columns reach `max_shard_bytes`."""
        with open_file(file) as opened:
            parquet = pq.ParquetFile(opened)
            columns = self._columns(parquet, file)
            metadata = parquet.metadata
            wanted = [i for i in range(metadata.num_columns) if parquet.schema.column(i).path.split(".")[0] in columns]
            sizes = [
                sum(metadata.row_group(g).column(i).total_compressed_size for i in wanted)
                for g in range(metadata.num_row_groups)
            ]
            rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        units, start = [], 0
        while start < len(sizes):
            stop, size = start + 1, sizes[start]
            while stop < len(sizes) and size + sizes[stop] <= settings.max_shard_bytes:
                size += sizes[stop]
                stop += 1
            if num_rows := sum(rows[start:stop]):
                first_row = sum(rows[:start])
                units.append(
                    make_unit(config, file, settings, part=(start, stop), first_row=first_row, num_rows=num_rows)
                )
            start = stop
        return units

    def rows(self, unit: Unit) -> Iterator[SourceRow]:
        """The rows of a unit, in source order."""
        index = unit.first_row
        with open_file(unit.file) as opened:
            parquet = pq.ParquetFile(opened, buffer_size=READ_BYTES, pre_buffer=False)
            columns = self._columns(parquet, unit.file)
            groups = list(range(*unit.part))
            for batch in parquet.iter_batches(ROWS_A_BATCH, row_groups=groups, columns=columns):
                for values in pa.Table.from_batches([batch]).cast(_as_bytes(batch.schema)).to_pylist():
                    yield SourceRow(
                        row=index,
                        prompt=values["caption"],
                        image_0=values["jpg_0"],
                        image_1=values["jpg_1"],
                        label_0=read_label(values),
                        user_id=_text(values.get("user_id")),
                        split=split_of_row(unit.source.split, values.get("split"), unit.file.uri),
                    )
                    index += 1

    def _columns(self, parquet: pq.ParquetFile, file: SourceFile) -> list[str]:
        present = set(parquet.schema_arrow.names)
        if missing := [name for name in REQUIRED if name not in present]:
            raise SourceError(
                f"{file.uri} has no column {', '.join(missing)}; it has {', '.join(sorted(present))}",
                "is this Pick-a-Pic parquet? the `*_no_images` variants lack the images",
            )
        for name in IMAGES:
            kind = parquet.schema_arrow.field(name).type
            if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                raise SourceError(
                    f"column {name} of {file.uri} is {kind}, not the bytes of image files",
                    "store each image's encoded bytes as `binary`",
                )
        return [*REQUIRED, *(name for name in OPTIONAL if name in present)]


def _as_bytes(schema: pa.Schema) -> pa.Schema:
    """Text as bytes: what is not UTF-8 spoils its own row, not the others."""
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary)
    return pa.schema([f.with_type(pa.binary()) if any(is_text(f.type) for is_text in texts) else f for f in schema])


def _text(value: object) -> str | None:
    if value is None:
        return None
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def read_label(values: dict[str, Any]) -> float | Reason:
    """`label_0` as a probability, or why it cannot be read; by value, whatever its type, and never guessed."""
    if _is_false(values.get("has_label")) or values["label_0"] is None or values["label_1"] is None:
        return Reason.MISSING_LABEL
    try:
        label_0, label_1 = float(values["label_0"]), float(values["label_1"])
    except (TypeError, ValueError):
        return Reason.UNREADABLE_LABEL
    if not (math.isfinite(label_0) and math.isfinite(label_1) and 0 <= label_0 <= 1 and 0 <= label_1 <= 1):
        return Reason.UNREADABLE_LABEL
    if abs(label_0 + label_1 - 1) > LABEL_TOLERANCE:
        return Reason.INCONSISTENT_LABELS
    return label_0


def _is_false(value: object) -> bool:
    text = _text(value)
    return text is not None and text.strip().lower() in ("false", "0", "0.0", "no", "")
