"""What an execution draws of each model: its progress, its time left, and what it cost."""

from dataclasses import dataclass

import pyarrow as pa

from pipelines.dataset.values import JsonObject
from pipelines.progress import ProgressBar
from pipelines.units.stats import Effort, Speed, Tally, count_dropped


@dataclass(frozen=True)
class Drawn:
    """What an execution drew of one model.

    Args:
        name: The model's name.
        fingerprint: Names the table of its samples.
        num_drawn: Samples that were drawn and kept.
        num_quarantined: Samples that are rows with a reason instead.
        speed: The work and its speed; None if nothing was missing.
    """

    name: str
    fingerprint: str
    num_drawn: int
    num_quarantined: int
    speed: Speed | None

    @property
    def seconds(self) -> float:
        """Wall-clock time from the turn of this model to its last sample."""
        return 0.0 if self.speed is None else self.speed.seconds

    @property
    def worker_s(self) -> float:
        """Seconds that workers spent on loading and drawing, summed over them: those of its GPU hours."""
        parts = {} if self.speed is None else self.speed.seconds_by_part
        return parts.get("fetch", 0.0) + parts.get("encode", 0.0)

    def to_json(self) -> JsonObject:
        """Return plain data, for the journal and the report."""
        return {
            "name": self.name, "fingerprint": self.fingerprint, "num_drawn": self.num_drawn,
            "num_quarantined": self.num_quarantined, "worker_s": round(self.worker_s, 3),
            "speed": None if self.speed is None else self.speed.to_json(),
        }  # fmt: skip


class Account:
    """Counts the units of one model, and shows its progress from its turn to its last unit.

    Args:
        stage: The stage's name.
        name: The model's name.
        fingerprint: Of its samples.
        num_planned: Samples to draw.
        batch_size: The configured batch size.
        num_actors: Maximum number of actors.
    """

    def __init__(
        self, stage: str, name: str, fingerprint: str, num_planned: int, batch_size: int, num_actors: int
    ) -> None:
        self._title, self._name, self._fingerprint = f"{stage} {name}", name, fingerprint
        self._num_planned, self._num_done, self._num_quarantined = num_planned, 0, 0
        self._batch_size, self._num_actors = batch_size, num_actors
        self._tally: Tally | None = None
        self._bar: ProgressBar | None = None
        self._speed: Speed | None = None

    @property
    def is_done(self) -> bool:
        """Whether all its units are committed."""
        return self._num_done >= self._num_planned

    def start(self) -> ProgressBar:
        """Start the clock and the bar, if they are not running."""
        if self._bar is None or self._tally is None:
            self._tally = Tally(self._title, self._batch_size, self._num_actors)
            self._bar = ProgressBar(self._title, self._num_planned, "samples")
        return self._bar

    def add(self, rows: pa.Table, effort: Effort) -> None:
        """Count a committed unit."""
        bar, num_quarantined = self.start(), count_dropped(rows)
        assert self._tally is not None
        bar.say(self._tally.add(rows, effort))
        self._num_done += rows.num_rows
        self._num_quarantined += num_quarantined
        note = f"{self._num_quarantined:,} not finite" if self._num_quarantined else ""
        statuses = {"kept": rows.num_rows - num_quarantined, "quarantined": num_quarantined}
        bar.advance(rows.num_rows, note=note, statuses=statuses)

    def close(self) -> None:
        """Stop the clock, remove the bar, and say how many samples are no images; a second call does nothing."""
        if self._bar is None or self._tally is None:
            return
        self._speed = self._tally.take()
        if self._num_quarantined:
            self._bar.say(
                f"{self._title}: {self._num_quarantined:,} of {self._num_done:,} samples are not finite numbers and "
                "have no image: damaged weights, or a type that overflows"
            )
        self._bar.__exit__(None, None, None)
        self._bar = None

    def result(self) -> Drawn:
        """Return what was drawn, after `close`."""
        num_drawn = self._num_done - self._num_quarantined
        return Drawn(self._name, self._fingerprint, num_drawn, self._num_quarantined, self._speed)
