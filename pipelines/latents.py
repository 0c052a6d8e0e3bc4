"""One unit of pairs to one latent shard. While it is encoded, the next unit is read and the last one is written."""

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import torch

from pipelines.ahead import Ahead
from pipelines.attempts import begin
from pipelines.config import EncodeConfig
from pipelines.dataset.errors import ModelError
from pipelines.dataset.layout import LATENTS, LATENTS_SCHEMA
from pipelines.dataset.pair import Reason
from pipelines.dataset.storage import Storage
from pipelines.effort import Effort
from pipelines.encoders import LatentEncoder
from pipelines.fingerprint import latents_fingerprint
from pipelines.geometry import Placed, bucket_list
from pipelines.image_batches import Batches, BatchSize, Encoder, ImageKey, Latents, Planned, load, plan_pairs
from pipelines.unit_shard import UnitShard, from_ipc, pack, to_ipc

READERS = 8  # reads from a storage wait; two would feed a GPU with JPEGs of 1024 x 1024 from a local disk

Loaded = Ahead[Planned, list[tuple[ImageKey, Placed | Reason]]]
T = TypeVar("T")


class WriteLatents:
    """Encode the pairs of a unit and write their shard; the only place that writes latents.

    In:       A unit's pairs.        Out: its table rows, in the unit's order, and what it cost.
    Runs as:  Ray Data actor, one GPU or CPU, called for several units at once: one is read, one is encoded, one is
              written. The latents of two units in memory (half a GB for a shard of 256 MB).
    Retry:    safe: name and bytes follow from the unit alone.
    Drops:    nothing: what cannot be encoded is a quarantined row with its reason.
    Raises:   ModelError (with the first unit: see `unwrap`), StorageError, ShardCorrupt, EncodingError.
    """

    def __init__(
        self, config: EncodeConfig, storage: Storage, fingerprint: str, num_threads: int, attempts: Any
    ) -> None:
        self._config, self._storage, self._fingerprint = config, storage, fingerprint
        self._num_threads, self._attempts = num_threads, attempts
        self._start = threading.Lock()
        self._writer: LatentWriter | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One unit in, one out."""
        (unit,) = batch.to_pylist()
        pairs = from_ipc(unit["rows"])
        begin(self._attempts, unit["unit_id"], f"the pairs of {pairs['shard'][0]}")
        with self._start:
            if self._writer is None:
                check_same_model(self._fingerprint, latents_fingerprint(self._config), self._config.model)
                use_threads(self._num_threads)
                encoder = LatentEncoder(self._config.source, self._config.vae_dtype)
                self._writer = LatentWriter(self._config, self._storage, self._fingerprint, encoder, self._num_threads)
        rows, effort = self._writer.write(unit["unit_id"], pairs)
        return pa.table({"unit_id": [unit["unit_id"]], "rows": [to_ipc(rows)], "effort": [effort.to_json()]})


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


class Device:
    """The one thread that an actor encodes in, unit after unit; knows how long the device had nothing to do."""

    def __init__(self, num_threads: int) -> None:
        self._thread = ThreadPoolExecutor(1, "device", initializer=lambda: use_threads(num_threads))
        self._free_since: float | None = None

    def run(self, encode: Callable[[], T], effort: Effort) -> T:
        """Run `encode` when its turn comes; what it does not count as encoding is idle."""

        def timed() -> T:
            started, busy = time.perf_counter(), effort.seconds["encode"]
            waited = 0.0 if self._free_since is None else started - self._free_since
            result = encode()
            self._free_since = time.perf_counter()
            effort.idle_s += max(0.0, waited + (self._free_since - started) - (effort.seconds["encode"] - busy))
            return result

        return self._thread.submit(timed).result()


class LatentWriter:
    """Writes units of one configuration; `write` may be called from several threads at once.

    Args:
        config: What to write.
        storage: Where pairs are and latents go.
        fingerprint: Names the folder.
        encoder: The VAE.
        num_threads: Of torch.
    """

    def __init__(
        self, config: EncodeConfig, storage: Storage, fingerprint: str, encoder: Encoder, num_threads: int = 1
    ) -> None:
        self._storage, self._fingerprint, self._encoder = storage, fingerprint, encoder
        self._buckets = bucket_list(config.resolution, config.buckets)
        self._dtype = getattr(torch, config.dtype)
        self._batch_size = BatchSize(config.batch_size)
        self._num_ahead = READERS + config.batch_size  # the next batch is ready, and the readers stay busy
        self._readers = ThreadPoolExecutor(READERS, "reader")
        self._device = Device(num_threads)

    def write(self, unit: str, pairs: pa.Table) -> tuple[pa.Table, Effort]:
        """Write the shard of a unit; returns one row for every pair, in order, and what it cost."""
        effort = Effort(num_slots=2 * pairs.num_rows)
        planned = plan_pairs(pairs.to_pylist(), self._buckets)
        loaded: Loaded = Ahead(lambda pair: load(pair, self._storage, effort), planned, self._readers, self._num_ahead)
        try:
            latents = self._device.run(lambda: self._encode(loaded, effort), effort)
        finally:
            loaded.close()
        name = f"{LATENTS}/{self._fingerprint}/{unit}.tar"
        with UnitShard(self._storage, name, unit, LATENTS_SCHEMA, effort) as shard:
            with effort.measured("pack", time.thread_time):
                for pair in planned:
                    _write_pair(pair, latents, shard)
            return shard.publish(), effort

    def _encode(self, loaded: Loaded, effort: Effort) -> dict[ImageKey, Latents | Reason]:
        batches = Batches(self._encoder, self._batch_size, self._dtype, effort)
        for images in loaded:
            for key, image in images:
                batches.add(key, image)
        latents = batches.finish()
        effort.batch_size, effort.device = self._batch_size.size, device_name()
        return latents


def device_name() -> str:
    """`cpu`, or what the GPU is called."""
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def write_latents(
    unit: str,
    pairs: pa.Table,
    config: EncodeConfig,
    storage: Storage,
    fingerprint: str,
    encoder: Encoder,
    num_threads: int = 1,
) -> pa.Table:
    """Write the shard of a single unit; returns one row for every pair, in order."""
    rows, _ = LatentWriter(config, storage, fingerprint, encoder, num_threads).write(unit, pairs)
    return rows


def _write_pair(planned: Planned, latents: dict[ImageKey, Latents | Reason], shard: UnitShard) -> None:
    row = {"pair_key": planned.row["pair_key"], "bucket_height": planned.bucket[0], "bucket_width": planned.bucket[1]}
    sides = [latents[key] for key in planned.keys]
    for side in sides:
        if isinstance(side, Reason):
            shard.quarantine(row, side)
            return
    kept = [side for side in sides if isinstance(side, Latents)]
    time_ids = {f"time_ids_{side}": json.dumps(list(each.time_ids)) for side, each in enumerate(kept)}
    tensors = {f"latents_{side}": each.latents_CHW for side, each in enumerate(kept)}
    shard.keep(row, planned.row["pair_key"], pack(tensors, time_ids))
