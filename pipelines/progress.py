"""A progress bar: one line with stage, count, rate and time left on a terminal, plain lines in a log."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from tqdm import tqdm

from pipelines.dataset.secrets import redact, write_line

LOG_EVERY_S = 15.0


@dataclass(frozen=True)
class ProgressStep:
    """One step of a progress bar, for its observers.

    Args:
        stage: The stage, as shown.
        done: Items done so far.
        total: Items in all.
        statuses: Rows of this step by status, if they have one.
    """

    stage: str
    done: int
    total: int
    statuses: Mapping[str, int]


observers: list[Callable[[ProgressStep], None]] = []
"""Called by every `ProgressBar` of this process, in the thread that counts; they must be quick and must not raise."""


class ProgressBar:
    """Shows progress: a bar on a terminal, a line every 15 s elsewhere.

    Args:
        stage: The stage, shown in front.
        total: Items in all.
        unit: The name of the items, in the plural.
    """

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._done = self._done_at_start = 0
        self._rows = self._size = 0
        self._note = ""
        self._started: float | None = None
        self._logged = time.monotonic()
        self._bar = (
            tqdm(total=total, desc=stage, unit=f" {unit}", leave=False, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def advance(
        self, count: int, *, rows: int = 0, size: int = 0, note: str = "", statuses: Mapping[str, int] | None = None
    ) -> None:
        """Count finished items; the clock of the rate starts at the first of them, after the workers have started.

        Args:
            count: Number of items.
            rows: Number of rows in them, if that differs.
            size: Bytes stored with them.
            note: A note to show, such as drops by reason.
            statuses: Rows by status, for observers.
        """
        self._done += count
        for observer in tuple(observers):
            observer(ProgressStep(self._stage, self._done, self._total, statuses or {}))
        now = time.monotonic()
        if self._started is None:
            self._started, self._done_at_start = now, self._done
        else:
            self._rows, self._size = self._rows + rows, self._size + size
        self._note = note
        if self._bar is not None:
            self._bar.update(count)
            self._bar.set_postfix_str(self._volume(now).removeprefix(", "))
        elif now - self._logged >= LOG_EVERY_S:
            self._logged = now
            line = f"{self._stage}: {self._done:,} of {self._total:,} {self._unit}{self._pace(now)}{self._volume(now)}"
            write_line(line)

    def expect(self, count: int) -> None:
        """Raise the total by `count`."""
        self._total += count
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.refresh()

    def say(self, line: str | None) -> None:
        """Show a line above the bar, if there is one."""
        if line is None:
            return
        if self._bar is not None:
            self._bar.write(redact(line), file=sys.stderr)
        else:
            write_line(line)

    def _pace(self, now: float) -> str:
        counted = self._done - self._done_at_start
        if self._started is None or not counted:
            return ""
        rate = counted / (now - self._started)
        return f", {rate:,.1f}/s, {(self._total - self._done) / rate:,.0f} s left"

    def _volume(self, now: float) -> str:
        seconds = now - self._started if self._started is not None else 0.0
        parts = []
        if seconds > 0 and self._rows:
            parts.append(f"{self._rows / seconds:,.0f} rows/s, {self._size / seconds / 1e6:,.1f} MB/s")
        if self._note:
            parts.append(self._note)
        return "".join(f", {part}" for part in parts)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def quiet_ray_data() -> None:
    """Silence Ray Data's progress in favour of `ProgressBar`, and keep the class of errors that its workers raise.

    Applies to executions that this process starts afterwards. Ray Data's own log file still gets everything.
    """
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # otherwise a UserCodeException without what caused it
    for handler in logging.getLogger("ray.data").handlers:
        is_of_ray = type(handler).__module__.startswith("ray.")  # the user's own are left as they are
        if is_of_ray and isinstance(handler, logging.StreamHandler):  # the console; the log file's is of another class
            handler.setLevel(logging.CRITICAL + 1)
