"""Export: writes the kept rows as plain Parquet, optionally with their images; complete or not at all."""

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipelines.dataset.errors import ConfigError, SnapshotError, StorageError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import JUDGED, PAIR, PAIRS_SCHEMA, PRIOR, Status, of_kind
from pipelines.dataset.storage import Storage

READERS = 16
GROUP_BYTES = 64 << 20  # of images in a row group, and in memory
ROWS_A_GROUP = 8192
PART_BYTES = 512 << 20  # of a file in a folder; each is a local file before it is put
SUCCESS = "_SUCCESS"
KEPT = pc.field("status") == str(Status.KEPT)
IMAGE_COLUMNS = pa.schema(
    [
        ("caption", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_1", pa.float64()),
        ("has_label", pa.bool_()),
    ]
)
"""Columns that make a file a Pick-a-Pic source, in addition to `label_0` and `user_id`."""
SINGLE_COLUMNS = pa.schema([("image", pa.binary()), ("good", pa.bool_()), ("prior", pa.bool_())])
"""Columns that make a file a `judged` source, in addition to `prompt` and `user_id`."""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    num_pairs: int
    num_files: int
    num_bytes: int
    num_singles: int = 0


@dataclass(frozen=True)
class _Part:
    """Row groups that belong into files of their own.

    Args:
        prefix: The first word of the files' names.
        groups: The row groups.
    """

    prefix: str
    groups: Iterator[pa.Table]


def export_parquet(storage: Storage, target: str, *, images: bool = False) -> Exported:
    """Write the kept rows of the newest version to `target`.

    With images, pairs and single images lie in files of their own, because they are sources of two formats.

    Args:
        storage: The data set's storage.
        target: Path or fsspec URL: one file if it ends with `.parquet`, else a folder of files of about 512 MB and
            an empty `_SUCCESS`, written last.
        images: Include the bytes of the images: pairs in `part-*.parquet` with the columns of Pick-a-Pic, single
            images in `singles-*.parquet` with those of the format `judged`.

    Raises:
        ConfigError: `target` already exists, or one file would have pairs and single images with their bytes.
        SnapshotError: There is no data set, or it has no kept pairs.
        StorageError: The data set cannot be read, or the target not written.
        ShardCorrupt: An image differs from its digest.
    """
    parts = _parts(storage, images)
    parent, _, name = Storage(target).url.rpartition("/")
    place = Storage(parent or "/")
    if place.exists(name):
        raise ConfigError(f"{place.uri(name)} already exists", "name a new file or folder")
    if not parts:
        raise SnapshotError(
            f"there are no kept pairs or single images in {storage.url}",
            "`mapo data show` lists why rows were not kept",
        )
    if len(parts) > 1 and name.endswith(".parquet"):
        raise ConfigError(
            f"{storage.url} has pairs and single images, which with their bytes do not fit into the one file {name}",
            "name a folder: it gets files of both; or leave `--images` out",
        )
    place.check_writable()
    with tempfile.TemporaryDirectory(prefix="mapo-export-") as work:
        if name.endswith(".parquet"):
            return _write_part(parts[0], place, Path(work), name)
        return _write_folder(parts, place, Path(work), name)


def _parts(storage: Storage, images: bool) -> list[_Part]:
    """Return the kept rows, all of one version; empty without any."""
    version = pairs_table(storage).version
    if version is None:
        raise SnapshotError(
            f"there is no data set at {storage.url}", "`mapo ingest CONFIG` creates one; is the storage URL right?"
        )
    table = pairs_table(storage, version)
    of_pairs, of_singles = KEPT & of_kind(PAIR), KEPT & of_kind(JUDGED, PRIOR)
    wanted = {"part": of_pairs, "singles": of_singles} if images else {"part": KEPT}
    return [
        _Part(prefix, _groups(storage, version, where, images))
        for prefix, where in wanted.items()
        if table.count_rows(where)
    ]


def _write_folder(parts: list[_Part], place: Storage, work: Path, name: str) -> Exported:
    """Write a folder: locally under a temporary name, then renamed; elsewhere in place, and removed after a failure."""
    staged = f".{name}.{uuid.uuid4().hex[:8]}.tmp" if place.is_local else name
    try:
        written = [_write_part(part, place, work, None, folder=staged) for part in parts]
        place.write(f"{staged}/{SUCCESS}", b"")
        if staged != name:
            Path(place.path(staged)).rename(place.path(name))
    except BaseException:
        if staged != name:
            shutil.rmtree(place.path(staged), ignore_errors=True)
        else:
            for part in place.names(name):
                place.delete(part)
        raise
    return Exported(*(sum(counts) for counts in zip(*map(astuple, written), strict=True)))


def _write_part(part: _Part, place: Storage, work: Path, name: str | None, folder: str = "") -> Exported:
    """Write all row groups into the one named file, or into as many numbered files as needed."""
    num_rows = num_pairs = num_files = num_bytes = 0
    file = work / "part.parquet"
    group = next(part.groups, None)
    while group is not None:
        try:
            with pq.ParquetWriter(file, group.schema) as writer:
                is_full = False
                while group is not None and not is_full:
                    writer.write_table(group)
                    num_rows += group.num_rows
                    num_pairs += pc.sum(pc.equal(group["kind"], PAIR)).as_py()
                    is_full = name is None and file.stat().st_size >= PART_BYTES
                    group = next(part.groups, None)
        except OSError as error:
            raise StorageError(f"cannot write {file}: {error}", "set TMPDIR to a folder with enough space") from error
        place.upload(name or f"{folder}/{part.prefix}-{num_files:05d}.parquet", file)
        num_files, num_bytes = num_files + 1, num_bytes + file.stat().st_size
    return Exported(num_pairs, num_files, num_bytes, num_rows - num_pairs)


def _groups(storage: Storage, version: int, where: ds.Expression, images: bool) -> Iterator[pa.Table]:
    """Yield rows in row groups; the kind of a row is always stated."""
    kind = PAIRS_SCHEMA.get_field_index("kind")
    with ThreadPoolExecutor(READERS) as readers:
        for batch in pairs_table(storage, version).batches(PAIRS_SCHEMA.names, where):
            rows = pa.Table.from_batches([batch]).cast(PAIRS_SCHEMA)
            rows = rows.set_column(kind, PAIRS_SCHEMA.field(kind), pc.fill_null(rows["kind"], PAIR))
            for group in _split(rows, images):
                yield _with_images(group, storage, readers) if images else group


def _split(rows: pa.Table, images: bool) -> Iterator[pa.Table]:
    """Yield slices of at most `ROWS_A_GROUP` rows; with images, of about `GROUP_BYTES` bytes."""
    both = pc.add(rows["length_0"], pc.fill_null(rows["length_1"], 0))
    sizes = both.to_pylist() if images else [0] * rows.num_rows
    start = total = 0
    for position, size in enumerate(sizes):
        if position > start and (total + size > GROUP_BYTES or position - start == ROWS_A_GROUP):
            yield rows.slice(start, position - start)
            start, total = position, 0
        total += size
    if start < rows.num_rows:
        yield rows.slice(start)


def _with_images(rows: pa.Table, storage: Storage, readers: ThreadPoolExecutor) -> pa.Table:
    """Add the columns of the source format of these rows, which are all pairs or all single images."""
    is_pair = rows["kind"][0].as_py() == PAIR
    listed = rows.select(
        ["shard", *(f"{what}_{side}" for side in (0, 1) for what in ("offset", "length")),
         "image_0_sha256", "image_1_sha256"]
    ).to_pylist()  # fmt: skip
    jpgs = [
        list(
            readers.map(
                lambda row, side=side: storage.read_range(
                    row["shard"], row[f"offset_{side}"], row[f"length_{side}"], row[f"image_{side}_sha256"]
                ),
                listed,
            )
        )
        for side in ((0, 1) if is_pair else (0,))
    ]
    files = [pa.array(jpg, pa.binary()) for jpg in jpgs]
    if is_pair:
        label_1, has_label = pc.subtract(1.0, rows["label_0"]), pa.array([True] * len(listed))
        schema, columns = IMAGE_COLUMNS, [rows["prompt"], *files, label_1, has_label]
    else:
        is_prior = pc.equal(rows["kind"], PRIOR)
        good = pc.if_else(is_prior, None, pc.equal(rows["label_0"], 1.0))
        schema, columns = SINGLE_COLUMNS, [*files, good, is_prior]
    for field, column in zip(schema, columns, strict=True):
        rows = rows.append_column(field, column)
    return rows
