"""Reads source files: finds the columns of a kind in a file, plans units, reads records and fetches images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

from pipelines.dataset.errors import SourceError
from pipelines.dataset.status import Reason
from pipelines.sources.cells import Cells
from pipelines.sources.config import SourceConfig
from pipelines.sources.containers import FOLDER_SUFFIXES, container_of
from pipelines.sources.files import split_of_row
from pipelines.sources.kind import BROKEN, WEIGHT, Draft, Field, Record, SourceKind
from pipelines.sources.labels import read_weight, text_of
from pipelines.sources.registry import KINDS
from pipelines.sources.unit import SourceFile, SourceRow, SourceUnit, UnitSettings, make_unit

ReadImage = Callable[[object], bytes | Reason | None]
"""Returns the bytes of an image's cell."""


class SourceReader:
    """Reads the files of one kind of source, in any container.

    Args:
        kind: The columns, and how a record becomes rows.
    """

    def __init__(self, kind: SourceKind) -> None:
        self._kind = kind

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files that are read from a folder."""
        return self._kind.suffixes or FOLDER_SUFFIXES

    def units(self, config: SourceConfig, file: SourceFile, settings: UnitSettings) -> list[SourceUnit]:
        """Plan the units of a file, in order."""
        container = container_of(file)
        columns = self._columns(config, container.names(file), file)
        if seen := container.seen(file):
            self._columns(config, seen, file)  # refuses a file none of whose records has a required column
        group_by = columns.get(self._kind.group_by) if self._kind.group_by else None

        def part(part: tuple[int, int], first_row: int, num_rows: int) -> SourceUnit:
            return make_unit(config, file, settings, part=part, first_row=first_row, num_rows=num_rows)

        # Without the weights, so that units of sources read before mapo had them are cut where they were.
        sized = [column for name, column in columns.items() if name != WEIGHT.name]
        return container.plan(file, sized, settings.max_shard_bytes, group_by, part)

    def rows(self, unit: SourceUnit) -> Iterator[SourceRow]:
        """Yield the rows of a unit, in source order; images are read as they are needed."""
        container, cells = container_of(unit.file), Cells(unit.source, unit.file)
        known = container.names(unit.file)
        columns = self._columns(unit.source, known, unit.file)
        of_images = [field.name for field in self._kind.fields if field.is_image]
        images = frozenset(columns[name] for name in of_images if name in columns)
        found = container.records(unit, list(columns.values()), images)
        named = ((number, self._named(record, columns, unit.source, known is None)) for number, record in found)
        for number, record in self._grouped(named, unit):
            if BROKEN in record:
                kind = self._kind.row_kind
                yield SourceRow(number, Reason.UNREADABLE_ROW, None, None, Reason.MISSING_LABEL, kind=kind)
                continue
            split = split_of_row(unit.source.split, record.get("split"), unit.file.uri)
            weight, read = read_weight(record.get("weight")), _read_once(cells)
            for pair, draft in enumerate(self._kind.drafts(record)):
                yield _row(number, pair, draft, read, split, weight)

    def _columns(self, config: SourceConfig, names: Sequence[str] | None, file: SourceFile) -> dict[str, str]:
        """Return the file's column for each field that it has.

        Raises:
            SourceError: A required one is missing.
        """
        if names is None:
            return {field.name: _names_in_files(field, config)[0] for field in self._kind.all_fields}
        found: dict[str, str] = {}
        for field in self._kind.all_fields:
            wanted = _names_in_files(field, config)
            if present := next((name for name in wanted if name in names), None):
                found[field.name] = present
            elif field.required or field.name in config.columns:
                raise SourceError(
                    f"{file.uri} has no column {wanted[0]}; its columns are {', '.join(sorted(names))}",
                    f"is it a `{self._kind.format}` source? if so, map its column names with `columns:`",
                )
        self._check_forms(found, names, file)
        return found

    def _check_forms(self, found: Mapping[str, str], names: Sequence[str], file: SourceFile) -> None:
        """Check that a file has all fields of one of the kind's forms."""
        forms = self._kind.forms
        if forms and not any(set(form) <= found.keys() for form in forms):
            raise SourceError(
                f"{file.uri} has neither {' nor '.join(_listed(form) for form in forms)}; "
                f"its columns are {', '.join(sorted(names))}",
                "map its column names with `columns:`",
            )

    def _named(self, record: Record, columns: Mapping[str, str], config: SourceConfig, is_free: bool) -> Record:
        """Return a record with the format's names as keys."""
        if BROKEN in record:
            return record
        if not is_free:
            return {name: record.get(column) for name, column in columns.items()}
        found: Record = {}
        for field in self._kind.all_fields:
            wanted = _names_in_files(field, config)
            found[field.name] = next((record[name] for name in wanted if record.get(name) is not None), None)
        return found

    def _grouped(self, records: Iterator[tuple[int, Record]], unit: SourceUnit) -> Iterator[tuple[int, Record]]:
        """Gather records of one image each into one record of lists; leave others unchanged."""
        if self._kind.group_by is None:
            yield from records
            return
        for _, run in groupby(records, key=lambda found: self._group_key(*found)):
            gathered = list(run)
            if len(gathered) == 1:
                yield gathered[0]
                continue
            first = dict(gathered[0][1])
            for field in self._kind.fields:
                values = [record.get(field.name) for _, record in gathered]
                if (field.is_image or field.name in self._kind.gathered) and any(value is not None for value in values):
                    first[field.name] = values
            yield gathered[0][0], first

    def _group_key(self, number: int, record: Record) -> object:
        value = record.get(self._kind.group_by) if self._kind.group_by and BROKEN not in record else None
        is_list = any(isinstance(record.get(f.name), list) for f in self._kind.fields if f.is_image)
        return number if value is None or is_list else str(value)


def _row(
    number: int, pair: int, draft: Draft, read: ReadImage, split: str | None, weight: float | Reason | None
) -> SourceRow:
    """Return a draft with its images."""
    return SourceRow(
        row=number,
        pair=pair,
        prompt=Reason.UNREADABLE_PROMPT if isinstance(draft.prompt, list | dict) else draft.prompt,
        image_0=read(draft.image_0),
        image_1=read(draft.image_1),
        label_0=draft.label_0,
        user_id=text_of(draft.user_id),
        split=split,
        kind=draft.kind,
        weight=weight,
    )


def _names_in_files(field: Field, config: SourceConfig) -> list[str]:
    """Return the names that a column may have in files: the one in `columns`, or its usual names."""
    return [config.columns[field.name]] if field.name in config.columns else [field.name, *field.also]


def _listed(names: Sequence[str]) -> str:
    """Return the names as a list in English: `a`, `b` and `c`."""
    *most, last = [f"`{name}`" for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def _read_once(cells: Cells) -> ReadImage:
    """Return a reader of the cells of one record that fetches an image of several pairs only once."""
    found: dict[str, bytes | Reason | None] = {}

    def read(cell: object) -> bytes | Reason | None:
        if not isinstance(cell, str):
            return cells.read(cell)
        if cell not in found:
            found[cell] = cells.read(cell)
        return found[cell]

    return read


def reader_of(source_format: str) -> SourceReader:
    """Return the reader of a format of the registry."""
    return SourceReader(KINDS[source_format])
