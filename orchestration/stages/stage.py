"""What a stage is to the driver: one look at the storage, and the work that this look found.

Light to import: neither ray, torch nor the configuration.
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
    """The storage holds its result for the configuration and inputs of now."""
    TO_DO = "to do"
    """It can be done now."""
    STALE = "stale"
    """It was done for other inputs or another configuration, and can be done now."""
    WAITS = "waits"
    """A stage before it has work."""
    NOT_SET = "not set"
    """The configuration lacks its section."""
    BLOCKED = "blocked"
    """An error is in its way; the note says which."""
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"
    """Its driver ended without noting an end."""
    NOT_RUN = "not run"
    """It was never asked for."""


@dataclass(frozen=True)
class Look:
    """What one look at a stage found; what is then executed and recorded is this very look.

    Args:
        key: Digest of everything that the stage would be made from now; None while it cannot be made.
        is_done: Whether the storage holds its result for this key.
        work: Makes the result; None where there is no key.
        waits_for: The stage that has to run first, where there is no key for that reason.
        refusal: Why there is no key, where the stage knows more than that an earlier one has not run.
        amount: Counts the work that waits, by unit; called for a plan only.
        notes: Tells which settings the work takes, and what is to be said of them; called for a plan only.
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
    """What a plan says of a stage beyond its amount of work.

    Args:
        settings: What it takes where the configuration leaves a choice, by name; plain data.
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
        """Tell what a plan says of the stage while an earlier one has work."""

    def check(self, run: Run) -> None:
        """Find what would fail later, before anything starts."""


def digest(*parts: Any) -> str:
    """Return 16 hex digits that stand for plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
