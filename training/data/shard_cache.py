"""A cache of whole shards on this node's disk, in addition to range reads; one folder for all processes of the node.

A step never waits for a shard: a pair whose shard is missing is read by range while the shard is fetched. A file is
named by the digest of its shard, so that runs and data sets share a folder. No failure here fails the run.
"""

import contextlib
import hashlib
import logging
import math
import os
import re
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

from pipelines.dataset.errors import ConfigError, ShardCorrupt
from pipelines.dataset.storage import Storage, is_whole
from training.data.index import Location
from training.data.threads import MAX_EXIT_S, Threads

NUM_FETCHERS = 8
PIECE_BYTES = 8 << 20  # of a shard, in one request and in the memory of each fetcher
IDLE_S = 600.0  # a shard used within this time does not make room: with a random order each is always in use
TOUCH_S = 60.0  # uses of a shard are noted this often, in its file's time of change
RETRY_S = 60.0  # after a fetch that brought nothing
OURS = re.compile(r"[0-9a-f]{64}\.(tar|part)")

log = logging.getLogger(__name__)


class ShardCache:
    """Cache of the shards that pairs were read from.

    A cache smaller than the data set keeps what it fetched first while that is still used: fetching 256 MiB for each
    sample of a random order would cost more than it saves.

    Args:
        storage: The storage that shards are fetched from.
        folder: A folder on a disk of this node.
        max_bytes: Size limit of all shards in the folder; the least recently used are removed, unless just used.

    Raises:
        ConfigError: The folder cannot be written to.
    """

    def __init__(self, storage: Storage, folder: str | Path, max_bytes: int) -> None:
        self._storage = storage
        self._folder = Path(folder).expanduser().absolute()
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._not_before: dict[str, float] = {}  # shards that are wanted already, or were of late, and in vain
        self._num_wanted = 0
        self._fetchers: Threads[Location] | None = None  # from the first miss on
        self._touched: dict[str, float] = {}
        self._closed = self._has_warned = False
        try:
            (self._folder / "locks").mkdir(parents=True, exist_ok=True)
            with self._folder_lock():
                pass
        except OSError as error:
            raise ConfigError(
                f"cannot write to the shard cache {self._folder}: {error.strerror or error}",
                "set `train.cache_dir` to a folder on a local disk of every node, or leave it out",
            ) from error

    def read(self, where: Location) -> bytes | None:
        """Return a member; None if its shard is not cached, which then starts to be fetched in the background."""
        if not where.shard_sha256 or where.shard_bytes > self._max_bytes:
            return None
        file = self._file(where)
        try:
            opened = os.open(file, os.O_RDONLY)
            try:
                data = os.pread(opened, where.length, where.offset)
            finally:
                os.close(opened)
        except OSError:  # not here, or a bad disk
            self._want(where)
            return None
        if is_whole(data, where.sha256, where.crc32):
            self._touch(file)
            return data
        self._warn(f"{file.name} is damaged; fetching it again")
        with contextlib.suppress(OSError):
            file.unlink()
        self._want(where)
        return None

    def fetch(self, where: Location) -> bool:
        """Fetch a whole shard now; return False if there is no room or another process is fetching it.

        Raises:
            StorageError: The shard cannot be read.
            ShardCorrupt: The shard does not match its digest.
            OSError: The disk is full or broken.
        """
        file = self._file(where)
        try:
            with FileLock(self._folder / "locks" / f"{where.shard_sha256}.lock", timeout=0):
                if file.exists():
                    return True
                part = file.with_suffix(".part")
                try:
                    if not self._reserve(where, part):
                        return False
                    self._download(where, part)
                    part.replace(file)
                finally:
                    part.unlink(missing_ok=True)
        except Timeout:
            return False
        return True

    @property
    def is_fetching(self) -> bool:
        """Whether shards are being fetched."""
        return self._num_wanted > 0

    def wait(self) -> None:
        """Wait until nothing is being fetched."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_wanted or self._closed)

    def close(self) -> None:
        """Stop fetching; remove shards that are only partly here."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._fetchers is not None:
            self._fetchers.stop(wait_s=MAX_EXIT_S)

    @property
    def _is_over(self) -> bool:
        return self._closed or (self._fetchers is not None and self._fetchers.is_stopped)

    def _file(self, where: Location) -> Path:
        return self._folder / f"{where.shard_sha256}.tar"

    def _folder_lock(self) -> FileLock:
        return FileLock(self._folder / "locks" / "folder.lock")

    def _touch(self, file: Path) -> None:
        now = time.monotonic()
        if now < self._touched.get(file.name, -TOUCH_S) + TOUCH_S:
            return
        self._touched[file.name] = now
        with contextlib.suppress(OSError):  # another process may have made room
            os.utime(file)

    def _want(self, where: Location) -> None:
        with self._changed:
            if self._closed or time.monotonic() < self._not_before.get(where.shard, 0.0):
                return
            self._not_before[where.shard] = math.inf
            self._num_wanted += 1
            if self._fetchers is None:
                self._fetchers = Threads(NUM_FETCHERS, "shard-fetcher", self._fetch_wanted)
        self._fetchers.put(where)

    def _fetch_wanted(self, where: Location) -> None:
        again = time.monotonic() + RETRY_S
        try:
            if self.fetch(where):
                again = 0.0
        except Exception as error:  # whatever it is, ranges are read meanwhile
            if isinstance(error, ShardCorrupt):
                again = math.inf
            if not self._is_over:
                self._warn(f"cannot keep {where.shard}: {getattr(error, 'message', error)}")
        with self._changed:
            self._not_before[where.shard] = again
            self._num_wanted -= 1
            self._changed.notify_all()

    def _warn(self, message: str) -> None:
        """Say it once: what holds for one shard of a full disk holds for hundreds."""
        with self._changed:
            is_first, self._has_warned = not self._has_warned, True
        log.log(logging.WARNING if is_first else logging.DEBUG, "shard cache %s: %s", self._folder, message)

    def _reserve(self, where: Location, part: Path) -> bool:
        """Make room, and take it with a file of full length: a full disk is noticed before a byte is fetched."""
        with self._folder_lock():
            part.unlink(missing_ok=True)
            files = self._files()
            self._remove_abandoned(files)
            excess = sum(stat.st_size for stat in files.values()) + where.shard_bytes - self._max_bytes
            idle = time.time() - IDLE_S
            kept = sorted((stat.st_mtime, file) for file, stat in files.items() if file.suffix == ".tar")
            going = [file for used, file in kept if used < idle]
            if excess > sum(files[file].st_size for file in going):
                return False
            for file in going:
                if excess <= 0:
                    break
                file.unlink(missing_ok=True)  # who reads from it has it open
                excess -= files[file].st_size
            with part.open("wb") as out:
                os.posix_fallocate(out.fileno(), 0, where.shard_bytes)
            return True

    def _remove_abandoned(self, files: dict[Path, os.stat_result]) -> None:
        for file in [file for file in files if file.suffix == ".part" and self._is_abandoned(file)]:
            file.unlink(missing_ok=True)
            del files[file]

    def _files(self) -> dict[Path, os.stat_result]:
        files = {}
        for file in self._folder.iterdir():
            if OURS.fullmatch(file.name):
                with contextlib.suppress(FileNotFoundError):  # it was renamed or removed meanwhile
                    files[file] = file.stat()
        return files

    def _is_abandoned(self, part: Path) -> bool:
        """Return whether the process that fetched it is gone: a lock does not outlive its process."""
        try:
            with FileLock(self._folder / "locks" / f"{part.stem}.lock", timeout=0):
                return True
        except Timeout:
            return False

    def _download(self, where: Location, part: Path) -> None:
        digest = hashlib.sha256()
        with part.open("r+b") as out:
            for offset in range(0, where.shard_bytes, PIECE_BYTES):
                if self._is_over:
                    raise OSError("the cache was closed")
                length = min(PIECE_BYTES, where.shard_bytes - offset)
                piece = self._storage.read_range(where.shard, offset, length)
                digest.update(piece)
                out.write(piece)
        if digest.hexdigest() != where.shard_sha256:
            raise ShardCorrupt(f"{where.shard} does not match its digest {where.shard_sha256[:12]}")
