"""Prepares the images of one unit for the encoder: planned, read and decoded ahead, in batches of one shape.

A distinct image is read, decoded and encoded once for each bucket it is in. Batches follow from the unit alone, so
that its bytes are the same every time. Letters: B images, H rows, W columns, C channels, h and w of latents.
"""

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.dataset.pair import Reason
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import Row
from pipelines.encode.encoders import Launched
from pipelines.encode.geometry import Bucket, Placed, choose_bucket, mirror, open_image, place
from pipelines.units.actor import BatchSize
from pipelines.units.stats import Effort

DAMAGED = (OSError, SyntaxError, ValueError, EOFError)  # what Pillow raises on a bad image
SIDEWAYS = 5  # EXIF orientations from here on swap height and width
MAX_GAP_BYTES = 65_536  # between the images of a pair; in our own tars a header and padding


class ImageKey(NamedTuple):
    """An image's digest, its bucket, and whether it is mirrored: equal keys give equal latents."""

    digest: str
    bucket: Bucket
    is_mirrored: bool = False


class Encoder(Protocol):
    """The encoder of images: see `LatentEncoder`."""

    def launch(self, images: NDArray[np.uint8]) -> Launched:
        """Start a pass over images (B, H, W, C; 0..255)."""


@dataclass(frozen=True)
class Planned:
    """A pair or single image, the bucket of its images, and the sides that no row before it in the unit has."""

    row: Row
    bucket: Bucket
    new_sides: tuple[int, ...]

    @property
    def keys(self) -> tuple[ImageKey, ...]:
        """The keys of its two images, or of the only one."""
        return tuple(ImageKey(self.row[f"image_{side}_sha256"], self.bucket) for side in sides_of(self.row))


@dataclass(frozen=True)
class Latents:
    """One encoded image."""

    latents_CHW: Tensor
    time_ids: tuple[int, ...]


def sides_of(row: Row) -> tuple[int, ...]:
    """Return the sides of a row of the pairs table that have an image: both of a pair, or 0."""
    return (0,) if row["image_1_sha256"] is None else (0, 1)


def plan_pairs(pairs: Iterable[Row], buckets: tuple[Bucket, ...]) -> list[Planned]:
    """Choose buckets by the sizes in the table, and find the new images of each pair or single image."""
    seen: set[ImageKey] = set()
    planned = []
    for pair in pairs:
        sizes = [_upright_size(pair, side) for side in sides_of(pair)]
        bucket = choose_bucket(sizes[0], sizes[-1], buckets)
        keys = Planned(pair, bucket, ()).keys
        new = tuple(side for side, key in enumerate(keys) if key not in seen)
        seen.update(keys)
        planned.append(Planned(pair, bucket, new))
    return planned


def _upright_size(pair: Row, side: int) -> tuple[int, int]:
    size = pair[f"height_{side}"], pair[f"width_{side}"]
    return size if (pair[f"orientation_{side}"] or 1) < SIDEWAYS else size[::-1]


def load(
    planned: Planned, storage: Storage, effort: Effort, *, flips: bool = False
) -> list[tuple[ImageKey, Placed | Reason]]:
    """Read the new images of a row into their bucket, with `flips` mirrored as well; a reason if one is damaged.

    Raises:
        ShardCorrupt: Bytes differ from their digest.
    """
    if not planned.new_sides:
        return []
    with effort.measured("fetch"):
        files = _read(planned, storage)
    with effort.measured("decode", time.thread_time):
        placed = [(planned.keys[side], _placed(data, planned.bucket)) for side, data in files.items()]
        return placed + [_mirrored(*each) for each in placed] if flips else placed


def _placed(data: bytes, bucket: Bucket) -> Placed | Reason:
    try:
        return place(open_image(data), bucket)
    except DAMAGED:
        return Reason.TRUNCATED_IMAGE


def _mirrored(key: ImageKey, image: Placed | Reason) -> tuple[ImageKey, Placed | Reason]:
    return key._replace(is_mirrored=True), image if isinstance(image, Reason) else mirror(image)


def _read(planned: Planned, storage: Storage) -> dict[int, bytes]:
    """Read the files of the new sides and check their digests; in one request if both are needed and adjacent."""
    pair = planned.row
    places = {side: (pair[f"offset_{side}"], pair[f"length_{side}"]) for side in planned.new_sides}
    files: dict[int, bytes] = {}
    if len(places) == 2:
        start, end = places[0][0], sum(places[1])
        if 0 <= places[1][0] - sum(places[0]) <= MAX_GAP_BYTES:
            span = storage.read_range(pair["shard"], start, end - start)
            files = {side: span[offset - start : offset - start + size] for side, (offset, size) in places.items()}
    for side, (offset, size) in places.items():
        digest = pair[f"image_{side}_sha256"]
        if side not in files or hashlib.sha256(files[side]).hexdigest() != digest:
            files[side] = storage.read_range(pair["shard"], offset, size, digest)  # tries again; says what is damaged
    return files


class Batches:
    """Gathers the images of a unit by bucket, and encodes whenever a bucket has a full batch.

    One pass runs while the next batch is gathered. Mirrored images have separate batches, so that the others are in
    the same batches, and have the same bits, with and without them.

    Args:
        encoder: Runs the passes.
        batch_size: Images per pass; shared by all units of an actor.
        dtype: Type of the stored latents.
        effort: Counts the device's time.
    """

    def __init__(self, encoder: Encoder, batch_size: BatchSize, dtype: torch.dtype, effort: Effort) -> None:
        self._encoder, self._batch_size, self._dtype, self._effort = encoder, batch_size, dtype, effort
        self._waiting: dict[tuple[Bucket, bool], list[tuple[ImageKey, Placed]]] = {}
        self._running: list[tuple[list[tuple[ImageKey, Placed]], Launched]] = []
        self._done: dict[ImageKey, Latents | Reason] = {}

    def add(self, key: ImageKey, image: Placed | Reason) -> None:
        """Add an image, or the reason why it is missing."""
        if isinstance(image, Reason):
            self._done[key] = image
            return
        kind = key.bucket, key.is_mirrored
        images = self._waiting.setdefault(kind, [])
        images.append((key, image))
        if len(images) >= self._batch_size.size:
            self._encode(self._waiting.pop(kind))

    def finish(self) -> dict[ImageKey, Latents | Reason]:
        """Encode the rest; return the latents of every image, or the reason why it has none."""
        for images in self._waiting.values():
            self._encode(images)
        self._waiting.clear()
        self._collect()
        return self._done

    def _encode(self, images: list[tuple[ImageKey, Placed]]) -> None:
        while images:
            batch = images[: self._batch_size.size]
            if self._launch(batch):
                images = images[len(batch) :]

    def _launch(self, images: list[tuple[ImageKey, Placed]]) -> bool:
        """Start a pass and collect the one before it; return False if there is not enough memory for so many images."""
        height, width = images[0][0].bucket
        launched = self._batch_size.attempt(
            lambda: self._encoder.launch(np.stack([image.pixels for _, image in images])),
            len(images),
            f"encode even one image of {height} x {width} pixels",
            "lower `encode.resolution`, set `encode.vae_dtype` to bfloat16, or use machines with more memory",
        )
        self._collect()
        if launched is not None:
            self._running.append((images, launched))
        return launched is not None

    def _collect(self) -> None:
        for images, launched in self._running:
            encoded_BCHW, seconds = launched.wait()
            self._effort.add_seconds("encode", seconds)
            self._effort.num_images += len(images)
            for (key, image), latents_CHW in zip(images, encoded_BCHW.to(self._dtype), strict=True):
                if not bool(torch.isfinite(latents_CHW).all()):
                    self._done[key] = Reason.NON_FINITE
                    continue
                # A clone, for a view would hold its whole batch.
                kept_CHW = latents_CHW.clone(memory_format=torch.contiguous_format)
                self._done[key] = Latents(kept_CHW, image.time_ids)
        self._running.clear()
