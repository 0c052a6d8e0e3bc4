"""One unit of pairs to one latent shard: read and decode ahead, encode in batches of one bucket, write in order."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import ModelError
from pipelines.dataset.layout import LATENTS, LATENTS_SCHEMA
from pipelines.dataset.pair import Reason
from pipelines.dataset.storage import Storage
from pipelines.encoders import LatentEncoder
from pipelines.fingerprint import latents_fingerprint
from pipelines.geometry import Bucket, Placed, bucket_list, place_pair
from pipelines.unit_shard import UnitShard, from_ipc, pack, to_ipc

Pair = dict[str, Any]
"""A kept row of the pairs table: its key, its shard, and where both images lie in it."""
Encoder = Callable[[NDArray[np.uint8]], Tensor]
ImageKey = tuple[str, Bucket]
"""An image's digest and its bucket: equal keys give equal latents."""
T = TypeVar("T")
R = TypeVar("R")

READERS = 8  # reads from a storage wait; two would feed a GPU with JPEGs of 1024 x 1024 from a local disk
DAMAGED = (OSError, SyntaxError, ValueError, EOFError)  # what Pillow raises on a bad image


class WriteLatents:
    """Encode the pairs of one unit and write their shard; the only place that writes latents.

    In:       A unit's pairs.        Out: its table rows, in the unit's order.
    Runs as:  Ray Data actor, one GPU or CPU; the latents of one unit in memory (half a GB for a shard of 256 MB).
    Retry:    safe: name and bytes follow from the unit alone.
    Drops:    nothing: what cannot be encoded is a quarantined row with its reason.
    Raises:   ModelError (with the first unit: see `unwrap`), StorageError, ShardCorrupt.
    """

    def __init__(self, config: EncodeConfig, storage: Storage, fingerprint: str, num_threads: int) -> None:
        self._config, self._storage, self._fingerprint = config, storage, fingerprint
        self._num_threads = num_threads
        self._encoder: LatentEncoder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One unit in, one out."""
        if self._encoder is None:
            check_same_model(self._fingerprint, latents_fingerprint(self._config), self._config.model)
            use_threads(self._num_threads)
            self._encoder = LatentEncoder(self._config.model, self._config.vae)
        (unit,) = batch.to_pylist()
        rows = write_latents(
            unit["unit_id"], from_ipc(unit["rows"]), self._config, self._storage, self._fingerprint, self._encoder
        )
        return pa.table({"unit_id": [unit["unit_id"]], "rows": [to_ipc(rows)]})


def check_same_model(planned: str, found: str, model: str) -> None:
    """A node that holds other files under the same name must not mix its numbers in."""
    if planned != found:
        raise ModelError(
            f"this node's {model} has the fingerprint {found}, the driver's has {planned}",
            "put the same model on every node, or name it by a URL that all of them reach",
        )


def use_threads(num_threads: int) -> None:
    """Torch's threads in an actor: Ray allows one for each CPU it gave, and may count CPUs that are not there."""
    torch.set_num_threads(max(1, min(num_threads, len(os.sched_getaffinity(0)))))


def write_latents(
    unit: str, pairs: pa.Table, config: EncodeConfig, storage: Storage, fingerprint: str, encoder: Encoder
) -> pa.Table:
    """Write the shard of a unit; returns one row for every pair, in order."""
    dtype = getattr(torch, config.dtype)
    loaded: list[Loaded] = []
    batches = _Batches(encoder, config.batch_size, dtype)
    buckets = bucket_list(config.resolution, config.buckets)
    num_ahead = READERS + config.batch_size  # the next batch is ready, and the readers stay busy
    with ThreadPoolExecutor(READERS, thread_name_prefix="decode") as readers:
        for found in ahead(lambda pair: load_pair(pair, storage, buckets), pairs.to_pylist(), readers, num_ahead):
            for key, placed in zip(found.keys, found.placed, strict=True):
                batches.add(key, placed.pixels)
            loaded.append(found.without_pixels())
    latents = batches.finish()
    with UnitShard(storage, f"{LATENTS}/{fingerprint}/{unit}.tar", unit, LATENTS_SCHEMA) as shard:
        for found in loaded:
            _write_pair(found, latents, shard)
        return shard.publish()


def _write_pair(found: "Loaded", latents: dict[ImageKey, Tensor | None], shard: UnitShard) -> None:
    if found.bucket is None:
        shard.quarantine({"pair_key": found.pair_key}, Reason.TRUNCATED_IMAGE)
        return
    row = {"pair_key": found.pair_key, "bucket_height": found.bucket[0], "bucket_width": found.bucket[1]}
    latents_0, latents_1 = (latents[key] for key in found.keys)
    if latents_0 is None or latents_1 is None:
        shard.quarantine(row, Reason.NON_FINITE)
        return
    time_ids = {f"time_ids_{side}": json.dumps(list(ids)) for side, ids in enumerate(found.time_ids)}
    shard.keep(row, found.pair_key, pack({"latents_0": latents_0, "latents_1": latents_1}, time_ids))


@dataclass(frozen=True)
class Loaded:
    """A pair that was read: its two images in their bucket; no bucket if one of them cannot be decoded."""

    pair_key: str
    bucket: Bucket | None = None
    keys: tuple[ImageKey, ...] = ()
    time_ids: tuple[tuple[int, ...], ...] = ()
    placed: tuple[Placed, ...] = ()

    def without_pixels(self) -> "Loaded":
        """The same without what takes memory."""
        return Loaded(self.pair_key, self.bucket, self.keys, self.time_ids)


def load_pair(pair: Pair, storage: Storage, buckets: tuple[Bucket, ...]) -> Loaded:
    """Read both images of a pair, each against its digest, and place them in their bucket."""
    data = [
        storage.read_range(pair["shard"], pair[f"offset_{side}"], pair[f"length_{side}"], pair[f"image_{side}_sha256"])
        for side in (0, 1)
    ]
    try:
        bucket, *placed = place_pair(data[0], data[1], buckets)
    except DAMAGED:
        return Loaded(pair["pair_key"])
    keys = tuple((pair[f"image_{side}_sha256"], bucket) for side in (0, 1))
    return Loaded(pair["pair_key"], bucket, keys, tuple(image.time_ids for image in placed), tuple(placed))


def ahead(function: Callable[[T], R], items: Iterable[T], pool: ThreadPoolExecutor, num_ahead: int) -> Iterator[R]:
    """`map` in threads and in order, at most `num_ahead` calls before the consumer."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class _Batches:
    """Gathers distinct images by bucket and encodes whenever a bucket has a batch; None for non-finite latents."""

    def __init__(self, encoder: Encoder, batch_size: int, dtype: torch.dtype) -> None:
        self._encoder, self._batch_size, self._dtype = encoder, batch_size, dtype
        self._waiting: dict[Bucket, dict[ImageKey, NDArray[np.uint8]]] = {}
        self._latents: dict[ImageKey, Tensor | None] = {}

    def add(self, key: ImageKey, pixels: NDArray[np.uint8]) -> None:
        """Take an image, unless it is here already."""
        images = self._waiting.setdefault(key[1], {})
        if key in self._latents or key in images:
            return
        images[key] = pixels
        if len(images) == self._batch_size:
            self._encode(key[1])

    def _encode(self, bucket: Bucket) -> None:
        images = self._waiting.pop(bucket)
        encoded_BCHW = self._encoder(np.stack(list(images.values()))).to(self._dtype)
        for key, latents_CHW in zip(images, encoded_BCHW, strict=True):
            finite = bool(torch.isfinite(latents_CHW).all())
            # A clone, for a view would hold its whole batch; contiguous, for convolutions may give channels last.
            self._latents[key] = latents_CHW.clone(memory_format=torch.contiguous_format) if finite else None

    def finish(self) -> dict[ImageKey, Tensor | None]:
        """Encode what is left; the latents of every image."""
        for bucket in [bucket for bucket, images in self._waiting.items() if images]:
            self._encode(bucket)
        return self._latents
