"""Timeline of a run: when each stage ran, on one axis that shortens long pauses."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from orchestration.report.course import STAGES_SHOWN, Course, Execution, RunState
from orchestration.stages.stage import StageState

WIDTH = 1000.0  # of the axis, in SVG units
MIN_WIDTH = 4.0  # of a bar, so that a short execution is seen
PAUSE_RATIO = 0.05  # a pause longer than this share of all work is left out
PAUSE_WIDTH = 12.0  # what is drawn in its place
FORMAT = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Bar:
    """Execution on the axis: its left end and its width, in SVG units."""

    stage: str
    state: StageState
    x: float
    width: float


@dataclass(frozen=True)
class Timeline:
    """Executions of all stages on one axis.

    Args:
        bars: The executions.
        pauses: Where pauses were left out; each is PAUSE_WIDTH wide.
        left_out_s: Their real length in all.
        began: ISO time of the left end.
        ended: ISO time of the right end.
        is_open: Whether the run is still going on.
        width: Length of the axis, in SVG units.
        pause_width: Width of a pause that was left out.
    """

    bars: Sequence[Bar]
    pauses: Sequence[float]
    left_out_s: float
    began: str
    ended: str
    is_open: bool
    width: float = WIDTH
    pause_width: float = PAUSE_WIDTH


@dataclass(frozen=True)
class _Piece:
    """Stretch of time: work, a short pause, or a pause that is left out."""

    start: datetime
    end: datetime
    is_left_out: bool = False

    @property
    def seconds(self) -> float:
        return (self.end - self.start).total_seconds()


class _Axis:
    """Placement of times on an axis of WIDTH that is cut at long pauses."""

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self._pieces = pieces
        num_cuts = sum(piece.is_left_out for piece in pieces)
        seconds = sum(piece.seconds for piece in pieces if not piece.is_left_out) or 1.0
        self._scale = (WIDTH - num_cuts * PAUSE_WIDTH) / seconds

    def x(self, time: datetime) -> float:
        """Return the place of a time."""
        x = 0.0
        for piece in self._pieces:
            if time <= piece.start:
                break
            ratio = 1.0 if time >= piece.end else (time - piece.start) / (piece.end - piece.start)
            x += PAUSE_WIDTH * ratio if piece.is_left_out else self._scale * piece.seconds * ratio
        return x

    def bar(self, execution: Execution, end: datetime) -> Bar:
        """Return the bar of an execution."""
        left = self.x(execution.began)
        width = max(MIN_WIDTH, self.x(end) - left)
        return Bar(execution.stage, execution.state, round(min(left, WIDTH - width), 1), round(width, 1))


def timeline(course: Course) -> Timeline | None:
    """Place the executions of all stages on one axis; None before the first.

    An execution whose end is unknown is MIN_WIDTH long. A pause between two executions is drawn to scale up to
    PAUSE_RATIO of all the work; a longer one is PAUSE_WIDTH wide and counted.
    """
    shown = [each for each in course.executions if each.stage in STAGES_SHOWN]
    if not shown:
        return None
    work = sum((_end(each, course.now) - each.began).total_seconds() for each in shown) or 1.0
    pieces = _pieces(shown, course.now, longest_s=PAUSE_RATIO * work)
    axis, left_out = _Axis(pieces), [piece for piece in pieces if piece.is_left_out]
    return Timeline(
        bars=[axis.bar(each, _end(each, course.now)) for each in shown],
        pauses=[round(axis.x(piece.start), 1) for piece in left_out],
        left_out_s=sum(piece.seconds for piece in left_out),
        began=pieces[0].start.strftime(FORMAT),
        ended=pieces[-1].end.strftime(FORMAT),
        is_open=course.state == RunState.RUNNING,
    )


def _end(execution: Execution, now: datetime) -> datetime:
    return execution.began + timedelta(seconds=execution.seconds(now))


def _pieces(executions: Sequence[Execution], now: datetime, *, longest_s: float) -> list[_Piece]:
    """Cut the time from the first begin to the last end into work and pauses."""
    pieces: list[_Piece] = []
    reached = min(each.began for each in executions)
    for each in sorted(executions, key=lambda each: each.began):
        if each.began > reached:
            pieces.append(_Piece(reached, each.began, (each.began - reached).total_seconds() > longest_s))
        start, end = max(each.began, reached), max(_end(each, now), reached)
        if end > start or not pieces:
            pieces.append(_Piece(start, end))
        reached = max(reached, end)
    return pieces
