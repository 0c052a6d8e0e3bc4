"""What every kind of source gives: files, units of work, and rows with one meaning.

A unit is a range of row groups of one file. Its id is a hash of the file's identity (URI, size, change mark)
and of what shapes its shard, so a changed file is new units and an unchanged one is none.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa

from pipelines.dataset.errors import SourceError
from pipelines.dataset.pair import Reason
from pipelines.dataset.storage import Storage, retry

UNIT_VERSION = 1  # raise it when the same source rows would give other shard bytes or other table rows


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, as it was when the run was planned."""

    uri: str
    size: int
    change_mark: str  # etag or time of change


@dataclass(frozen=True)
class Unit:
    """A range of row groups of one source file: what one worker turns into shards, committed whole."""

    id: str
    source: str
    file: SourceFile
    row_groups: tuple[int, int]  # first, one past the last
    first_row: int
    num_rows: int
    validation_ratio: float
    max_shard_bytes: int

    def to_json(self) -> str:
        """As text, for Ray Data rows."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Unit":
        """The unit that `to_json` wrote."""
        fields = json.loads(text)
        fields["file"] = SourceFile(**fields["file"])
        fields["row_groups"] = tuple(fields["row_groups"])
        return Unit(**fields)


@dataclass(frozen=True)
class SourceRow:
    """One row of a source with one meaning, whatever its format. `label_0` is a number or why there is none."""

    row: int
    prompt: object
    image_0: bytes | None
    image_1: bytes | None
    label_0: float | Reason
    user_id: str | None


class Source(Protocol):
    """A kind of source."""

    format: str

    def units(self, file: SourceFile, *, validation_ratio: float, max_shard_bytes: int) -> list[Unit]:
        """The units of a file, in order; reads its footer only."""
        ...

    def rows(self, unit: Unit) -> Iterator[SourceRow]:
        """The rows of a unit, in source order; only the needed columns and groups are read."""
        ...


def unit_id(
    source: str,
    file: SourceFile,
    row_groups: tuple[int, int],
    *,
    validation_ratio: float,
    max_shard_bytes: int,
) -> str:
    """32 hex digits: a hash of all that shapes the unit's shards and rows."""
    identity = [UNIT_VERSION, source, file.uri, file.size, file.change_mark]
    settings = [*row_groups, validation_ratio, max_shard_bytes]
    return hashlib.sha256(json.dumps(identity + settings).encode()).hexdigest()[:32]


def list_files(path: str, suffixes: Sequence[str]) -> list[SourceFile]:
    """The files that a path, folder or glob names, sorted by URI.

    Raises:
        SourceError: There are none, or the place cannot be listed.
    """
    storage, pattern = Storage(path), ""
    try:
        if not storage.exists(""):  # a name may hold brackets and stars itself
            folder, pattern = _split_glob(path)
            storage = Storage(folder)
        fs, root = storage.fs, storage.path()
        if pattern:
            found = retry(lambda: fs.glob(f"{root.rstrip('/')}/{pattern}", detail=True))
        elif retry(lambda: fs.isdir(root)):
            found = retry(lambda: fs.find(root, detail=True))
            found = {name: info for name, info in found.items() if name.endswith(tuple(suffixes))}
        else:
            found = {root: retry(lambda: fs.info(root))} if retry(lambda: fs.exists(root)) else {}
        targets = {name: _behind_link(fs, found[name]) for name in sorted(found)}
        files = [_source_file(fs, name, info) for name, info in targets.items() if info["type"] == "file"]
    except Exception as error:  # each fsspec back end has its own exception tree
        raise SourceError(f"cannot list {path}: {error}", "check the path and the credentials") from error
    if not files:
        raise SourceError(
            f"no file matches {path} (looked in {storage.url})",
            "set `ingest.sources[].path` to a file, a folder or a glob such as data/*.parquet",
        )
    return files


@contextlib.contextmanager
def open_file(file: SourceFile) -> Iterator[IO[bytes]]:
    """A source file to read from; every failure inside names it.

    Raises:
        SourceError: It is gone, has changed since `list_files`, or cannot be read.
    """
    storage = Storage(file.uri)
    fs, path = storage.fs, storage.path()
    try:
        found = _source_file(fs, path, _behind_link(fs, retry(lambda: fs.info(path))))
        if (found.size, found.change_mark) != (file.size, file.change_mark):
            raise SourceError(
                f"{file.uri} changed while it was read: it had {file.size:,} bytes at first, it has {found.size:,} now",
                "run again once nothing writes to it",
            )
        with retry(lambda: fs.open(path, "rb", cache_type="none")) as opened:  # a read-ahead would fetch bytes twice
            yield opened
    except (OSError, ValueError, pa.ArrowException) as error:  # pyarrow raises the last two of damaged files
        text = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"cannot read {file.uri}: {text}", "is the file whole? copy it again") from error


def _split_glob(path: str) -> tuple[str, str]:
    """A path as its fixed folder and the glob below it ('' if it has no wildcard)."""
    parts = path.split("/")
    for position, part in enumerate(parts):
        if any(letter in part for letter in "*?["):
            return "/".join(parts[:position]) or ("/" if path.startswith("/") else "."), "/".join(parts[position:])
    return path, ""


def _behind_link(fs: Any, info: dict[str, Any]) -> dict[str, Any]:
    """What is known of a file, or of what a link points to: a hub's cache is links."""
    return dict(fs.info(str(Path(info["name"]).resolve(strict=True)))) if info.get("islink") else info


def _source_file(fs: Any, name: str, info: dict[str, Any]) -> SourceFile:
    mark = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or ""
    return SourceFile(fs.unstrip_protocol(name), int(info["size"]), str(mark).strip('"'))
