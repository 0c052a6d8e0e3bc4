"""Cost and speed of units: seconds by part, idle devices, the speed of an execution.

An actor fills an `Effort` for each unit; the driver adds them up in a `Tally` and takes its `Speed` for progress, the
journal and the report.
"""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.pair import Status
from pipelines.dataset.values import JsonObject

PARTS = ("fetch", "decode", "encode", "pack", "upload")
"""The parts of the work on a unit, in order; they run concurrently."""


@dataclass
class Effort:
    """The cost of one unit, or of several added up. Its methods may be called from any thread.

    Args:
        seconds: Seconds by part: waiting for fetch and upload, CPU time for decode and pack, device time for encode.
        idle_s: Seconds in which the device had nothing to do, from an actor's first unit to its last.
        num_images: Distinct images that were encoded.
        num_slots: Images of pairs, including repeats.
        batch_size: Batch size of the last pass; smaller than configured after running out of memory.
        device: `cpu`, or the GPU's name.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    idle_s: float = 0.0
    num_images: int = 0
    num_slots: int = 0
    batch_size: int = 0
    device: str = ""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add_seconds(self, part: str, seconds: float) -> None:
        """Add time to a part."""
        with self._lock:
            self.seconds[part] += seconds  # type: ignore[assignment]

    @contextlib.contextmanager
    def measured(self, part: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
        """Add the time of the block to a part."""
        started = clock()
        try:
            yield
        finally:
            self.add_seconds(part, clock() - started)

    def add(self, other: "Effort") -> None:
        """Add the cost of another unit."""
        self.seconds.update(other.seconds)
        self.idle_s += other.idle_s
        self.num_images += other.num_images
        self.num_slots += other.num_slots
        self.batch_size = min(self.batch_size or other.batch_size, other.batch_size)
        self.device = other.device

    @property
    def busy_ratio(self) -> float:
        """Share of the devices' time in which they encoded, 0..1."""
        busy = self.seconds["encode"]
        return busy / (busy + self.idle_s) if busy else 0.0

    def to_json(self) -> str:
        """Return the cost as text, to travel in one cell of a Ray Data row."""
        fields = {name: getattr(self, name) for name in ("idle_s", "num_images", "num_slots", "batch_size", "device")}
        return json.dumps(fields | {"seconds": dict(self.seconds)})

    @staticmethod
    def from_json(text: str) -> "Effort":
        """Read the output of `to_json`."""
        fields = json.loads(text)
        return Effort(**fields | {"seconds": Counter(fields["seconds"])})


@dataclass(frozen=True)
class Speed:
    """The work of an execution, and its speed.

    Args:
        seconds: Wall-clock time of the execution.
        items: Table rows that were committed.
        items_per_s: Rows per second.
        images: Distinct images that were encoded.
        image_slots: Images of pairs, including repeats.
        images_per_s: Distinct images per second.
        busy_ratio: Share of the devices' time in which they encoded, 0..1.
        num_actors: Maximum number of actors.
        device: `cpu`, or the GPU's name.
        batch_size: The configured batch size.
        halved_to: The batch size after memory ran out; None if it did not.
        seconds_by_part: Seconds summed over threads and workers, by the names in `PARTS`.
    """

    seconds: float
    items: int
    items_per_s: float
    images: int
    image_slots: int
    images_per_s: float
    busy_ratio: float
    num_actors: int
    device: str
    batch_size: int
    halved_to: int | None
    seconds_by_part: dict[str, float]

    def to_json(self) -> JsonObject:
        """Return the speed as plain data, for the journal and the report."""
        return asdict(self)


class Tally:
    """Counts committed units; its clock starts when it is created. Its methods may be called from any thread.

    Args:
        stage: The stage, shown in front of lines, such as `encode text`.
        batch_size: The configured batch size.
        num_actors: Maximum number of actors.
    """

    def __init__(self, stage: str, batch_size: int, num_actors: int) -> None:
        self._stage, self._batch_size, self._num_actors = stage, batch_size, num_actors
        self._counting = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._effort, self._started = Effort(), time.monotonic()
        self._num_items = self.num_dropped = 0

    def add(self, rows: pa.Table, effort: Effort) -> str | None:
        """Count a unit; return a line for the user if its actor had less memory than those before."""
        with self._counting:
            has_less_memory = effort.batch_size < (self._effort.batch_size or self._batch_size)
            self._effort.add(effort)
            self._num_items += rows.num_rows
            self.num_dropped += count_dropped(rows)
        if not has_less_memory:
            return None
        return (
            f"{self._stage}: {effort.device} ran out of memory with batches of {self._batch_size}; "
            f"continuing with batches of {effort.batch_size}"
        )

    def take(self) -> Speed | None:
        """Return the work since the last call (or since the tally was created), and start again; None if nothing."""
        with self._counting:
            if not self._num_items:
                return None
            taken = self._speed()
            self._begin()
        return taken

    def _speed(self) -> Speed:
        seconds, effort = time.monotonic() - self._started, self._effort
        return Speed(
            seconds=round(seconds, 3),
            items=self._num_items,
            items_per_s=round(self._num_items / seconds, 3),
            images=effort.num_images,
            image_slots=effort.num_slots,
            images_per_s=round(effort.num_images / seconds, 3),
            busy_ratio=round(effort.busy_ratio, 4),
            num_actors=self._num_actors,
            device=effort.device,
            batch_size=self._batch_size,
            halved_to=effort.batch_size if effort.batch_size < self._batch_size else None,
            seconds_by_part={part: round(effort.seconds[part], 3) for part in PARTS if effort.seconds[part]},
        )


def count_dropped(rows: pa.Table) -> int:
    """Count the quarantined rows."""
    return int(pc.sum(pc.equal(rows["status"], str(Status.QUARANTINED))).as_py() or 0)
