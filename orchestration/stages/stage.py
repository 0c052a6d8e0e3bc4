"""The driver's view of a stage: one look at the storage, and the work that this look found.

Light to import: needs neither ray, torch nor the configuration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from orchestration.run.context import Outcome, Run
    from pipelines.dataset.errors import MapoError


class StageState(StrEnum):
    """The state of a stage, in the plan, the status, the report and every `--json` alike."""

    UP_TO_DATE = "up to date"
    """The storage has its result for the current configuration and inputs."""
    TO_DO = "to do"
    """The stage can run now."""
    STALE = "stale"
    """The stage was done for other inputs or another configuration, and can run now."""
    WAITS = "waits"
    """A stage before it has work."""
    NOT_SET = "not set"
    """The configuration does not have its section."""
    BLOCKED = "blocked"
    """An error blocks the stage; the note says which."""
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"
    """Its driver vanished without recording an end."""
    NOT_RUN = "not run"
    """The stage was never requested."""


@dataclass(frozen=True)
class Look:
    """The result of one look at a stage; exactly this work is then executed and recorded.

    Args:
        key: Digest of all current inputs of the stage; None while it cannot run.
        is_done: Whether the storage has its result for this key.
        work: Produces the result; None without a key.
        waits_for: The stage that has to run first, if that is why there is no key.
        refusal: The error because of which there is no key, if it is more than an earlier stage not having run.
        amount: Counts the remaining work by unit; called only for a plan.
        notes: Returns settings and remarks for a plan; called only for a plan.
    """

    key: str | None = None
    is_done: bool = False
    work: Callable[[], Outcome] | None = None
    waits_for: str | None = None
    refusal: MapoError | None = None
    amount: Callable[[], Mapping[str, int]] = dict
    notes: Callable[[], Notes] = lambda: Notes()


@dataclass(frozen=True)
class Notes:
    """The notes of a plan on a stage, in addition to its amount of work.

    Args:
        settings: The settings chosen where the configuration leaves a choice, by name; plain data.
        remarks: Lines for people.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


class StageModule(Protocol):
    """The functions of a stage's file in `orchestration/stages/`; all but `look` may be left out."""

    def look(self, run: Run) -> Look:
        """Look at the storage once: what would the stage be made from, is it done, and what is its work?"""

    def estimate(self, run: Run, rows: int) -> Mapping[str, int]:
        """Bound the amount of work from above while an earlier stage has work: `rows` is what ingest would add."""

    def notes(self, run: Run) -> Notes:
        """Return the notes of a plan on the stage while an earlier one has work."""

    def check(self, run: Run) -> None:
        """Check, before anything starts, for errors that would occur later."""


def digest(*parts: Any) -> str:
    """Return 16 hex digits that stand for plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
