"""The course of a run, from its journal: which stage ran when, how it ended, and where the run is now."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from orchestration.run.journal import StageRecord
from orchestration.run.lease import Terms, current_holder
from pipelines.dataset.errors import MapoError
from pipelines.dataset.storage import Storage

STAGES_SHOWN = ("ingest", "encode", "train", "export", "evaluate")
OF_STORAGE = ("ingest", "encode")
SILENCE = timedelta(minutes=3)
"""A driver without a beat for so long is taken to be gone: beats come every few seconds, clocks differ a little."""
UNDONE = ("failed", "stopped", "lost")
IN_WRITING = ("report", "lost")
"""The page that is being written tells of a run that ends with it."""
NEVER = "0001-01-01T00:00:00Z"
ENDS = {"finished": "done", "failed": "failed", "stopped": "stopped"}
"""How an attempt ends: the event of the journal, and the word of the page."""


@dataclass(frozen=True)
class Attempt:
    """One execution of a stage.

    Args:
        stage: Its name.
        began: When, UTC.
        ended: When; None while it runs, and where nobody noted an end.
        state: `running`, `done`, `failed`, `stopped`, or `lost`: its driver went without a word.
        message: What the error or the stop said.
    """

    stage: str
    began: datetime
    ended: datetime | None
    state: str
    message: str = ""

    def seconds(self, now: datetime) -> float:
        """How long it took, or takes; 0 where nobody noted its end."""
        end = now if self.state == "running" else self.ended or self.began
        return max(0.0, (end - self.began).total_seconds())


@dataclass(frozen=True)
class Course:
    """Where a run is.

    Args:
        state: `running`, `finished`, `failed`, `stopped`, `lost` (its driver went without a word), or `partial`.
        stage: The stage that runs, or at which the run ended; None for a finished or partial run.
        message: What the error or the stop said.
        attempts: Every execution of every stage, oldest first.
        stages: For each of STAGES_SHOWN: `done`, `running`, `failed`, `stopped`, `lost`, `waiting` or `not run`.
        started: When the run began; None before any event.
        command: What the newest driver was called with; None if the journal does not say.
        now: When this was true.
    """

    state: str
    stage: str | None
    message: str
    attempts: Sequence[Attempt]
    stages: Mapping[str, str]
    started: datetime | None
    command: str | None
    now: datetime

    def newest(self, stage: str) -> Attempt | None:
        """The last execution of a stage, if there was one."""
        return next((each for each in reversed(self.attempts) if each.stage == stage), None)


def read_course(
    events: Sequence[Mapping[str, Any]],
    records: Mapping[str, StageRecord | None],
    *,
    now: datetime,
    is_driven: bool,
) -> Course:
    """The course of a run.

    Args:
        events: Of its journal, oldest first.
        records: The last success of each of STAGES_SHOWN.
        now: The time.
        is_driven: Whether a driver works on it; `is_alive` tells.
    """
    attempts = [each for each in _attempts(events, is_driven=is_driven) if (each.stage, each.state) != IN_WRITING]
    last = attempts[-1] if attempts else None
    started: Mapping[str, Any] = next((event for event in reversed(events) if event["event"] == "started"), {})
    ended = last is not None and last.state in UNDONE
    if is_driven:
        state = "running"
    elif last is not None and ended:
        state = last.state
    else:
        state = "finished" if all(_is_done(stage, records) for stage in STAGES_SHOWN) else "partial"
    shown = last if last is not None and (ended or last.state == "running") else None
    return Course(
        state=state,
        stage=shown.stage if shown and state != "finished" else None,
        message=shown.message if shown else "",
        attempts=attempts,
        stages=_states(attempts, records, started if is_driven else {}),
        started=_time(events[0]["time"]) if events else None,
        command=_command(started.get("by", "")),
        now=now,
    )


def is_alive(storage: Storage, folder: str, now: datetime) -> bool:
    """Whether a driver holds the run's lease and has lately said so."""
    if current_holder(storage, folder) is None:
        return False
    terms = Terms(storage, folder)
    with contextlib.suppress(MapoError, ValueError, KeyError):  # a new driver may tidy them away meanwhile
        beat = terms.beat(terms.newest())
        return now - _time(beat["at"]) < SILENCE if beat else False
    return True


def _attempts(events: Sequence[Mapping[str, Any]], *, is_driven: bool) -> Sequence[Attempt]:
    """Executions from the events; one that began and did not end is the running one, or was lost."""
    found: list[Attempt] = []
    open_at: dict[str, int] = {}
    for event in events:
        stage, kind, time = event.get("stage", ""), event["event"], _time(event["time"])
        if kind == "began":
            open_at[stage] = len(found)
            found.append(Attempt(stage, time, None, "lost"))
        elif kind in ENDS:
            message = event.get("message", event.get("reason", ""))
            if (place := open_at.pop(stage, None)) is not None:
                found[place] = Attempt(stage, found[place].began, time, ENDS[kind], message)
            else:  # written by a version that noted no begin
                began = time - timedelta(seconds=event.get("seconds", 0.0))
                found.append(Attempt(stage, began, time, ENDS[kind], message))
    if is_driven and found and found[-1].state == "lost":
        found[-1] = Attempt(found[-1].stage, found[-1].began, None, "running")
    return found


def _states(
    attempts: Sequence[Attempt], records: Mapping[str, StageRecord | None], driver: Mapping[str, Any]
) -> dict[str, str]:
    """The state of each stage; one that the living driver has still before it waits, whatever it was before."""
    newest = {attempt.stage: attempt for attempt in attempts}
    running = attempts[-1].stage if attempts and attempts[-1].state == "running" else None
    order = (*STAGES_SHOWN, "report")
    states = {}
    for stage in STAGES_SHOWN:
        attempt = newest.get(stage)
        is_ahead = running in order and order.index(stage) > order.index(running)
        is_to_mend = (
            attempt is not None and attempt.state in UNDONE and attempt.began < _time(driver.get("time", NEVER))
        )
        if stage in driver.get("stages", []) and (is_ahead or is_to_mend):
            states[stage] = "waiting"
        elif attempt is not None:
            states[stage] = attempt.state
        else:
            states[stage] = "done" if _is_done(stage, records) else "not run"
    return states


def _is_done(stage: str, records: Mapping[str, Any]) -> bool:
    """Whether a stage has ever gone well. Another run may have ingested and encoded: a later success says so."""
    later = STAGES_SHOWN[STAGES_SHOWN.index(stage) :] if stage in OF_STORAGE else (stage,)
    return any(records[each] for each in later)


def _command(holder: str) -> str | None:
    """The command inside of a holder's description."""
    parts = holder.split("`")
    return parts[1] if len(parts) >= 3 else None


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
