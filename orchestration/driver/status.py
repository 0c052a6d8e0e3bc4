"""Where a run is, from its storage alone: its stages, its driver, and how far its training has come."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestration.config import RunConfig
from orchestration.driver.plan import is_set, state_of
from orchestration.run.context import Run
from orchestration.run.lease import Holder, current_holder
from orchestration.stages.registry import STAGES, Stage
from orchestration.stages.stage import StageState
from pipelines.dataset.errors import MapoError


@dataclass(frozen=True)
class StageStatus:
    """Where one stage is, seen from what the stage before it left.

    Args:
        stage: Its name.
        state: See `StageState`.
        summary: One line on its last success; None if it never ended well.
        seconds: How long that took.
        finished_at: When, as ISO time, UTC.
        problem: The error that keeps it from being done, or from being looked at.
    """

    stage: str
    state: StageState
    summary: str | None = None
    seconds: float | None = None
    finished_at: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class RunStatus:
    """Where a run is.

    Args:
        run: Its name.
        storage: The URL of its storage.
        driver: Who works on it; None if nobody does.
        stages: Its stages, in order.
        training: The progress of the newest training, as it is on the storage; None before any.
    """

    run: str
    storage: str
    driver: Holder | None
    stages: tuple[StageStatus, ...]
    training: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return the status as plain data."""
        return asdict(self)


def describe_run(config: RunConfig) -> RunStatus:
    """Look at every stage of a run; write nothing and need no Ray."""
    run = Run.open(config, lambda line: None)
    name = f"{run.folder}/progress.json"
    training = json.loads(run.storage.read(name)) if run.storage.exists(name) else None
    stages = tuple(_stage(run, stage) for stage in STAGES.values())
    return RunStatus(config.name, run.storage.url, current_holder(run.storage, run.folder), stages, training)


def _stage(run: Run, stage: Stage) -> StageStatus:
    record, problem = run.journal.record(stage.name), None
    if not is_set(run, stage):
        state = StageState.NOT_SET
    else:
        try:
            look = stage.look(run)
            state, problem = state_of(run, stage, look), None if look.refusal is None else look.refusal.message
        except MapoError as error:
            state, problem = StageState.BLOCKED, error.message
    if record is None:
        return StageStatus(stage.name, state, problem=problem)
    return StageStatus(stage.name, state, record.summary, record.seconds, record.finished_at, problem)


def describe_progress(progress: Mapping[str, Any]) -> str:
    """Return how far a training has come, in one line.

    Args:
        progress: As `progress.json` of the run has it.
    """
    last = progress["last"]
    shown = [f"step {int(progress['step']):,} of {progress['max_steps']:,}"]
    for name, label in (("loss", "loss"), ("implicit_accuracy", "accuracy"), ("pairs_per_s", "pairs/s")):
        if name in last:
            shown.append(f"{label} {last[name]:.3g}")
    return ", ".join(shown)
