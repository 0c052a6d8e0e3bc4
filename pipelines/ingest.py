"""Sources to pair shards: plan units, read them on Ray Data, commit them to the table.

Invariants: every source row becomes exactly one table row; a shard exists only once a row points to it; a
committed unit is never read again; the shard bytes of a unit are the same whoever writes them, whenever.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import IngestConfig
from pipelines.dataset.errors import DropBudgetExceeded, unwrap
from pipelines.dataset.layout import SHARDS, pairs_table
from pipelines.dataset.pair import PAIRS_SCHEMA, Reason, Status, pair_key, prompt_id, split_of
from pipelines.dataset.shard import ShardWriter
from pipelines.dataset.storage import Storage
from pipelines.duplicates import FirstPairs
from pipelines.images import ImageInfo, inspect_image
from pipelines.progress import Progress, quiet_ray_data
from pipelines.sources import SOURCES
from pipelines.sources.source import SourceRow, Unit, list_files

FOOTER_READERS = 16
TIE = 0.5
DROPPED = pc.field("status") == str(Status.QUARANTINED)


def plan_units(config: IngestConfig) -> list[Unit]:
    """All units of all sources, in order; reads directory listings and parquet footers only."""
    units = []
    for source_config in config.sources:
        source = SOURCES[source_config.format]
        files = list_files(source_config.path, (".parquet",))
        with ThreadPoolExecutor(FOOTER_READERS) as readers:
            for found in readers.map(
                lambda file, source=source: source.units(
                    file, validation_ratio=config.validation_ratio, max_shard_bytes=config.max_shard_bytes
                ),
                files,
            ):
                units.extend(found)
    return units


def pending_units(config: IngestConfig, storage: Storage) -> list[Unit]:
    """The units that are not in the table yet."""
    units = {unit.id: unit for unit in plan_units(config)}
    return [units[identity] for identity in pairs_table(storage).uncommitted(list(units))]


def ingest(config: IngestConfig, storage: Storage) -> None:
    """Bring the table up to date with the sources. Needs a running Ray.

    Raises:
        SourceError: A source is missing or unreadable.
        DropBudgetExceeded: More than `max_drop_ratio` of the rows were quarantined.
    """
    import ray

    quiet_ray_data()
    units = pending_units(config, storage)
    if units:
        storage.check_writable()
        rows = [{"unit": unit.to_json(), "storage": storage.url} for unit in units]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset = dataset.map(WriteShards(), num_cpus=1)
        dataset.context.execution_options.preserve_order = True  # the first of two equal pairs is always the same
        try:
            # Nothing is fetched ahead: a unit is handed out, to be committed, as soon as it is written.
            written = dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow")
            _commit_units((unit for batch in written for unit in batch.to_pylist()), units, config, storage)
        except Exception as error:
            raise unwrap(error) or error from error
    check_drop_budget(config, storage)


def _commit_units(written: Iterable[dict[str, Any]], units: list[Unit], config: IngestConfig, storage: Storage) -> None:
    table = pairs_table(storage)
    first_pairs, planned = FirstPairs(table), sum(unit.num_rows for unit in units)
    # The limit is a share of all rows, as in `check_drop_budget`, which must then fail too if this stops early.
    dropped, limit = table.read(["reason"], DROPPED).num_rows, config.max_drop_ratio * (table.count_rows() + planned)
    with Progress("ingest", planned, "rows") as progress:
        for unit in written:
            rows = first_pairs.append(unit["unit_id"], pa.ipc.open_stream(unit["rows"]).read_all())
            progress.advance(rows.num_rows)
            dropped += int(pc.sum(pc.equal(rows["status"], str(Status.QUARANTINED))).as_py() or 0)
            if dropped > limit:
                break  # more than the limit already, whatever the rest holds


def check_drop_budget(config: IngestConfig, storage: Storage) -> None:
    """Fail if more of the table's rows are quarantined than the configuration allows."""
    table = pairs_table(storage)
    dropped, num_rows = table.read(["reason", "source_uri"], DROPPED), table.count_rows()
    if dropped.num_rows <= config.max_drop_ratio * num_rows:
        return
    (reason, times), *_ = Counter(dropped["reason"].to_pylist()).most_common(1)
    (place, there), *_ = Counter(dropped["source_uri"].to_pylist()).most_common(1)
    raise DropBudgetExceeded(
        f"ingest dropped {dropped.num_rows:,} of {num_rows:,} rows "
        f"({dropped.num_rows / num_rows:.1%}, limit {config.max_drop_ratio:.1%}), {there:,} of them in {place}.\n"
        f"Most common reason: {reason} ({times:,}).",
        f"`mapo data show {storage.url} --json` lists the reasons; raise `ingest.max_drop_ratio` to accept them",
    )


class WriteShards:
    """Read one unit and write its pairs as WebDataset shards; the only place that writes them.

    In:       A unit.                Out: its table rows, in source order, with shard and offsets.
    Runs as:  Ray Data row, 1 CPU; the shard grows in a local file, not in memory.
    Retry:    safe: names and bytes follow from the unit alone.
    Drops:    nothing: what cannot be used is a quarantined row with its reason.
    Raises:   SourceError, StorageError.
    """

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One Ray Data row in, one out."""
        unit, storage = Unit.from_json(row["unit"]), Storage(row["storage"])
        sink = pa.BufferOutputStream()
        rows = write_unit(unit, storage)
        with pa.ipc.new_stream(sink, PAIRS_SCHEMA) as out:
            out.write_table(rows)
        return {"unit_id": unit.id, "rows": sink.getvalue().to_pybytes()}


def write_unit(unit: Unit, storage: Storage) -> pa.Table:
    """Write the shards of a unit; returns one table row for every source row."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    with _UnitShards(unit, storage) as shards:
        for source_row in SOURCES[unit.source].rows(unit):
            row, images = judge(source_row, unit)
            if row["pair_key"] in seen and images:
                images = None  # the first one's bytes serve; `FirstPairs` says so in the row
            if images:
                seen.add(row["pair_key"])
                shards.add(row, images)
            rows.append(row)
    for row in rows:
        row.update(shards.finished.get(row["shard"], {}))
    return pa.Table.from_pylist(rows, schema=PAIRS_SCHEMA)


Images = tuple[tuple[ImageInfo, bytes], tuple[ImageInfo, bytes]]


def judge(source: SourceRow, unit: Unit) -> tuple[dict[str, Any], Images | None]:
    """One source row as a table row, and its two images if they can be used."""
    row: dict[str, Any] = dict.fromkeys(PAIRS_SCHEMA.names)
    row.update(
        source=unit.source,
        source_uri=unit.file.uri,
        source_row=source.row,
        user_id=source.user_id,
        unit=unit.id,
        status=str(Status.QUARANTINED),
    )
    prompt = read_prompt(source.prompt)
    if not isinstance(prompt, Reason):
        identity = prompt_id(prompt)
        row.update(prompt=prompt, prompt_id=identity, split=split_of(identity, unit.validation_ratio))
    infos = [inspect_image(source.image_0), inspect_image(source.image_1)]
    for side, (data, info) in enumerate(zip((source.image_0, source.image_1), infos, strict=True)):
        if data:
            row[f"image_{side}_sha256"] = hashlib.sha256(data).hexdigest()
        if isinstance(info, ImageInfo):
            row.update({f"width_{side}": info.width, f"height_{side}": info.height})
    if not isinstance(source.label_0, Reason):
        row["label_0"] = source.label_0
    problems = [found for found in (prompt, *infos, source.label_0) if isinstance(found, Reason)]
    if not problems and source.image_0 == source.image_1:
        problems = [Reason.IDENTICAL_IMAGES]
    if problems:
        row["reason"] = str(problems[0])
        return row, None
    row["pair_key"] = pair_key(row["prompt"], row["image_0_sha256"], row["image_1_sha256"])
    tie = row["label_0"] == TIE
    row["status"] = str(Status.TIE if tie else Status.KEPT)
    row["reason"] = str(Reason.EQUAL_PREFERENCE) if tie else None
    assert source.image_0
    assert source.image_1
    assert isinstance(infos[0], ImageInfo)
    assert isinstance(infos[1], ImageInfo)
    return row, ((infos[0], source.image_0), (infos[1], source.image_1))


def read_prompt(value: object) -> str | Reason:
    """A prompt exactly as the source has it, or why it cannot be used."""
    if value is None:
        return Reason.MISSING_PROMPT
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        return Reason.UNREADABLE_PROMPT
    if "\0" in text:
        return Reason.UNREADABLE_PROMPT
    return text if text.strip() else Reason.EMPTY_PROMPT


@dataclass
class _UnitShards:
    """The shards of one unit: opened when needed, closed at `max_shard_bytes`, uploaded when closed."""

    unit: Unit
    storage: Storage
    finished: dict[str | None, dict[str, Any]] = field(default_factory=dict)
    _writer: ShardWriter | None = None

    def __enter__(self) -> "_UnitShards":
        self._folder = tempfile.TemporaryDirectory(prefix="mapo-shard-")
        self._file = Path(self._folder.name) / "shard.tar"
        return self

    def add(self, row: dict[str, Any], images: Images) -> None:
        """Append a pair and note in its row where it lies."""
        if self._writer is None:
            self._out = self._file.open("wb")
            self._writer = ShardWriter(self._out)
        key = row["pair_key"]
        row["shard"] = f"{SHARDS}/{self.unit.id}-{len(self.finished):05d}.tar"
        for side, (info, data) in enumerate(images):
            member = self._writer.add(f"{key}.{side}.{info.extension}", data)
            row.update({f"offset_{side}": member.offset, f"length_{side}": member.length})
        facts = ("pair_key", "prompt", "label_0", "source", "source_uri", "source_row")
        record = {name: row[name] for name in facts}
        self._writer.add(f"{key}.json", json.dumps(record, ensure_ascii=False, sort_keys=True).encode())
        if self._writer.num_bytes >= self.unit.max_shard_bytes:
            self._finish(row["shard"])

    def _finish(self, name: str) -> None:
        assert self._writer is not None
        sha256 = self._writer.close()
        self._out.close()
        self.storage.upload(name, self._file)
        self.finished[name] = {"shard_bytes": self._writer.num_bytes, "shard_sha256": sha256}
        self._writer = None

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if self._writer is not None and error is None:
                self._finish(f"{SHARDS}/{self.unit.id}-{len(self.finished):05d}.tar")
        finally:
            if self._writer is not None:
                self._out.close()
            self._folder.cleanup()
