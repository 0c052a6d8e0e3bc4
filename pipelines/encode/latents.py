"""Writes the latents of a unit of pairs or single images as a shard, while others are read and uploaded."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import torch

from pipelines.config import EncodeConfig
from pipelines.dataset.layout import FLIPPED, LATENTS, LATENTS_SCHEMA, UNFLIPPED
from pipelines.dataset.pair import Reason
from pipelines.dataset.storage import Storage
from pipelines.encode.actor import EncodeActor
from pipelines.encode.encoders import LatentEncoder
from pipelines.encode.fingerprint import latents_fingerprint
from pipelines.encode.geometry import Placed, bucket_list
from pipelines.encode.image_batches import Batches, Encoder, ImageKey, Latents, Planned, load, plan_pairs
from pipelines.encode.tensor_file import pack
from pipelines.units.actor import BatchSize, Device, check_same_model
from pipelines.units.prefetch import Prefetch, prefetch
from pipelines.units.shard import UnitShard
from pipelines.units.stats import Effort

READERS = 8  # reads from a storage wait; two would feed a GPU with JPEGs of 1024 x 1024 from a local disk

Loaded = Prefetch[Planned, list[tuple[ImageKey, Placed | Reason]]]


class WriteLatents(EncodeActor):
    """Encode the pairs of a unit and write their shard; the only place that writes latents.

    In:       A unit's pairs.        Out: its table rows, in the unit's order, and its cost.
    Runs as:  Ray Data actor, one GPU or CPU, called for several units at once: one is read, one is encoded, one is
              written. The latents of two units in memory (half a GB for a shard of 256 MB; twice that with `flips`).
    Retry:    safe: name and bytes follow from the unit alone.
    Drops:    nothing: a row that cannot be encoded is a quarantined row with its reason.
    Raises:   ModelError (with the first unit: see `unwrap`), StorageError, ShardCorrupt, EncodingError.
    """

    def describe(self, rows: pa.Table) -> str:
        """Describe the work on a unit, for an error."""
        return f"encoding the pairs of {rows['shard'][0]}"

    def new_writer(self) -> "LatentWriter":
        """Load the VAE."""
        check_same_model(self._fingerprint, latents_fingerprint(self._config), self._config.model)
        encoder = LatentEncoder(self._config.source, self._config.vae_dtype)
        return LatentWriter(self._config, self._storage, self._fingerprint, encoder, self._num_threads)


class LatentWriter:
    """Writes units of one configuration; `write` may be called from several threads at once.

    Args:
        config: The section `encode`.
        storage: The storage of pairs and latents.
        fingerprint: The fingerprint, which names the folder.
        encoder: The VAE.
        num_threads: Number of torch threads.
    """

    def __init__(
        self, config: EncodeConfig, storage: Storage, fingerprint: str, encoder: Encoder, num_threads: int = 1
    ) -> None:
        self._storage, self._fingerprint, self._encoder = storage, fingerprint, encoder
        self._buckets = bucket_list(config.resolution, config.buckets)
        self._dtype, self._flips = getattr(torch, config.dtype), config.flips
        self._batch_size = BatchSize(config.batch_size)
        self._num_ahead = READERS + config.batch_size  # the next batch is ready, and the readers stay busy
        self._readers = ThreadPoolExecutor(READERS, "reader")
        self._device = Device(num_threads)

    def write(self, unit: str, rows: pa.Table) -> tuple[pa.Table, Effort]:
        """Write the shard of a unit; return one row per pair, in order, and the unit's cost."""
        planned = plan_pairs(rows.to_pylist(), self._buckets)
        effort = Effort(num_slots=(2 if self._flips else 1) * sum(len(pair.keys) for pair in planned))
        loaded: Loaded = prefetch(
            lambda pair: load(pair, self._storage, effort, flips=self._flips), planned, self._readers, self._num_ahead
        )
        try:
            latents = self._device.run(lambda: self._encode(loaded, effort), effort)
        finally:
            loaded.close()
        name = f"{LATENTS}/{self._fingerprint}/{unit}.tar"
        with UnitShard(self._storage, name, unit, LATENTS_SCHEMA, effort) as shard:
            with effort.measured("pack", time.thread_time):
                for pair in planned:
                    _write_pair(pair, latents, shard, flips=self._flips)
            return shard.publish(), effort

    def _encode(self, loaded: Loaded, effort: Effort) -> dict[ImageKey, Latents | Reason]:
        batches = Batches(self._encoder, self._batch_size, self._dtype, effort)
        for images in loaded:
            for key, image in images:
                batches.add(key, image)
        latents = batches.finish()
        effort.batch_size = self._batch_size.size
        return latents


def _write_pair(planned: Planned, latents: dict[ImageKey, Latents | Reason], shard: UnitShard, *, flips: bool) -> None:
    row = {"pair_key": planned.row["pair_key"], "bucket_height": planned.bucket[0], "bucket_width": planned.bucket[1]}
    tensors, time_ids = {}, {}
    for is_mirrored in (False, True) if flips else (False,):
        of_latents, of_time_ids = FLIPPED if is_mirrored else UNFLIPPED
        for side, key in enumerate(planned.keys):
            found = latents[key._replace(is_mirrored=is_mirrored)]
            if isinstance(found, Reason):
                shard.quarantine(row, found)
                return
            tensors[f"{of_latents}_{side}"] = found.latents_CHW
            time_ids[f"{of_time_ids}_{side}"] = json.dumps(list(found.time_ids))
    shard.keep(row, f"{planned.row['pair_key']}.safetensors", pack(tensors, time_ids))
