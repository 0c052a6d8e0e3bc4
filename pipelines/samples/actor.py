"""Draws the samples of a unit and writes them as one shard, while the next unit is drawn."""

import ctypes
import gc
import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.dataset.errors import EncodingError
from pipelines.dataset.layout import SAMPLES, SAMPLES_SCHEMA
from pipelines.dataset.pair import Reason
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import Row
from pipelines.samples.drawing import DrawSettings, Models
from pipelines.samples.fingerprint import samples_fingerprint
from pipelines.samples.plan import FINGERPRINT
from pipelines.samples.png import to_png
from pipelines.samples.sampler import Sampler
from pipelines.samples.turns import Turns
from pipelines.units.actor import BatchSize, Device, UnitActor, check_same_model, is_out_of_memory
from pipelines.units.shard import UnitShard
from pipelines.units.stats import Effort

PACKERS = 2  # threads that compress PNG files: one keeps up with a GPU
MEMBER_COLUMNS = ("text", "prompt", "prompt_id", "variant", "index", "seed", FINGERPRINT)
"""Columns of a unit's rows that are repeated in the JSON beside each PNG."""


class DrawSamples(UnitActor):
    """Draw the samples of one unit and write their shard; the only place that writes samples.

    In:       A unit's wanted samples, all of one drawing.    Out: its table rows, in the unit's order, and its cost.
    Runs as:  Ray Data actor, one GPU or CPU, called for several units at once: one is drawn while others are packed and
              uploaded. One model is in memory: that of the unit being drawn. The pixels of two units (0.2 GB for 1024 x
              1024).
    Retry:    safe: name and bytes follow from the unit alone.
    Drops:    nothing: a sample with numbers that are not finite is a quarantined row.
    Raises:   ModelError (with the first unit of a model: see `unwrap`), StorageError, EncodingError.
    """

    def __init__(self, models: Models, storage: Storage, settings: DrawSettings, attempts: Any) -> None:
        super().__init__(attempts)
        self._models, self._storage, self._settings = models, storage, settings
        self.way_out = (  # type: ignore[misc]
            f"did they run out of memory? lower `{settings.stage}.batch_size`, set `{settings.stage}.dtype` to "
            "bfloat16 or use nodes with more memory; finished work is kept"
        )

    def describe(self, rows: pa.Table) -> str:
        """Describe the work on a unit, for an error."""
        model, _ = self._models[rows[FINGERPRINT][0].as_py()]
        return f"drawing {rows.num_rows:,} samples of {model.name}"

    def new_writer(self) -> "SampleWriter":
        """Return the writer; it loads a model with that model's first unit."""
        return SampleWriter(self._models, self._storage, self._settings)


class SampleWriter:
    """Writes units of several drawings; `write` may be called from several threads at once.

    Args:
        models: Models and settings by fingerprint.
        storage: The storage of the samples.
        settings: The settings of the execution.
    """

    def __init__(self, models: Models, storage: Storage, settings: DrawSettings) -> None:
        self._models, self._storage, self._settings = models, storage, settings
        self._batch_sizes = {fingerprint: BatchSize(settings.batch_size) for fingerprint in models}
        self._checked: set[str] = set()
        self._sampler: tuple[str, Sampler] | None = None
        self._turns, self._device = Turns(), Device(settings.num_threads)
        self._packers = ThreadPoolExecutor(PACKERS, "packer")

    def write(self, unit: str, rows: pa.Table) -> tuple[pa.Table, Effort]:
        """Write the shard of a unit; return one row per sample, in order, and the unit's cost."""
        effort = Effort(num_slots=rows.num_rows)
        fingerprint: str = rows[FINGERPRINT][0].as_py()
        wanted = rows.to_pylist()
        with self._turns.turn(fingerprint):
            drawn = self._device.run(lambda: self._draw(fingerprint, wanted, effort), effort)
        name = f"{SAMPLES}/{fingerprint}/{unit}-{_digest_of(drawn)}.tar"
        _, sampling = self._models[fingerprint]
        size = {"width": sampling.width, "height": sampling.height}
        with UnitShard(self._storage, name, unit, SAMPLES_SCHEMA, effort) as shard:
            for row, found in zip(wanted, drawn, strict=True):
                _write_sample({**row, **size}, found, shard)
            return shard.publish(), effort

    def _draw(self, fingerprint: str, wanted: list[Row], effort: Effort) -> list[Future[bytes] | Reason]:
        """Draw the samples of a unit, batch by batch; runs in the device's thread. PNGs are made in others."""
        sampler, size = self._load(fingerprint, effort), self._batch_sizes[fingerprint]
        drawn: list[Future[bytes] | Reason] = []
        with effort.measured("encode"):
            embeddings = {text: sampler.embed(text) for text in dict.fromkeys(row["text"] for row in wanted)}
            while len(drawn) < len(wanted):
                part = wanted[len(drawn) : len(drawn) + size.size]
                texts, seeds = [embeddings[row["text"]] for row in part], [row["seed"] for row in part]
                batch = size.attempt(
                    lambda: sampler.draw(texts, seeds),  # noqa: B023
                    len(part), f"draw even one sample of {self._name(fingerprint)}", self._way_out,
                )  # fmt: skip
                if batch is not None:
                    for pixels_HWC, is_finite in zip(batch.pixels_BHWC, batch.is_finite_B, strict=True):
                        drawn.append(self._pack(pixels_HWC, effort) if is_finite else Reason.NON_FINITE)
        effort.batch_size, effort.num_images = size.size, len(drawn)
        return drawn

    def _pack(self, pixels_HWC: NDArray[np.uint8], effort: Effort) -> Future[bytes]:
        """Start to compress a sample."""

        def pack() -> bytes:
            with effort.measured("pack", time.thread_time):
                return to_png(pixels_HWC)

        return self._packers.submit(pack)

    def _load(self, fingerprint: str, effort: Effort) -> Sampler:
        """Return the sampler of a drawing; another one is freed first, for there may be no room for two."""
        if self._sampler is not None and self._sampler[0] == fingerprint:
            return self._sampler[1]
        if self._sampler is not None:
            self._sampler = None
            _free_memory()
        with effort.measured("fetch"):
            model, sampling = self._models[fingerprint]
            if model.identity is None and fingerprint not in self._checked:
                check_same_model(fingerprint, samples_fingerprint(model, sampling), model.name)
                self._checked.add(fingerprint)
            try:
                sampler = Sampler(model, sampling)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                first = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise EncodingError(f"not enough memory to load {model.name}: {first}", self._way_out) from error
        self._sampler = fingerprint, sampler
        return sampler

    def _name(self, fingerprint: str) -> str:
        model, sampling = self._models[fingerprint]
        return f"{model.name} of {sampling.height} x {sampling.width} pixels"

    @property
    def _way_out(self) -> str:
        stage = self._settings.stage
        return f"set `{stage}.dtype` to bfloat16, lower `{stage}.resolution`, or use machines with more memory"


def _digest_of(drawn: Sequence[Future[bytes] | Reason]) -> str:
    """Return 16 hex digits of the images of a unit.

    They go into the shard's name: another batch or another kind of GPU draws other bytes, which must not replace those
    of a writer that has committed the unit already.
    """
    digest = hashlib.sha256()
    for each in drawn:
        digest.update(str(each).encode() if isinstance(each, Reason) else hashlib.sha256(each.result()).digest())
    return digest.hexdigest()[:16]


def _write_sample(row: Row, found: Future[bytes] | Reason, shard: UnitShard) -> None:
    if isinstance(found, Reason):
        shard.quarantine(row, found)
        return
    key = row["sample_key"]
    shard.keep(row, f"{key}.png", found.result())
    described = {name: row[name] for name in MEMBER_COLUMNS}
    shard.attach(f"{key}.json", json.dumps(described, ensure_ascii=False, sort_keys=True).encode())


def _free_memory() -> None:
    """Give freed memory back: to the GPU's other users, and on a CPU to the system, which glibc would keep it from."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
