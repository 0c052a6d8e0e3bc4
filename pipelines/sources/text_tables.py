"""Text tables (CSV and TSV) as a container: the first line names the columns, and an empty cell is missing."""

import csv
import io
from collections.abc import Iterator, Sequence
from functools import lru_cache

from pipelines.dataset.errors import SourceError
from pipelines.sources.files import open_file
from pipelines.sources.kind import BROKEN, Record
from pipelines.sources.records import FILES_PARSED, MakeUnit, Names, plan_records
from pipelines.sources.unit import SourceFile, SourceUnit

MAX_CELL_CHARACTERS = 1 << 27  # an image in base64; Python's own limit is 131,072


class TextTable:
    """Rows of text; parsed once for each process and state of the file.

    Args:
        delimiter: The character between two cells.
    """

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter

    def names(self, file: SourceFile) -> list[str]:
        """Return the columns."""
        return _parsed(file, self._delimiter)[0]

    def seen(self, file: SourceFile) -> list[str]:
        """Return nothing: `names` has them all."""
        return []

    def plan(
        self, file: SourceFile, names: Sequence[str], max_bytes: int, group_by: str | None, make_unit: MakeUnit
    ) -> list[SourceUnit]:
        """Plan as for JSON: the images lie elsewhere."""
        return plan_records(_parsed(file, self._delimiter)[1], group_by, make_unit)

    def records(self, unit: SourceUnit, names: Names, images: frozenset[str]) -> Iterator[tuple[int, Record]]:
        """Yield the records of the range."""
        _, records = _parsed(unit.file, self._delimiter)
        yield from ((number, dict(records[number])) for number in range(*unit.part))


@lru_cache(FILES_PARSED)
def _parsed(file: SourceFile, delimiter: str) -> tuple[list[str], list[Record]]:
    """Return the columns and the records. Text that is not UTF-8 affects only its own cell."""
    csv.field_size_limit(max(MAX_CELL_CHARACTERS, csv.field_size_limit()))
    with open_file(file) as opened:
        text = opened.read().decode("utf-8-sig", errors="surrogateescape")
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
        except csv.Error as error:
            raise ValueError(f"not a valid table: {error}") from error
    columns = rows[0] if rows else []
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise SourceError(f"{file.uri} has the column {twice} twice", "rename one of them in the file's first line")
    return columns, [_record(columns, row) for row in rows[1:]]


def _record(columns: list[str], row: list[str]) -> Record:
    if len(row) != len(columns):
        return {BROKEN: f"{len(row)} cells under {len(columns)} columns"}
    return {name: cell or None for name, cell in zip(columns, row, strict=True)}
