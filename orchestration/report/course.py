"""Course of a run, read from its journal: which stage ran when, how it ended, and where the run is now."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from orchestration.run.journal import StageRecord
from orchestration.run.lease import Terms, current_holder
from orchestration.stages.registry import ALL_STAGES, REPORT, STAGES
from orchestration.stages.stage import StageState
from pipelines.dataset.errors import MapoError
from pipelines.dataset.storage import Storage

STAGES_SHOWN = tuple(name for name in ALL_STAGES if name != REPORT)
SILENCE = timedelta(minutes=3)
"""Drivers without a heartbeat for this long count as gone; heartbeats come every few seconds, but clocks differ."""


class RunState(StrEnum):
    """State of a run; `partial` means that some stages have not run and none failed."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"
    PARTIAL = "partial"


UNDONE = (StageState.FAILED, StageState.STOPPED, StageState.LOST)
ENDS = {"finished": StageState.DONE, "failed": StageState.FAILED, "stopped": StageState.STOPPED}
"""Journal event that ends an execution -> the resulting state."""


@dataclass(frozen=True)
class JournalEvent:
    """Event of the journal; fields that its kind does not use keep their defaults.

    Args:
        kind: `started`, `began`, `finished`, `failed`, `stopped`, ...
        time: When it was written.
        stage: The stage it is about.
        message: The error or the reason for stopping.
        seconds: Duration of a finished stage.
        by: Description of a driver that started.
        stages: The stages that this driver will bring up to date.
    """

    kind: str
    time: datetime
    stage: str = ""
    message: str = ""
    seconds: float = 0.0
    by: str = ""
    stages: Sequence[str] = ()

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "JournalEvent":
        """Return the event in a file of the journal."""
        return JournalEvent(
            kind=data["event"],
            time=_time(data["time"]),
            stage=data.get("stage", ""),
            message=data.get("message", data.get("reason", "")),
            seconds=data.get("seconds", 0.0),
            by=data.get("by", ""),
            stages=data.get("stages", ()),
        )


@dataclass(frozen=True)
class Execution:
    """Execution of a stage.

    Args:
        stage: The stage's name.
        began: Start time, UTC.
        ended: End time; None while it runs, and if its driver vanished.
        state: `RUNNING`, `DONE`, `FAILED`, `STOPPED`, or `LOST` if its driver vanished.
        message: The error or the reason for stopping.
    """

    stage: str
    began: datetime
    ended: datetime | None
    state: StageState
    message: str = ""

    def seconds(self, now: datetime) -> float:
        """Return the duration so far; 0 if the end is unknown."""
        end = now if self.state == StageState.RUNNING else self.ended or self.began
        return max(0.0, (end - self.began).total_seconds())


@dataclass(frozen=True)
class Course:
    """State of a run and how it got there.

    Args:
        state: State of the run.
        stage: The stage that runs, or at which the run ended; None for a finished or partial run.
        message: The error or the reason for stopping.
        executions: Every execution of every stage, oldest first.
        stages: State of each stage that is shown.
        started: Time of the first event; None before it.
        command: Command line of the newest driver; None if the journal does not say.
        now: The time this was read.
    """

    state: RunState
    stage: str | None
    message: str
    executions: Sequence[Execution]
    stages: Mapping[str, StageState]
    started: datetime | None
    command: str | None
    now: datetime

    def newest(self, stage: str) -> Execution | None:
        """Return the last execution of a stage, if there was one."""
        return next((each for each in reversed(self.executions) if each.stage == stage), None)


def read_course(
    events: Sequence[JournalEvent],
    records: Mapping[str, StageRecord | None],
    *,
    now: datetime,
    is_driven: bool,
) -> Course:
    """Return the course of a run.

    Args:
        events: Its journal, oldest first.
        records: The last success of each stage that is shown: of STAGES_SHOWN, or those of the run.
        now: The time.
        is_driven: Whether a driver is working on the run; see `is_alive`.
    """
    executions = [each for each in _executions(events, is_driven=is_driven) if not _is_this_page(each)]
    last = executions[-1] if executions else None
    started = next((event for event in reversed(events) if event.kind == "started"), None)
    stage, message = _where(last)
    return Course(
        state=_run_state(last, records, is_driven=is_driven),
        stage=stage,
        message=message,
        executions=executions,
        stages=_stage_states(executions, records, started if is_driven else None),
        started=events[0].time if events else None,
        command=_command(started.by) if started else None,
        now=now,
    )


def is_alive(storage: Storage, folder: str, now: datetime) -> bool:
    """Check whether a driver holds the run's lease and has sent a heartbeat lately."""
    if current_holder(storage, folder) is None:
        return False
    terms = Terms(storage, folder)
    with contextlib.suppress(MapoError, ValueError, KeyError):  # a new driver may tidy them away meanwhile
        beat = terms.beat(terms.newest())
        return now - _time(beat.at) < SILENCE if beat.beats else False
    return True


def _is_this_page(execution: Execution) -> bool:
    """Check for the report that is being written: it describes the run as it will be once that is done."""
    return execution.stage == REPORT and execution.state == StageState.LOST


def _run_state(last: Execution | None, records: Mapping[str, StageRecord | None], *, is_driven: bool) -> RunState:
    if is_driven:
        return RunState.RUNNING
    if last is not None and last.state in UNDONE:
        return RunState(last.state)
    return RunState.FINISHED if all(_is_done(stage, records) for stage in records) else RunState.PARTIAL


def _where(last: Execution | None) -> tuple[str | None, str]:
    """Return the stage that runs or went wrong, and its message."""
    if last is None or last.state not in (StageState.RUNNING, *UNDONE):
        return None, ""
    return last.stage, last.message


def _executions(events: Sequence[JournalEvent], *, is_driven: bool) -> Sequence[Execution]:
    """Pair starts and ends of stages; a start without an end is the running execution, or a lost one."""
    found: list[Execution] = []
    open_at: dict[str, int] = {}
    for event in events:
        if event.kind == "began":
            open_at[event.stage] = len(found)
            found.append(Execution(event.stage, event.time, None, StageState.LOST))
        elif event.kind in ENDS:
            place = open_at.pop(event.stage, None)
            if place is None:  # written by a version that noted no begin
                began, place = event.time - timedelta(seconds=event.seconds), len(found)
            else:
                began = found[place].began
            found[place : place + 1] = [Execution(event.stage, began, event.time, ENDS[event.kind], event.message)]
    if is_driven and found and found[-1].state == StageState.LOST:
        found[-1] = Execution(found[-1].stage, found[-1].began, None, StageState.RUNNING)
    return found


def _stage_states(
    executions: Sequence[Execution], records: Mapping[str, StageRecord | None], driver: JournalEvent | None
) -> dict[str, StageState]:
    """Return the state of each stage; one that the live driver has yet to run is waiting, whatever it was before."""
    newest = {each.stage: each for each in executions}
    running = executions[-1].stage if executions and executions[-1].state == StageState.RUNNING else None
    states = {}
    for stage in records:
        last = newest.get(stage)
        if driver is not None and _is_waiting(stage, last, running, driver):
            states[stage] = StageState.WAITS
        elif last is not None:
            states[stage] = last.state
        else:
            states[stage] = StageState.DONE if _is_done(stage, records) else StageState.NOT_RUN
    return states


def _is_waiting(stage: str, last: Execution | None, running: str | None, driver: JournalEvent) -> bool:
    if stage not in driver.stages:
        return False
    is_ahead = running in ALL_STAGES and ALL_STAGES.index(stage) > ALL_STAGES.index(running)
    return is_ahead or (last is not None and last.state in UNDONE and last.began < driver.time)


def _is_done(stage: str, records: Mapping[str, StageRecord | None]) -> bool:
    """Check whether a stage has ever succeeded; a later stage shows that another run has ingested and encoded."""
    later = STAGES_SHOWN[STAGES_SHOWN.index(stage) :] if STAGES[stage].shares_data else (stage,)
    return any(records.get(each) for each in later)


def _command(holder: str) -> str | None:
    """Return the command inside a holder's description."""
    parts = holder.split("`")
    return parts[1] if len(parts) >= 3 else None


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
