"""A storage at one URL, through fsspec: every byte that mapo reads or writes goes through here.

A write is complete or absent: local files are written under a temporary name and renamed; objects are uploaded as a
whole, and then checked on the store. Transient errors are retried; a short read is an error, never short data.
"""

import contextlib
import hashlib
import itertools
import os
import random
import re
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from pipelines.dataset.errors import ShardCorrupt, StorageError
from pipelines.dataset.object_store import (
    FINAL_ERRORS,
    ShortBytes,
    Upload,
    WrongBytes,
    is_taken,
    is_transient,
    open_file_system,
)

T = TypeVar("T")

MAX_ATTEMPTS = 5
FIRST_WAIT_S = 0.2  # doubled at each attempt: 0.2 + 0.4 + 0.8 + 1.6 = 3 s in all, at most
LONGEST_WAIT_S = 10.0
PATIENCE = "MAPO_STORAGE_PATIENCE_S"
LAST_START_S = 120.0  # no attempt begins later than this after the first
COPIED_BYTES = 1 << 22
UNFINISHED = re.compile(r"\.[^/]+\.[0-9a-f]{8}\.tmp")  # what `_put` writes beside a name, left by a killed writer
PLACE_HINT = "check that the path exists, that you have access to it, and that credentials are in the environment"


def retry(action: Callable[[], T], *, patience: float = 0.0) -> T:
    """Run `action`, and retry it after an error that `is_transient`; raise the last error unchanged.

    Waits are drawn between half and all of their length, so that many clients do not retry at the same moment.

    Args:
        action: The function to run.
        patience: Seconds to wait out an outage, whatever the number of attempts; not for wrong bytes.
    """
    started = time.monotonic()
    for attempt in itertools.count():
        try:
            return action()
        except Exception as error:  # each fsspec back end has its own exception tree
            wait_s = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1)  # noqa: S311
            is_outage = patience > 0 and not isinstance(error, WrongBytes)
            late = time.monotonic() + wait_s > started + (patience if is_outage else LAST_START_S)
            last = attempt >= MAX_ATTEMPTS - 1 and not is_outage
            if last or late or not is_transient(error):
                raise
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def patience_s() -> float:
    """Return how long to wait for an object store that does not answer: `MAPO_STORAGE_PATIENCE_S`, set by a run.

    Outside of a run it is 0, so that a mistyped address is reported soon.
    """
    try:
        return float(os.environ.get(PATIENCE, "0"))
    except ValueError:
        return 0.0


def absolute_url(url: str) -> str:
    """Return the URL with a local path made absolute: Ray's workers have another working directory."""
    if "://" not in url:
        return str(Path(url).expanduser().resolve())
    return url if not url.startswith("file://") else str(Path(url.removeprefix("file://")).resolve())


class Storage:
    """A folder on any fsspec file system; names are relative to it and use '/'.

    Pickled as its URL alone, so that a file system is opened where it is used.

    Raises:
        StorageError: From every failed read or write, with its path and a hint.
    """

    def __init__(self, url: str) -> None:
        self.url = absolute_url(str(url)).rstrip("/") or "/"

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.url,)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            return open_file_system(self.url)
        except (ValueError, ImportError) as error:
            raise StorageError(
                f"no file system for {self.url}: {error}",
                "use a local path or an fsspec URL such as s3://bucket/folder (`pip install 'mapo[s3]'`)",
            ) from error

    @property
    def fs(self) -> Any:
        """The fsspec file system."""
        return self._opened[0]

    @property
    def is_local(self) -> bool:
        """Whether this is a folder of a mounted file system."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str = "") -> str:
        """Return the path of `name` on `fs`."""
        root = str(self._opened[1])
        return f"{root.rstrip('/')}/{name}" if name else root

    def uri(self, name: str = "") -> str:
        """Return the URL of `name`, for libraries that open objects themselves."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    def child(self, name: str) -> "Storage":
        """Return the storage of the folder `name`."""
        return Storage(self.uri(name))

    def _attempt(self, what: str, name: str, action: Callable[[], T]) -> T:
        try:
            return retry(action, patience=0.0 if self.is_local else patience_s())
        except StorageError:
            raise
        except Exception as error:  # each fsspec back end has its own exception tree
            text = str(error) or type(error).__name__
            if isinstance(error, FileNotFoundError) and " " not in text:  # often the path alone
                text = "no such object"
            raise StorageError(f"cannot {what} {self.uri(name)}: {text}", PLACE_HINT) from error

    def exists(self, name: str) -> bool:
        """Return whether an object or a folder has this name."""
        return bool(self._attempt("look up", name, lambda: self.fs.exists(self.path(name))))

    def size(self, name: str) -> int:
        """Return the size of an object in bytes."""
        return int(self._attempt("look up", name, lambda: self.fs.size(self.path(name))))

    def names(self, folder: str = "") -> list[str]:
        """List all objects below `folder`, relative to this storage, sorted; none if there is no such folder."""
        prefix = self.path().rstrip("/") + "/"
        found = self._attempt("list", folder, lambda: self.fs.find(self.path(folder)))
        names = (str(path).removeprefix(prefix) for path in found)
        return sorted(name for name in names if not UNFINISHED.fullmatch(name.rpartition("/")[2]))

    def read(self, name: str) -> bytes:
        """Read a whole object."""

        def get() -> bytes:
            data = bytes(self.fs.cat_file(self.path(name)))
            if not self.is_local and len(data) != (num_bytes := int(self.fs.size(self.path(name)))):
                raise ShortBytes(f"{len(data)} of {num_bytes} bytes")
            return data

        return self._attempt("read", name, get)

    def read_if_there(self, name: str) -> bytes | None:
        """Read a whole object; return None if there is none.

        One read decides: an object that is asked for first may be written or removed before it is read.
        """
        try:
            return self.read(name)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None
            raise

    def read_range(
        self, name: str, offset: int, length: int, sha256: str | None = None, crc32: int | None = None
    ) -> bytes:
        """Read exactly `length` bytes from `offset`, checked against `sha256` (hex) or `crc32` if one is given.

        Raises:
            ShardCorrupt: The object is too short, or the bytes differ from the digest.
        """

        def get() -> bytes:
            path = self.path(name)
            if self.is_local:
                data = _pread(path, offset, length)
            else:
                data = bytes(self.fs.cat_file(path, start=offset, end=offset + length))
            if len(data) != length:
                raise ShortBytes(f"{len(data)} of {length} bytes at {offset}")
            if not is_whole(data, sha256, crc32):
                known = f"digest {sha256[:12]}" if sha256 and crc32 is None else f"CRC-32 {crc32:08x}"
                raise WrongBytes(f"the {length} bytes at {offset} differ from their {known}")
            return data

        try:
            return self._attempt("read", name, get)
        except StorageError as error:
            if self._is_damaged(error.__cause__, name, offset + length):
                raise ShardCorrupt(error.message, "`mapo data verify` lists what is damaged") from error
            raise

    def _is_damaged(self, cause: BaseException | None, name: str, end: int) -> bool:
        """Return whether a failed read is the object's fault, not the network's.

        An object store refuses a range past the end entirely; a short answer for a long object was cut in transit.
        """
        if isinstance(cause, WrongBytes) and not isinstance(cause, ShortBytes):
            return True
        if not isinstance(cause, OSError) or isinstance(cause, FINAL_ERRORS):
            return False
        try:
            return int(self.fs.size(self.path(name))) < end
        except Exception:  # the error that led here says more
            return False

    def write(self, name: str, data: bytes) -> None:
        """Write a whole object; readers see the old one or this one, never a part."""
        self._attempt("write", name, lambda: self._put(name, data))

    def create(self, name: str, data: bytes) -> bool:
        """Write a whole object unless it exists; of several concurrent writers exactly one succeeds.

        Returns:
            Whether the object is now this one. An object with the same bytes counts: the answer may have been lost.
        """
        try:
            self._attempt("create", name, lambda: self._create(name, data))
        except StorageError as error:
            if not is_taken(error.__cause__):
                raise
            return self.read(name) == data
        return True

    def _create(self, name: str, data: bytes) -> None:
        path = self.path(name)
        if not self.is_local:
            self.fs.pipe_file(path, data, mode="create")
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target)
        try:
            with temporary.open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.link(temporary, target)  # fails if there is one, and shows it whole
        finally:
            temporary.unlink(missing_ok=True)

    def upload(self, name: str, local_file: Path) -> None:
        """Upload a local file as a whole object."""
        self._attempt("write", name, lambda: self._put(name, local_file))

    def upload_folder(self, name: str, local_folder: Path) -> None:
        """Upload every file of a local folder below `name`."""
        for file in sorted(found for found in local_folder.rglob("*") if found.is_file()):
            self.upload(f"{name}/{file.relative_to(local_folder).as_posix()}", file)

    def download_folder(self, name: str, local_folder: Path) -> None:
        """Copy every object below `name` into a local folder."""
        for found in self.names(name):
            target = local_folder / found.removeprefix(f"{name}/" if name else "")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._attempt("read", found, lambda name=found, file=target: self._get(name, file))  # type: ignore[misc]

    def _get(self, name: str, local_file: Path) -> None:
        self.fs.get_file(self.path(name), str(local_file))
        found, num_bytes = local_file.stat().st_size, int(self.fs.size(self.path(name)))
        if found != num_bytes:
            raise ShortBytes(f"{found} of {num_bytes} bytes")

    def _put(self, name: str, content: bytes | Path) -> None:
        path = self.path(name)
        if not self.is_local:
            return Upload(content).put(self.fs, path)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        in_place = isinstance(content, Path) and content.parent == target.parent and UNFINISHED.fullmatch(content.name)
        temporary = content if isinstance(content, Path) and in_place else _beside(target)
        try:
            with temporary.open("r+b" if in_place else "wb") as out:
                if isinstance(content, bytes):
                    out.write(content)
                elif not in_place:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, out, COPIED_BYTES)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def unfinished(self, name: str) -> Iterator[Path]:
        """Yield a local file to fill before `upload` under this name; remove it afterwards.

        In a local storage it lies next to the name, so that `upload` renames it and copies nothing.
        """
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="mapo-unfinished-") as folder:
                yield Path(folder) / "unfinished"
            return
        file = _beside(Path(self.path(name)))
        self._attempt("write", name, lambda: file.parent.mkdir(parents=True, exist_ok=True))
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""
        self._attempt("delete", name, lambda: self.fs.rm(self.path(name)) if self.fs.exists(self.path(name)) else None)

    def check_writable(self) -> None:
        """Write and remove a small object, so that a wrong path is found before any work."""
        probe = f".write-probe-{uuid.uuid4().hex[:8]}"
        self.write(probe, b"probe")
        self.delete(probe)


def _beside(target: Path) -> Path:
    """Return the temporary name next to a file, under which it is written first."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")


def _pread(path: str, offset: int, length: int) -> bytes:
    """Read a range of a local file in three system calls: three times as fast as fsspec, and nothing stays open."""
    opened = os.open(path, os.O_RDONLY)
    try:
        return os.pread(opened, length, offset)
    finally:
        os.close(opened)


def file_sha256(file: Path) -> str:
    """Return the hex digest of a local file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def is_whole(data: bytes, sha256: str | None, crc32: int | None = None) -> bool:
    """Return whether bytes match their digest, if one is known.

    If both are known, the CRC-32 is checked: it finds all errors of disks and networks, in a fifth of the time of
    sha256 on processors without instructions for that (270 and 1,310 us for the latents of a 1024 x 1024 pair).
    """
    if crc32 is not None:
        return zlib.crc32(data) == crc32
    return sha256 is None or hashlib.sha256(data).hexdigest() == sha256
