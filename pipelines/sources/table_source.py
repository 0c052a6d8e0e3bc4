"""A kind of source as a table of names: which columns it has, and how one record becomes pairs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from pipelines.config import SourceConfig
from pipelines.dataset.errors import SourceError
from pipelines.dataset.pair import Reason
from pipelines.sources.cells import Cells
from pipelines.sources.files import split_of_row
from pipelines.sources.labels import text_of
from pipelines.sources.records import BROKEN, CONTAINERS, Record, container_of
from pipelines.sources.source import SourceFile, SourceRow, Unit, UnitSettings, make_unit


@dataclass(frozen=True)
class Field:
    """A column of a format, by its own name and by others that published files use."""

    name: str
    also: tuple[str, ...] = ()
    required: bool = False
    is_image: bool = False


@dataclass(frozen=True)
class Draft:
    """One pair of a record before its images are fetched: cells as they came."""

    prompt: object
    image_0: object
    image_1: object
    label_0: float | Reason
    user_id: object = None


class TableSource:
    """Reads any container; a format says its fields and how a record becomes drafts."""

    format: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]
    group_by: ClassVar[str | None] = None
    """Consecutive records of one image each and of one value of this field are one record of lists."""
    gathered: ClassVar[tuple[str, ...]] = ()
    """The fields that become lists then, beside the images."""
    suffixes: tuple[str, ...] = tuple(CONTAINERS)

    def drafts(self, record: Record) -> Iterator[Draft]:
        """The pairs of one record, whose keys are the format's own names; at least one."""
        raise NotImplementedError

    def units(self, config: SourceConfig, file: SourceFile, settings: UnitSettings) -> list[Unit]:
        """The units of a file, in order."""
        container = container_of(file)
        columns = self._columns(config, container.names(file), file)
        if seen := container.seen(file):
            self._columns(config, seen, file)  # refuses a file none of whose records has a required column
        group_by = columns.get(self.group_by) if self.group_by else None

        def part(part: tuple[int, int], first_row: int, num_rows: int) -> Unit:
            return make_unit(config, file, settings, part=part, first_row=first_row, num_rows=num_rows)

        return container.plan(file, list(columns.values()), settings.max_shard_bytes, group_by, part)

    def rows(self, unit: Unit) -> Iterator[SourceRow]:
        """The rows of a unit, in source order; images are read as they are needed."""
        container, cells = container_of(unit.file), Cells(unit.source, unit.file)
        known = container.names(unit.file)
        columns = self._columns(unit.source, known, unit.file)
        images = frozenset(columns[field.name] for field in self.fields if field.is_image and field.name in columns)
        found = container.records(unit, list(columns.values()), images)
        named = ((number, self._named(record, columns, unit.source, known is None)) for number, record in found)
        for number, record in self._grouped(named, unit):
            if BROKEN in record:
                yield SourceRow(number, Reason.UNREADABLE_ROW, None, None, Reason.MISSING_LABEL)
                continue
            split = split_of_row(unit.source.split, record.get("split"), unit.file.uri)
            read = _read_once(cells)
            for pair, draft in enumerate(self.drafts(record)):
                yield SourceRow(
                    row=number,
                    pair=pair,
                    prompt=Reason.UNREADABLE_PROMPT if isinstance(draft.prompt, list | dict) else draft.prompt,
                    image_0=read(draft.image_0),
                    image_1=read(draft.image_1),
                    label_0=draft.label_0,
                    user_id=text_of(draft.user_id),
                    split=split,
                )

    def _columns(self, config: SourceConfig, names: Sequence[str] | None, file: SourceFile) -> dict[str, str]:
        """The file's column for each field that it has.

        Raises:
            SourceError: A required one is missing.
        """
        found: dict[str, str] = {}
        for field in (*self.fields, Field("split")):
            wanted = [config.columns[field.name]] if field.name in config.columns else [field.name, *field.also]
            if names is None:
                found[field.name] = wanted[0]
            elif present := next((name for name in wanted if name in names), None):
                found[field.name] = present
            elif field.required or field.name in config.columns:
                raise SourceError(
                    f"{file.uri} has no column {wanted[0]}; it has {', '.join(sorted(names))}",
                    f"is it a `{self.format}` source? `columns:` says which of its columns is which",
                )
        return found

    def _named(self, record: Record, columns: Mapping[str, str], config: SourceConfig, is_free: bool) -> Record:
        """A record under the format's own names."""
        if BROKEN in record:
            return record
        if not is_free:
            return {name: record.get(column) for name, column in columns.items()}
        found: Record = {}
        for field in (*self.fields, Field("split")):
            wanted = [config.columns[field.name]] if field.name in config.columns else [field.name, *field.also]
            found[field.name] = next((record[name] for name in wanted if record.get(name) is not None), None)
        return found

    def _grouped(self, records: Iterator[tuple[int, Record]], unit: Unit) -> Iterator[tuple[int, Record]]:
        """Records of one image each, gathered into one record of lists; others as they are."""
        if self.group_by is None:
            yield from records
            return
        for _, run in groupby(records, key=lambda found: self._group_key(*found)):
            gathered = list(run)
            if len(gathered) == 1:
                yield gathered[0]
                continue
            first = dict(gathered[0][1])
            for field in self.fields:
                values = [record.get(field.name) for _, record in gathered]
                if (field.is_image or field.name in self.gathered) and any(value is not None for value in values):
                    first[field.name] = values
            yield gathered[0][0], first

    def _group_key(self, number: int, record: Record) -> object:
        value = record.get(self.group_by) if self.group_by and BROKEN not in record else None
        is_list = any(isinstance(record.get(f.name), list) for f in self.fields if f.is_image)
        return number if value is None or is_list else str(value)


def _read_once(cells: Cells) -> Callable[[object], bytes | Reason | None]:
    """Reads the cells of one record: an image that is in many of its pairs is fetched once."""
    found: dict[str, bytes | Reason | None] = {}

    def read(cell: object) -> bytes | Reason | None:
        if not isinstance(cell, str):
            return cells.read(cell)
        if cell not in found:
            found[cell] = cells.read(cell)
        return found[cell]

    return read
