"""What an execution of encode has done so far, and how fast: for progress, the journal and the report."""

import threading
import time
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import DropBudgetExceeded
from pipelines.dataset.pair import Status
from pipelines.dataset.table import Table
from pipelines.units.effort import PARTS, Effort


class Tally:
    """Counts committed units; its clock starts when it is made. Its methods may be called from any thread.

    Args:
        kind: `text` or `latents`.
        config: Of the encoding.
        num_actors: At most.
    """

    def __init__(self, kind: str, config: EncodeConfig, num_actors: int) -> None:
        self._kind, self._config, self._num_actors = kind, config, num_actors
        self._counting = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._effort, self._started = Effort(), time.monotonic()
        self._num_items = self.num_dropped = 0

    def add(self, rows: pa.Table, effort: Effort) -> str | None:
        """Count a unit; a line for the user if its actor had less memory than those before."""
        with self._counting:
            less_memory = effort.batch_size < (self._effort.batch_size or self._config.batch_size)
            self._effort.add(effort)
            self._num_items += rows.num_rows
            self.num_dropped += count_dropped(rows)
        if not less_memory:
            return None
        return (
            f"encode {self._kind}: {effort.device} had no memory for {self._config.batch_size} at once; "
            f"goes on with {effort.batch_size} a pass"
        )

    def take(self) -> dict[str, Any] | None:
        """What was done since the tally was made or this was last asked, as plain data; None if nothing."""
        with self._counting:
            if not self._num_items:
                return None
            taken = self._speed()
            self._begin()
        return taken

    def _speed(self) -> dict[str, Any]:
        seconds, effort = time.monotonic() - self._started, self._effort
        return {
            "seconds": round(seconds, 3),
            "items": self._num_items,
            "items_per_s": round(self._num_items / seconds, 3),
            "images": effort.num_images,
            "image_slots": effort.num_slots,
            "images_per_s": round(effort.num_images / seconds, 3),
            "busy_ratio": round(effort.busy_ratio, 4),
            "num_actors": self._num_actors,
            "device": effort.device,
            "batch_size": self._config.batch_size,
            "halved_to": effort.batch_size if effort.batch_size < self._config.batch_size else None,
            "seconds_by_part": {part: round(effort.seconds[part], 3) for part in PARTS if effort.seconds[part]},
        }


def count_dropped(rows: pa.Table) -> int:
    """Quarantined ones of some table rows."""
    return int(pc.sum(pc.equal(rows["status"], str(Status.QUARANTINED))).as_py() or 0)


def check_dropped(kind: str, item: str, table: Table, config: EncodeConfig) -> None:
    """Hold what a table has by now against the limit of quarantined rows.

    Args:
        kind: `text` or `latents`.
        item: What a row is: `prompt` or `pair`.
        table: Of the encoding.
        config: Has the limit.

    Raises:
        DropBudgetExceeded: There are more; the message has the numbers and the most common reason.
    """
    rows = table.read(["status", "reason"])
    dropped = rows.filter(pc.equal(rows["status"], str(Status.QUARANTINED)))
    if dropped.num_rows <= config.max_drop_ratio * rows.num_rows:
        return
    (reason, times), *_ = Counter(dropped["reason"].to_pylist()).most_common(1)
    raise DropBudgetExceeded(
        f"encode ({kind}) dropped {dropped.num_rows:,} of {rows.num_rows:,} {item}s "
        f"({dropped.num_rows / rows.num_rows:.1%}, limit {config.max_drop_ratio:.1%}).\n"
        f"Most common reason: {reason} ({times:,}).",
        "numbers that are not finite come from damaged weights, or overflow the stored type: "
        "set `encode.dtype` to bfloat16 or float32, or `encode.vae` to another VAE; "
        "raise `encode.max_drop_ratio` to accept them",
    )
