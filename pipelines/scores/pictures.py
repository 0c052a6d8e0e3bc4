"""The images of one unit: read by range, checked, decoded and prepared once, in threads, ahead of the device.

An image may be used several times in a unit: scored, as a sibling of others, as a reference. It stays in memory until
its last use.
"""

import contextlib
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from pipelines.dataset.errors import ShardCorrupt
from pipelines.dataset.storage import Storage, is_whole
from pipelines.dataset.values import Row
from pipelines.scores.images import IMAGE_LISTS, TEXTS
from pipelines.scores.scorers.images import Picture
from pipelines.units.prefetch import prefetch
from pipelines.units.stats import Effort


@dataclass(frozen=True)
class Item:
    """One image to score, ready for the device."""

    position: int
    """In its unit."""
    picture: Picture
    prompt: str | None
    extra: dict[str, Any]
    """By need beside image and prompt: pictures, or what was JSON."""


class ImageReader:
    """Reads the images of a unit.

    Args:
        storage: The storage of the shards.
        preprocessings: The names of those to apply in the reading threads.
        needs: What the judges need beside images and prompts.
        effort: Counts the time of reading and of decoding.
    """

    def __init__(self, storage: Storage, preprocessings: Sequence[str], needs: Sequence[str], effort: Effort) -> None:
        self._storage, self._preprocessings, self._effort = storage, tuple(preprocessings), effort
        self._lists = [name for name in IMAGE_LISTS if name in needs]
        self._texts = [name for name in TEXTS if name in needs]
        self._lock = threading.Lock()
        self._uses: Counter[str] = Counter()
        self._pictures: dict[str, _Once] = {}

    def items(self, rows: pa.Table, readers: Executor, num_ahead: int) -> Generator[Item]:
        """Yield the images of a unit in order.

        Raises:
            ShardCorrupt: Bytes differ from their digest.
            StorageError: An image cannot be read.
        """
        listed = rows.to_pylist()
        for row in listed:
            self._uses.update(place["sha256"] for place in self._places(row))
        loaded = prefetch(self._load, list(enumerate(listed)), readers, num_ahead)
        try:
            yield from loaded
        finally:
            loaded.close()

    def _places(self, row: Row) -> list[Row]:
        own = {"shard": row["shard"], "offset": row["offset"], "length": row["length"], "sha256": row["image_sha256"]}
        return [own, *(place for name in self._lists for place in row[name] or ())]

    def _load(self, numbered: tuple[int, Row]) -> Item:
        position, row = numbered
        own, *others = (self._picture(place) for place in self._places(row))
        extra: dict[str, Any] = {}
        for name in self._lists:
            count = len(row[name] or ())
            extra[name], others = others[:count], others[count:]
        for name in self._texts:
            extra[name] = None if row[name] is None else json.loads(row[name])
        return Item(position, own, row["prompt"], extra)

    def _picture(self, place: Row) -> Picture:
        """Return a picture, which the first of the threads that ask for it reads; forget it after its last use."""
        digest = place["sha256"]
        with self._lock:
            once = self._pictures.setdefault(digest, _Once())
            self._uses[digest] -= 1
            if not self._uses[digest]:
                del self._pictures[digest], self._uses[digest]
        with once.lock:
            if once.picture is None:
                once.picture = self._read(place)
            return once.picture

    def _read(self, place: Row) -> Picture:
        with self._effort.measured("fetch"):
            data = read_bytes(self._storage, place)
        with self._effort.measured("decode", time.thread_time):
            return _prepared(data, self._preprocessings)


class _Once:
    """A picture that is read once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.picture: Picture | None = None


def read_bytes(storage: Storage, place: Row) -> bytes:
    """Read an image's bytes: a range of a shard, or a whole file at a path or URL of its own.

    Raises:
        ShardCorrupt: The bytes differ from their digest.
        StorageError: They cannot be read.
    """
    if place["offset"] is not None:
        return storage.read_range(place["shard"], place["offset"], place["length"], place["sha256"])
    folder, _, name = str(place["shard"]).rpartition("/")
    data = Storage(folder or "/").read(name)
    if not is_whole(data, place["sha256"]):
        raise ShardCorrupt(
            f"the image {place['shard']} differs from what was planned (sha256 {place['sha256'][:12]})",
            "do not change images during a run; rerun the command to use the new ones",
        )
    return data


def _prepared(data: bytes, preprocessings: Sequence[str]) -> Picture:
    try:
        picture = Picture(Image.open(io.BytesIO(data)))
    except Exception as error:  # Pillow's parsers fail in many ways
        return Picture.broken(f"the image cannot be decoded: {str(error) or type(error).__name__}")
    if picture.unreadable is None:
        for name in preprocessings:
            with contextlib.suppress(Exception):  # found again, and said, by the scorer that needs it
                picture.prepared(name)
    return picture
