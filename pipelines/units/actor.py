"""The actor that writes units: several at once, with one thread for the device, and batches that shrink if needed.

A stage subclasses `UnitActor` to define what it writes, and with which model; `units.pool` runs it on Ray Data.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Protocol, TypeVar

import pyarrow as pa

from pipelines.dataset.errors import EncodingError, ModelError
from pipelines.dataset.ipc import from_ipc, to_ipc
from pipelines.units.attempts import begin
from pipelines.units.stats import Effort

T = TypeVar("T")


class Writer(Protocol):
    """Turns a unit into a shard; called from several threads at once."""

    def write(self, unit: str, rows: pa.Table) -> tuple[pa.Table, Effort]:
        """Write the shard of a unit; return its table rows, in the order of the unit, and its cost."""


class UnitActor:
    """A Ray Data actor that is called for several units at once; a subclass defines what it writes, and with what.

    Args:
        attempts: From `new_attempts`.
    """

    way_out: ClassVar[str]
    """The hint of the error for a unit that repeatedly kills its actor."""

    def __init__(self, attempts: Any) -> None:
        self._attempts = attempts
        self._start = threading.Lock()
        self._writer: Writer | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the single unit of a batch; return its rows and cost as a batch of one row."""
        (unit,) = batch.to_pylist()
        rows = from_ipc(unit["rows"])
        begin(self._attempts, unit["unit_id"], self.describe(rows), self.way_out)
        with self._start:
            if self._writer is None:
                self._writer = self.new_writer()
        written, effort = self._writer.write(unit["unit_id"], rows)
        return pa.table({"unit_id": [unit["unit_id"]], "rows": [to_ipc(written)], "effort": [effort.to_json()]})

    def describe(self, rows: pa.Table) -> str:
        """Describe the work on a unit, for an error: `encoding 12 prompts`."""
        raise NotImplementedError

    def new_writer(self) -> Writer:
        """Load the model; called with the first unit, when Ray keeps the class of an error."""
        raise NotImplementedError


def check_same_model(planned: str, found: str, model: str) -> None:
    """Check that this node has the files that the driver planned with.

    Raises:
        ModelError: The node has other files under the same name, whose output must not be mixed in.
    """
    if planned != found:
        raise ModelError(
            f"the fingerprint of {model} is {found} on this node, but {planned} on the driver's",
            "put the same model on every node, or use a URL that all nodes can reach",
        )


def _loaded_torch() -> Any:
    """Return torch if this process has loaded it; actors that compute without it start faster."""
    return sys.modules.get("torch")


def use_threads(num_threads: int) -> None:
    """Set torch's threads in an actor: Ray allows one per assigned CPU, and may count CPUs that do not exist."""
    if (torch := _loaded_torch()) is not None:
        torch.set_num_threads(max(1, min(num_threads, len(os.sched_getaffinity(0)))))


class Device:
    """The single thread in which an actor computes, unit after unit; measures how long the device was idle."""

    def __init__(self, num_threads: int) -> None:
        self._thread = ThreadPoolExecutor(1, "device", initializer=lambda: use_threads(num_threads))
        self._free_since: float | None = None

    @property
    def name(self) -> str:
        """`cpu`, or the name of the GPU."""
        torch = _loaded_torch()
        return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_available() else "cpu"

    def run(self, encode: Callable[[], T], effort: Effort) -> T:
        """Run `encode` when its turn comes; time not counted as encoding is idle time."""

        def timed() -> T:
            started, busy = time.perf_counter(), effort.seconds["encode"]
            waited = 0.0 if self._free_since is None else started - self._free_since
            result = encode()
            self._free_since = time.perf_counter()
            effort.idle_s += max(0.0, waited + (self._free_since - started) - (effort.seconds["encode"] - busy))
            effort.device = self.name
            return result

        return self._thread.submit(timed).result()


NO_MEMORY = (
    "DefaultCPUAllocator",
    "bad_alloc",
    "could not create a primitive",  # oneDNN's convolutions, which say no more
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a pass failed because the device, or on a CPU the machine, ran out of memory."""
    torch = _loaded_torch()
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


class BatchSize:
    """How many items a pass may have; halved permanently when memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def attempt(self, run: Callable[[], T], count: int, one: str, way_out: str) -> T | None:
        """Run a pass over `count` items; return None if memory ran out and fewer should be tried.

        Args:
            run: The pass.
            count: Number of items in it.
            one: The work on a single item, such as `embed even one prompt`, for the error.
            way_out: The hint of the error.

        Raises:
            EncodingError: There is not enough memory for a single item.
        """
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if count == 1:
                raise EncodingError(f"not enough memory to {one}: {str(error).splitlines()[0]}", way_out) from error
        # Here the failed pass is forgotten, with what it held.
        self.size = max(1, min(self.size, count // 2))
        if (torch := _loaded_torch()) is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
