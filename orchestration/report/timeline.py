"""The timeline of a run: when each stage ran, on one axis that leaves long pauses out."""

from datetime import datetime, timedelta
from typing import Any

from orchestration.report.course import STAGES_SHOWN, Attempt, Course

WIDTH = 1000.0  # of the axis, in SVG units
MIN_WIDTH = 4.0  # of a bar, so that a short execution is seen
PAUSE_RATIO = 0.05  # a longer pause than this share of all work is left out
PAUSE_WIDTH = 12.0  # what is drawn in its place
FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def timeline(course: Course) -> dict[str, Any] | None:
    """Where the executions of each stage lie on an axis of WIDTH; None before the first.

    Executions whose end nobody noted are as long as MIN_WIDTH. A pause between two executions in which nothing ran is
    drawn as long as it was, up to PAUSE_RATIO of all the work; a longer one is PAUSE_WIDTH wide and counted.
    """
    shown = [each for each in course.attempts if each.stage in STAGES_SHOWN]
    if not shown:
        return None
    work = sum((_end(each, course.now) - each.began).total_seconds() for each in shown) or 1.0
    pieces, left_out = _pieces(shown, course.now, longest_s=PAUSE_RATIO * work)
    pauses = sum(piece[2] for piece in pieces)
    seconds = sum((end - start).total_seconds() for start, end, is_pause in pieces if not is_pause) or 1.0
    scale = (WIDTH - pauses * PAUSE_WIDTH) / seconds

    def place(time: datetime) -> float:
        x = 0.0
        for start, end, is_pause in pieces:
            if time <= start:
                break
            ratio = 1.0 if time >= end else (time - start) / (end - start)
            x += PAUSE_WIDTH * ratio if is_pause else scale * (end - start).total_seconds() * ratio
        return x

    bars = []
    for each in shown:
        left, right = place(each.began), place(_end(each, course.now))
        width = max(MIN_WIDTH, right - left)
        bars.append({"stage": each.stage, "state": each.state, "x": round(min(left, WIDTH - width), 1),
                     "width": round(width, 1)})  # fmt: skip
    return {
        "width": WIDTH,
        "bars": bars,
        "pauses": [round(place(start), 1) for start, _, is_pause in pieces if is_pause],
        "pause_width": PAUSE_WIDTH,
        "left_out_s": left_out.total_seconds(),
        "began": pieces[0][0].strftime(FORMAT),
        "ended": pieces[-1][1].strftime(FORMAT),
        "is_open": course.state == "running",
    }


def _end(attempt: Attempt, now: datetime) -> datetime:
    return attempt.began + timedelta(seconds=attempt.seconds(now))


def _pieces(
    attempts: list[Attempt], now: datetime, *, longest_s: float
) -> tuple[list[tuple[datetime, datetime, bool]], timedelta]:
    """The time from the first begin to the last end, in pieces: begin, end, is it a pause that is left out."""
    pieces: list[tuple[datetime, datetime, bool]] = []
    left_out, reached = timedelta(), min(each.began for each in attempts)
    for each in sorted(attempts, key=lambda each: each.began):
        if each.began > reached:
            is_pause = (each.began - reached).total_seconds() > longest_s
            pieces.append((reached, each.began, is_pause))
            left_out += each.began - reached if is_pause else timedelta()
        start, end = max(each.began, reached), max(_end(each, now), reached)
        if end > start or not pieces:
            pieces.append((start, end, False))
        reached = max(reached, end)
    return pieces, left_out
