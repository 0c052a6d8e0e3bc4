"""What encoding costs: seconds by part, summed over threads and workers, and how long the devices waited."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

PARTS = ("fetch", "decode", "encode", "pack", "upload")
"""Of the work on a unit, in the order of the flow; they run side by side."""


@dataclass
class Effort:
    """The cost of one unit, or of several added up. Its methods may be called from any thread.

    Args:
        seconds: By part: of waiting for fetch and upload, of a CPU for decode and pack, of the device for encode.
        idle_s: The device had nothing to do, from an actor's first unit to its last.
        num_images: Distinct images that were encoded.
        num_slots: Images of pairs, so with repeats.
        batch_size: Of the last pass; less than configured after running out of memory.
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
        """Count time of a part."""
        with self._lock:
            self.seconds[part] += seconds  # type: ignore[assignment]

    @contextlib.contextmanager
    def measured(self, part: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
        """Count what the block takes."""
        started = clock()
        try:
            yield
        finally:
            self.add_seconds(part, clock() - started)

    def add(self, other: "Effort") -> None:
        """Count another unit's cost in."""
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
        """To travel in one cell of a Ray Data row."""
        fields = {name: getattr(self, name) for name in ("idle_s", "num_images", "num_slots", "batch_size", "device")}
        return json.dumps(fields | {"seconds": dict(self.seconds)})

    @staticmethod
    def from_json(text: str) -> "Effort":
        """What `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return Effort(**fields | {"seconds": Counter(fields["seconds"])})
