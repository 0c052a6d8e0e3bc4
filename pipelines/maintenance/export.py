"""Export: writes the kept pairs as plain Parquet, optionally with their images; complete or not at all."""

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.dataset.errors import ConfigError, SnapshotError, StorageError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import PAIRS_SCHEMA, Status
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


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    num_pairs: int
    num_files: int
    num_bytes: int


def export_parquet(storage: Storage, target: str, *, images: bool = False) -> Exported:
    """Write the kept pairs of the newest version to `target`.

    Args:
        storage: The data set's storage.
        target: Path or fsspec URL: one file if it ends with `.parquet`, else a folder of files of about 512 MB and
            an empty `_SUCCESS`, written last.
        images: Include the bytes of both images, and the columns of Pick-a-Pic.

    Raises:
        ConfigError: `target` already exists.
        SnapshotError: There is no data set, or it has no kept pairs.
        StorageError: The data set cannot be read, or the target not written.
        ShardCorrupt: An image differs from its digest.
    """
    groups = _groups(storage, images)
    parent, _, name = Storage(target).url.rpartition("/")
    place = Storage(parent or "/")
    if place.exists(name):
        raise ConfigError(f"{place.uri(name)} already exists", "name a new file or folder")
    first = next(groups, None)
    if first is None:
        raise SnapshotError(
            f"there are no kept pairs in {storage.url}", "`mapo data show` lists why rows were not kept"
        )
    place.check_writable()
    with tempfile.TemporaryDirectory(prefix="mapo-export-") as work:
        if name.endswith(".parquet"):
            return _write_parts(chain([first], groups), place, Path(work), [name])
        return _write_folder(chain([first], groups), place, Path(work), name)


def _write_folder(groups: Iterator[pa.Table], place: Storage, work: Path, name: str) -> Exported:
    """Write a folder: locally under a temporary name, then renamed; elsewhere in place, and removed after a failure."""
    staged = f".{name}.{uuid.uuid4().hex[:8]}.tmp" if place.is_local else name
    try:
        exported = _write_parts(groups, place, work, None, folder=staged)
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
    return exported


def _write_parts(
    groups: Iterator[pa.Table], place: Storage, work: Path, names: list[str] | None, folder: str = ""
) -> Exported:
    """Write all row groups into the one named file, or into as many numbered files as needed."""
    num_pairs = num_files = num_bytes = 0
    file = work / "part.parquet"
    group = next(groups, None)
    while group is not None:
        try:
            with pq.ParquetWriter(file, group.schema) as writer:
                is_full = False
                while group is not None and not is_full:
                    writer.write_table(group)
                    num_pairs += group.num_rows
                    is_full = names is None and file.stat().st_size >= PART_BYTES
                    group = next(groups, None)
        except OSError as error:
            raise StorageError(f"cannot write {file}: {error}", "set TMPDIR to a folder with enough space") from error
        place.upload(names[0] if names else f"{folder}/part-{num_files:05d}.parquet", file)
        num_files, num_bytes = num_files + 1, num_bytes + file.stat().st_size
    return Exported(num_pairs, num_files, num_bytes)


def _groups(storage: Storage, images: bool) -> Iterator[pa.Table]:
    """Yield the kept rows in row groups, all of one version."""
    version = pairs_table(storage).version
    if version is None:
        raise SnapshotError(
            f"there is no data set at {storage.url}", "`mapo ingest CONFIG` creates one; is the storage URL right?"
        )
    with ThreadPoolExecutor(READERS) as readers:
        for batch in pairs_table(storage, version).batches(PAIRS_SCHEMA.names, KEPT):
            rows = pa.Table.from_batches([batch]).cast(PAIRS_SCHEMA)
            for group in _split(rows, images):
                yield _with_images(group, storage, readers) if images else group


def _split(rows: pa.Table, images: bool) -> Iterator[pa.Table]:
    """Yield slices of at most `ROWS_A_GROUP` rows; with images, of about `GROUP_BYTES` bytes."""
    sizes = pc.add(rows["length_0"], rows["length_1"]).to_pylist() if images else [0] * rows.num_rows
    start = total = 0
    for position, size in enumerate(sizes):
        if position > start and (total + size > GROUP_BYTES or position - start == ROWS_A_GROUP):
            yield rows.slice(start, position - start)
            start, total = position, 0
        total += size
    if start < rows.num_rows:
        yield rows.slice(start)


def _with_images(rows: pa.Table, storage: Storage, readers: ThreadPoolExecutor) -> pa.Table:
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
        for side in (0, 1)
    ]
    label_1 = pc.subtract(1.0, rows["label_0"])
    columns = [rows["prompt"], *(pa.array(jpg, pa.binary()) for jpg in jpgs), label_1, pa.array([True] * len(listed))]
    for field, column in zip(IMAGE_COLUMNS, columns, strict=True):
        rows = rows.append_column(field, column)
    return rows
