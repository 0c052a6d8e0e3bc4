"""Containers (Parquet, JSON, JSON lines, tar): a file, or a part of it, as numbered raw records; see `containers`."""

import contextlib
import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dataset.errors import SourceError
from pipelines.sources.files import open_file
from pipelines.sources.kind import BROKEN, Record
from pipelines.sources.unit import SourceFile, SourceUnit

ROWS_A_BATCH = 64  # about 20 MB of JPEGs in memory
READ_BYTES = 8 << 20  # of a column at once; otherwise its whole part of a row group, often 150 MB
MAX_RECORDS = 1000  # of a unit of JSON, whose images lie elsewhere
FOOTERS_KEPT = 16  # as many as are read at once
FILES_PARSED = 4  # a worker reads one unit after the other, often of one file

Names = Sequence[str]


class MakeUnit(Protocol):
    """Called for each part of a file that becomes a unit: where it lies, its first row, its number of rows."""

    def __call__(self, part: tuple[int, int], first_row: int, num_rows: int) -> SourceUnit:
        """Return the unit."""
        ...


class Container(Protocol):
    """A kind of file."""

    def names(self, file: SourceFile) -> list[str] | None:
        """Return the top-level names of its records, if the file itself states them."""
        ...

    def seen(self, file: SourceFile) -> list[str]:
        """Return names that at least one of its records has; empty if only reading them would tell."""
        ...

    def plan(
        self, file: SourceFile, names: Sequence[str], max_bytes: int, group_by: str | None, make_unit: MakeUnit
    ) -> list[SourceUnit]:
        """Plan the units of a file; consecutive records of one value of `group_by` stay together."""
        ...

    def records(self, unit: SourceUnit, names: Names, images: frozenset[str]) -> Iterator[tuple[int, Record]]:
        """Yield the records of a unit with their numbers in the file.

        Args:
            unit: The unit to read.
            names: The names that are needed; others may be left out.
            images: Those of them that contain images; text in them is a path or a URL.
        """
        ...


class Parquet:
    """Row groups gathered until their needed columns reach `max_bytes`."""

    def names(self, file: SourceFile) -> list[str]:
        """Return the columns."""
        return list(_footer(file).schema.to_arrow_schema().names)

    def seen(self, file: SourceFile) -> list[str]:
        """Return nothing: `names` has them all."""
        return []

    def plan(
        self, file: SourceFile, names: Sequence[str], max_bytes: int, group_by: str | None, make_unit: MakeUnit
    ) -> list[SourceUnit]:
        """Plan from the footer alone. Grouped records may span row groups: then the file is one unit."""
        metadata = _footer(file)
        wanted = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] in names]
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        sizes = [sum(group.column(i).total_compressed_size for i in wanted) for group in groups]
        rows = [group.num_rows for group in groups]
        units, start = [], 0
        while start < len(sizes):
            stop, size = start + 1, sizes[start]
            while stop < len(sizes) and (group_by or size + sizes[stop] <= max_bytes):
                size += sizes[stop]
                stop += 1
            if num_rows := sum(rows[start:stop]):
                units.append(make_unit((start, stop), sum(rows[:start]), num_rows))
            start = stop
        return units

    def records(self, unit: SourceUnit, names: Names, images: frozenset[str]) -> Iterator[tuple[int, Record]]:
        """Yield records with text as bytes, so that invalid UTF-8 affects only its own row."""
        number = unit.first_row
        with open_file(unit.file, by_arrow=True) as opened:
            parquet = pq.ParquetFile(opened, metadata=_footer(unit.file), buffer_size=READ_BYTES, pre_buffer=False)
            groups = list(range(*unit.part))
            for batch in parquet.iter_batches(ROWS_A_BATCH, row_groups=groups, columns=list(names)):
                schema = pa.schema([field.with_type(_as_bytes(field.type)) for field in batch.schema])
                texts = [field.name for field in batch.schema if field.name in images and _is_text(field.type)]
                for record in pa.Table.from_batches([batch]).cast(schema).to_pylist():
                    for name in texts:
                        record[name] = _as_text(record[name])
                    yield number, record
                    number += 1


@lru_cache(FOOTERS_KEPT)
def _footer(file: SourceFile) -> pq.FileMetaData:
    """Read the footer of a parquet file, once for each state of the file."""
    with open_file(file, by_arrow=True) as opened:
        return pq.read_metadata(opened)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return the type with bytes in place of text, also inside lists and structs."""
    if pa.types.is_dictionary(kind):
        return _as_bytes(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_as_bytes(kind.field(i).type)) for i in range(kind.num_fields)])
    return kind


def _is_text(kind: pa.DataType) -> bool:
    """Return whether a column contains text, or lists of text."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    return not pa.types.is_struct(kind) and _as_bytes(kind) != kind


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_text(each) for each in value]
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


class Json:
    """An array of objects, or one object per line (`lines`); parsed once for each process and state of the file."""

    def __init__(self, *, lines: bool) -> None:
        self._lines = lines

    def names(self, file: SourceFile) -> None:
        """Return None: each record has its own."""
        return

    def seen(self, file: SourceFile) -> list[str]:
        """Return the names of all records that could be read."""
        return sorted({name for record in _parsed(file, self._lines) if BROKEN not in record for name in record})

    def plan(
        self, file: SourceFile, names: Sequence[str], max_bytes: int, group_by: str | None, make_unit: MakeUnit
    ) -> list[SourceUnit]:
        """Plan at most `MAX_RECORDS` per unit, or more to keep a group together."""
        return plan_records(_parsed(file, self._lines), group_by, make_unit)

    def records(self, unit: SourceUnit, names: Names, images: frozenset[str]) -> Iterator[tuple[int, Record]]:
        """Yield the records of the range."""
        records = _parsed(unit.file, self._lines)
        yield from ((number, dict(records[number])) for number in range(*unit.part))


def plan_records(records: Sequence[Record], group_by: str | None, make_unit: MakeUnit) -> list[SourceUnit]:
    """Plan units of at most `MAX_RECORDS` of a file's records, or of more to keep a group together."""
    runs = [1] * len(records)
    if group_by is not None:
        keys = [record.get(group_by, number) for number, record in enumerate(records)]  # without one: by itself
        runs = [len(list(run)) for _, run in groupby(keys, key=lambda key: (type(key), str(key)))]
    units, start, size = [], 0, 0
    for run in runs:
        if size and size + run > MAX_RECORDS:
            units.append(make_unit((start, start + size), start, size))
            start, size = start + size, 0
        size += run
    return [*units, make_unit((start, start + size), start, size)] if size else units


@lru_cache(FILES_PARSED)
def _parsed(file: SourceFile, lines: bool) -> list[Record]:
    with open_file(file) as opened:
        data = opened.read()
        try:
            data = gzip.decompress(data) if file.uri.endswith(".gz") else data
            found = [_line(line) for line in data.split(b"\n") if line.strip()] if lines else json.loads(data)
        except (OSError, EOFError, UnicodeDecodeError, RecursionError, zlib.error) as error:
            raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(found, list):
        raise SourceError(
            f"{file.uri} contains a {type(found).__name__}, not a list of records",
            "a `.json` source must be an array of objects; rename a file with one object per line to `.jsonl`",
        )
    return [record if isinstance(record, dict) else {BROKEN: "not an object"} for record in found]


def _line(line: bytes) -> Any:
    """Parse a line; a broken one affects only its own row."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return {BROKEN: str(error)}


class Tar:
    """WebDataset samples: the members of a key are adjacent. A unit is a whole tar; nothing is unpickled."""

    def names(self, file: SourceFile) -> None:
        """Return None: each sample has its own."""
        return

    def seen(self, file: SourceFile) -> list[str]:
        """Return nothing: only reading would tell."""
        return []

    def plan(
        self, file: SourceFile, names: Sequence[str], max_bytes: int, group_by: str | None, make_unit: MakeUnit
    ) -> list[SourceUnit]:
        """Plan one unit; only reading would tell how many samples there are."""
        return [make_unit((0, 1), 0, 0)]

    def records(self, unit: SourceUnit, names: Names, images: frozenset[str]) -> Iterator[tuple[int, Record]]:
        """Yield a sample as a record: each part's bytes by its name without the extension, and a JSON part's keys.

        Raises:
            SourceError: The tar is truncated or damaged, or a key repeats.
        """
        with open_file(unit.file, read_ahead=True) as opened, whole_tar(opened) as tar:
            yield from enumerate(_samples(tar, unit.file))


@contextlib.contextmanager
def whole_tar(opened: IO[bytes]) -> Iterator[tarfile.TarFile]:
    """Open a tar for reading to its end, and check that it really is the end.

    `tarfile` mistakes truncation between two members, or a damaged header after the first, for the end of the tar.

    Raises:
        ValueError: The tar is truncated or damaged.
    """
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            yield tar
            opened.seek(tar.offset)
            if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither a member nor the end-of-archive marker at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise ValueError(f"not a complete tar: {error}") from error


def _samples(tar: tarfile.TarFile, file: SourceFile) -> Iterator[Record]:
    key, sample, parts, done = None, Record(), set[str](), set[str]()
    for member in tar:
        if not member.isfile():
            continue
        folder, slash, name = member.name.rpartition("/")
        stem, _, part = name.partition(".")
        if f"{folder}{slash}{stem}" != key:
            if sample:
                yield sample
            key, sample, parts = f"{folder}{slash}{stem}", {}, set()
            if key in done:
                raise SourceError(
                    f"{file.uri}: the members of {key} are not adjacent", "store each sample's files next to each other"
                )
            done.add(key)
        payload = tar.extractfile(member)
        assert payload is not None
        found = _part(part, payload.read(), member.size)
        if part.endswith("json"):
            sample = found | sample  # a part of its own says it first
            continue
        if twice := parts & found.keys():
            found = {BROKEN: f"{key} has {', '.join(twice)} twice"}
        parts |= found.keys()
        sample |= found
    if sample:
        yield sample


def _part(name: str, data: bytes, size: int) -> Record:
    if len(data) != size:
        raise tarfile.ReadError(f"{name} has {len(data):,} of {size:,} bytes")
    stem, _, extension = name.rpartition(".")
    if extension != "json":
        return {stem or extension: data}
    try:
        found = json.loads(data)
    except ValueError as error:
        return {BROKEN: f"{name}: {error}"}
    return found if isinstance(found, dict) else {stem or extension: found}
