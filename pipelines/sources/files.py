"""The files of a source: listed, split by name, and opened only if unchanged since the run was planned."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pipelines.dataset.errors import SourceError
from pipelines.dataset.pair import TEST, TRAIN, VALIDATION
from pipelines.dataset.storage import Storage, retry
from pipelines.sources.unit import SourceFile

READ_AHEAD = 8 << 20

SPLIT_NAMES = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev", "validation_unique"),
    TEST: ("test", "testing", "test_unique"),
}
"""Names that sources use for their splits."""
NUMBERED_OR_SUFFIX = re.compile(r"-\d+-of-\d+|\.")


def split_called(name: object) -> str | None:
    """Return the split that a name in a source stands for; None for any other text."""
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return next((split for split, names in SPLIT_NAMES.items() if text.strip().lower() in names), None)


def split_of_file(uri: str) -> str | None:
    """Return the split that a file's name starts or ends with, or else its folder's.

    `test_aes.json`, `hpdv2_test.json`, `validation-00000-of-00003.parquet`, `val/a.parquet`. A name that ends in `dev`
    does not count: FLUX.1-dev is a model.
    """
    *folders, name = uri.split("/")
    words = re.findall(r"[A-Za-z]+", NUMBERED_OR_SUFFIX.split(name)[0])
    found = split_called(words[0]) if words else None
    if found is None and words and words[-1].lower() != "dev":
        found = split_called(words[-1])
    return found or (split_called(folders[-1]) if folders else None)


def split_of_row(configured: str, named: object, uri: str) -> str | None:
    """Return the split that a source assigns to a row; None if the prompt's hash decides.

    Args:
        configured: `split` of the source's configuration.
        named: The row's `split` column, if there is one.
        uri: URI of the row's file.
    """
    if configured == "hash":
        return None
    if configured != "auto":
        return configured
    return (split_called(named) if named is not None else None) or split_of_file(uri)


def list_files(path: str, suffixes: Sequence[str]) -> list[SourceFile]:
    """List the files that a path, folder or glob names, sorted by URI.

    Raises:
        SourceError: There are none, or the path cannot be listed.
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
def open_file(file: SourceFile, *, read_ahead: bool = False, by_arrow: bool = False) -> Iterator[IO[bytes]]:
    """Open a source file for reading; every error inside the block names the file.

    Args:
        file: From `list_files`.
        read_ahead: Read ahead, for small sequential reads; with large ranges, bytes would be fetched twice.
        by_arrow: Whether only Arrow reads the file: then a local file is not copied through Python.

    Raises:
        SourceError: The file is gone, has changed since `list_files`, or cannot be read.
    """
    storage = Storage(file.uri)
    fs, path = storage.fs, storage.path()
    try:
        found = _source_file(fs, path, _behind_link(fs, retry(lambda: fs.info(path))))
        if (found.size, found.change_mark) != (file.size, file.change_mark):
            raise SourceError(
                f"{file.uri} changed while it was read: it had {file.size:,} bytes at first and {found.size:,} now",
                "run again once nothing writes to the file any more",
            )
        if by_arrow and storage.is_local:
            with pa.OSFile(path) as native:
                yield native
            return
        cache: dict[str, Any] = {"cache_type": "readahead", "block_size": READ_AHEAD} if read_ahead else {}
        with retry(lambda: fs.open(path, "rb", **(cache or {"cache_type": "none"}))) as opened:
            yield opened
    except (OSError, ValueError, pa.ArrowException) as error:  # pyarrow raises the last two of damaged files
        text = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"cannot read {file.uri}: {text}", "is the file complete? copy it again") from error


def _split_glob(path: str) -> tuple[str, str]:
    """Split a path into its fixed folder and the glob below it ('' if it has no wildcard)."""
    parts = path.split("/")
    for position, part in enumerate(parts):
        if any(letter in part for letter in "*?["):
            return "/".join(parts[:position]) or ("/" if path.startswith("/") else "."), "/".join(parts[position:])
    return path, ""


def _behind_link(fs: Any, info: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a file, or of the target of a link: the hub's cache consists of links."""
    return dict(fs.info(str(Path(info["name"]).resolve(strict=True)))) if info.get("islink") else info


def _source_file(fs: Any, name: str, info: dict[str, Any]) -> SourceFile:
    mark = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or ""
    return SourceFile(fs.unstrip_protocol(name), int(info["size"]), str(mark).strip('"'))
