"""Writes the shards of a source's unit: each row is judged by itself, and images are stored unchanged."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.ipc import to_ipc
from pipelines.dataset.layout import SHARDS, pairs_table
from pipelines.dataset.pair import PAIR, PAIRS_SCHEMA, Reason, Status, pair_key, prompt_id, single_key
from pipelines.dataset.shard import ShardWriter
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import Row
from pipelines.ingest.image_check import ImageInfo, inspect_image
from pipelines.sources.reader import reader_of
from pipelines.sources.unit import SourceRow, SourceUnit

MAX_PROMPT_CHARACTERS = 10_000  # the encoders read 77 tokens; more than this is a file that was read as a prompt
CONTENT = ("prompt", "label_0", "image_0_sha256", "image_1_sha256", "user_id", "source_split", "kind", "weight")
"""Columns by which a source row counts as unchanged since its file was last read."""
RECORD = ("pair_key", "prompt", "label_0", "source", "source_uri", "source_row")
"""Columns in the JSON member of a pair; that of a single image has its kind as well."""

Batch = Mapping[str, Sequence[Any]]
"""A Ray Data batch: column -> values."""
Images = list[tuple[ImageInfo, bytes]]
"""The usable images of a row: two of a pair, one of a single image."""


class WriteShards:
    """Read units one after the other and write their images as WebDataset shards; the only place that writes them.

    In:       The units of one task.
    Out:      For each its table rows, in source order, with shard and offsets, as soon as its shards are uploaded.
    Runs as:  Ray Data batch, 2/3 CPU; a shard grows in a local file and is uploaded while the next unit is read.
    Retry:    safe: names and bytes follow from the unit alone.
    Drops:    nothing: a row that cannot be used is quarantined with its reason.
    Raises:   SourceError, StorageError.
    """

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Write the units of a batch; yield a batch of one row for each."""
        storage = Storage(str(batch["storage"][0]))
        units = [SourceUnit.from_json(str(unit)) for unit in batch["unit"]]
        for unit, rows in zip(units, write_units(units, storage), strict=True):
            yield {"unit_id": [unit.id], "rows": [to_ipc(rows)]}


def write_unit(unit: SourceUnit, storage: Storage) -> pa.Table:
    """Write the shards of a unit; return a table row for every source row that is new or changed."""
    (rows,) = write_units([unit], storage)
    return rows


def write_units(units: Iterable[SourceUnit], storage: Storage) -> Iterator[pa.Table]:
    """Write the shards of each unit; a unit's shards are uploaded while the next unit is read."""
    with ThreadPoolExecutor(1) as uploads:
        last: _Gathered | None = None
        for unit in units:
            gathered = _gather(unit, storage, uploads)
            if last:
                yield last.rows()
            last = gathered
        if last:
            yield last.rows()


def _gather(unit: SourceUnit, storage: Storage, uploads: Executor) -> "_Gathered":
    rows: list[Row] = []
    seen: set[str] = set()
    known = _rows_of_earlier_states(unit, storage) if unit.known else {}
    with _UnitShards(unit, storage, uploads) as shards:
        for source_row in reader_of(unit.source.format).rows(unit):
            row, images = judge(source_row, unit)
            if _is_known(row, known):
                continue
            if images and row["pair_key"] not in seen:  # of a repeat the first one's bytes serve
                seen.add(row["pair_key"])
                shards.add(row, images)
            rows.append(row)
    for row in rows:
        row.update(shards.finished.get(row["shard"], {}))
    return _Gathered(pa.Table.from_pylist(rows, schema=PAIRS_SCHEMA), shards.uploads)


@dataclass(frozen=True)
class _Gathered:
    """The rows of a unit, which are withheld until its shards are uploaded."""

    table: pa.Table
    uploads: list[Future[None]]

    def rows(self) -> pa.Table:
        """Return the rows once every upload has succeeded."""
        for upload in self.uploads:
            upload.result()
        return self.table


def _rows_of_earlier_states(unit: SourceUnit, storage: Storage) -> dict[tuple[int, int], list[Row]]:
    """Read the table's rows of this file, by row and pair, in the range of the unit."""
    where = (pc.field("source_uri") == unit.file.uri) & (pc.field("unit") != unit.id)
    if unit.num_rows:
        row = pc.field("source_row")
        where &= (row >= unit.first_row) & (row < unit.first_row + unit.num_rows)
    found: dict[tuple[int, int], list[Row]] = {}
    for old in (
        pairs_table(storage).read(["source_row", "source_pair", "pair_key", "reason", *CONTENT], where).to_pylist()
    ):
        old["kind"] = old["kind"] or PAIR
        found.setdefault((old["source_row"], old["source_pair"]), []).append(old)
    return found


def _is_known(row: Row, known: dict[tuple[int, int], list[Row]]) -> bool:
    for old in known.get((row["source_row"], row["source_pair"]), ()):
        if old["reason"] == str(Reason.REMOVED):
            if old["pair_key"] == row["pair_key"]:
                return True
        elif all(old[name] == row[name] for name in CONTENT):
            # Equal in what both could read; an image that was missing then and is there now has a digest now.
            return True
    return False


def judge(source: SourceRow, unit: SourceUnit) -> tuple[Row, Images | None]:
    """Return a source row as a table row, and its images if they can be used.

    Kept here means usable: ties, splits and repeats are decided when the unit is committed.
    """
    row: Row = dict.fromkeys(PAIRS_SCHEMA.names)
    row.update(
        source=unit.source.format,
        source_uri=unit.file.uri,
        source_row=source.row,
        source_pair=source.pair,
        source_split=source.split,
        user_id=source.user_id,
        kind=source.kind,
        unit=unit.id,
        status=str(Status.QUARANTINED),
    )
    prompt = read_prompt(source.prompt)
    if not isinstance(prompt, Reason):
        row.update(prompt=prompt, prompt_id=prompt_id(prompt))
    images = [source.image_0, source.image_1] if source.kind == PAIR else [source.image_0]
    infos = [data if isinstance(data, Reason) else inspect_image(data, unit.settings.image_check) for data in images]
    for side, (data, info) in enumerate(zip(images, infos, strict=True)):
        row |= _facts(side, data, info)
    if not isinstance(source.label_0, Reason):
        row["label_0"] = source.label_0
    if not isinstance(source.weight, Reason):
        row["weight"] = source.weight
    row["reason"] = _problem(prompt, infos, source)
    if row["reason"] is not None:
        return row, None
    digests = [row[f"image_{side}_sha256"] for side in range(len(images))]
    row["pair_key"] = (pair_key if source.kind == PAIR else single_key)(row["prompt"], *digests)
    row["mirrored"] = digests != sorted(digests)
    row["status"] = str(Status.KEPT)
    return row, _usable(infos, images)


def _facts(side: int, data: bytes | Reason | None, info: ImageInfo | Reason) -> Row:
    """Return the columns of one image of a row, as far as it can be read."""
    facts: Row = {}
    if isinstance(data, bytes) and data:
        facts[f"image_{side}_sha256"] = hashlib.sha256(data).hexdigest()
    if isinstance(info, ImageInfo):
        found = {"width": info.width, "height": info.height, "orientation": info.orientation, "mode": info.mode}
        facts |= {f"{name}_{side}": value for name, value in found.items()}
    return facts


def _problem(prompt: str | Reason, infos: Sequence[ImageInfo | Reason], source: SourceRow) -> str | None:
    """Return the first problem of a row: prompt, image 0, image 1, label, weight, identical images."""
    for found in (prompt, *infos, source.label_0, source.weight):
        if isinstance(found, Reason):
            return str(found)
    is_same = source.kind == PAIR and source.image_0 == source.image_1
    return str(Reason.IDENTICAL_IMAGES) if is_same else None


def _usable(infos: Sequence[ImageInfo | Reason], images: Sequence[bytes | Reason | None]) -> Images:
    found = [
        (info, data)
        for info, data in zip(infos, images, strict=True)
        if isinstance(info, ImageInfo) and isinstance(data, bytes)
    ]
    assert len(found) == len(images)
    return found


def read_prompt(value: object) -> str | Reason:
    """Return a prompt exactly as in the source, or why it cannot be used."""
    if value is None or isinstance(value, Reason):
        return value or Reason.MISSING_PROMPT
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
        text.encode()  # a lone surrogate out of JSON is no text either
    except UnicodeError:
        return Reason.UNREADABLE_PROMPT
    if "\0" in text:
        return Reason.UNREADABLE_PROMPT
    if len(text) > MAX_PROMPT_CHARACTERS:
        return Reason.OVERLONG_PROMPT
    return text if text.strip() else Reason.EMPTY_PROMPT


def record_of(row: Row) -> bytes:
    """Return the JSON member of a row, for readers of the tars that do not have the table."""
    names = RECORD if row["kind"] in (None, PAIR) else (*RECORD, "kind")
    return json.dumps({name: row[name] for name in names}, ensure_ascii=False, sort_keys=True).encode()


class _UnitShards:
    """The shards of one unit: opened when needed, closed at `max_shard_bytes`, handed to `executor` when closed."""

    def __init__(self, unit: SourceUnit, storage: Storage, executor: Executor) -> None:
        self._unit, self._storage, self._executor = unit, storage, executor
        self._open = contextlib.ExitStack()
        self._writer: ShardWriter | None = None
        self.finished: dict[str | None, Row] = {}
        self.uploads: list[Future[None]] = []

    def __enter__(self) -> "_UnitShards":
        return self

    def add(self, row: Row, images: Images) -> None:
        """Append the images of a row and record their place in it."""
        row["shard"] = name = f"{SHARDS}/{self._unit.id}-{len(self.finished):05d}.tar"
        if self._writer is None:
            self._name = name
            self._file = self._open.enter_context(self._storage.unfinished(name))
            self._out = self._open.enter_context(self._file.open("wb"))
            self._writer = ShardWriter(self._out)
        key = row["pair_key"]
        for side, (info, data) in enumerate(images):
            member = self._writer.add(f"{key}.{side}.{info.extension}", data, row[f"image_{side}_sha256"])
            row.update({f"offset_{side}": member.offset, f"length_{side}": member.length})
        self._writer.add(f"{key}.json", record_of(row))
        if self._writer.num_bytes >= self._unit.settings.max_shard_bytes:
            self._finish()

    def _finish(self) -> None:
        assert self._writer is not None
        sha256 = self._writer.close()
        self._out.close()
        for upload in self.uploads:
            upload.result()  # no more than one shard waits, and nothing is gathered after an error
        self.uploads.append(self._executor.submit(_upload, self._storage, self._name, self._file, self._open.pop_all()))
        self.finished[self._name] = {"shard_bytes": self._writer.num_bytes, "shard_sha256": sha256}
        self._writer = None

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with self._open:
            if self._writer is not None and error is None:
                self._finish()


def _upload(storage: Storage, name: str, file: Path, then: contextlib.ExitStack) -> None:
    with then:
        storage.upload(name, file)
