"""What the actors of both stages of encode have in common: one thread for the device, and units as they come."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import torch

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import EncodingError, ModelError
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import is_out_of_memory
from pipelines.units.attempts import begin
from pipelines.units.effort import Effort
from pipelines.units.shard import from_ipc, to_ipc

T = TypeVar("T")


class Writer(Protocol):
    """What turns a unit into a shard; called from several threads at once."""

    def write(self, unit: str, rows: pa.Table) -> tuple[pa.Table, Effort]:
        """The table rows of a unit, in its order, and what it cost."""


class UnitActor:
    """A Ray Data actor that is called for several units at once; a subclass says what it writes and with what.

    Args:
        config: What to write.
        storage: Where it goes.
        fingerprint: The driver's.
        num_threads: Of torch.
        attempts: From `new_attempts`.
    """

    def __init__(
        self, config: EncodeConfig, storage: Storage, fingerprint: str, num_threads: int, attempts: Any
    ) -> None:
        self._config, self._storage, self._fingerprint = config, storage, fingerprint
        self._num_threads, self._attempts = num_threads, attempts
        self._start = threading.Lock()
        self._writer: Writer | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One unit in, one out."""
        (unit,) = batch.to_pylist()
        rows = from_ipc(unit["rows"])
        begin(self._attempts, unit["unit_id"], self._named(rows))
        with self._start:
            if self._writer is None:
                self._writer = self._new_writer()
        written, effort = self._writer.write(unit["unit_id"], rows)
        return pa.table({"unit_id": [unit["unit_id"]], "rows": [to_ipc(written)], "effort": [effort.to_json()]})

    def _named(self, rows: pa.Table) -> str:
        """What a unit is made of, for an error."""
        raise NotImplementedError

    def _new_writer(self) -> Writer:
        """Load the model; with the first unit, where Ray keeps the class of an error."""
        raise NotImplementedError


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

    @property
    def name(self) -> str:
        """`cpu`, or what the GPU is called."""
        return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"

    def run(self, encode: Callable[[], T], effort: Effort) -> T:
        """Run `encode` when its turn comes; what it does not count as encoding is idle."""

        def timed() -> T:
            started, busy = time.perf_counter(), effort.seconds["encode"]
            waited = 0.0 if self._free_since is None else started - self._free_since
            result = encode()
            self._free_since = time.perf_counter()
            effort.idle_s += max(0.0, waited + (self._free_since - started) - (effort.seconds["encode"] - busy))
            effort.device = self.name
            return result

        return self._thread.submit(timed).result()


class BatchSize:
    """How much a pass may hold; halved when memory runs out, for good."""

    def __init__(self, size: int) -> None:
        self.size = size

    def attempt(self, run: Callable[[], T], count: int, one: str, way_out: str) -> T | None:
        """Run a pass over `count` things; None if there was no memory for so many, and fewer should be tried.

        Args:
            run: The pass.
            count: How many things are in it.
            one: What a single one is called: if not even that fits, it is an error.
            way_out: Its hint.

        Raises:
            EncodingError: There is no memory for a single one.
        """
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if count == 1:
                raise EncodingError(f"there is no memory to {one}: {str(error).splitlines()[0]}", way_out) from error
        # Here the failed pass is forgotten, with what it held.
        self.size = max(1, min(self.size, count // 2))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
