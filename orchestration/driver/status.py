"""The status of a run, from its storage alone: its stages, its driver, and the progress of its training."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestration.config import RunConfig
from orchestration.driver.plan import is_set, state_of
from orchestration.run.context import Run
from orchestration.run.lease import Holder, current_holder
from orchestration.stages.registry import STAGES, Stage, stages_of
from orchestration.stages.stage import StageState
from pipelines.dataset.errors import MapoError


@dataclass(frozen=True)
class StageStatus:
    """The status of one stage, given the result of the stage before it.

    Args:
        stage: The stage's name.
        state: See `StageState`.
        summary: One line on its last success; None if it never succeeded.
        seconds: Duration of that success.
        finished_at: Time of that success, ISO, UTC.
        problem: The error that blocks the stage, or that prevented a look at it.
    """

    stage: str
    state: StageState
    summary: str | None = None
    seconds: float | None = None
    finished_at: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Args:
        run: The run's name.
        storage: The URL of its storage.
        driver: The driver working on it, if any.
        stages: The status of its stages, in order.
        training: The progress of the newest training on the storage; None before the first.
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
    training = _read_progress(run)
    stages = tuple(_stage(run, STAGES[name]) for name in stages_of(config))
    return RunStatus(config.name, run.storage.url, current_holder(run.storage, run.folder), stages, training)


def _read_progress(run: Run) -> Mapping[str, Any] | None:
    """Return `progress.json` of the run; None if there is none, or if it is damaged: the next training writes it."""
    name = f"{run.folder}/progress.json"
    data = run.storage.read_if_there(name)
    if data is None:
        return None
    try:
        found = json.loads(data)
        describe_progress(found)
    except (ValueError, TypeError, KeyError):
        return None
    progress: Mapping[str, Any] = found
    return progress


def _stage(run: Run, stage: Stage) -> StageStatus:
    record = problem = None
    state = StageState.NOT_SET
    try:
        record = run.journal.record(stage.name)
        if is_set(run, stage):
            look = stage.look(run)
            state, problem = state_of(run, stage, look), None if look.refusal is None else look.refusal.message
    except MapoError as error:
        state, problem = StageState.BLOCKED, error.message
    if record is None:
        return StageStatus(stage.name, state, problem=problem)
    return StageStatus(stage.name, state, record.summary, record.seconds, record.finished_at, problem)


def describe_progress(progress: Mapping[str, Any]) -> str:
    """Return the progress of a training in one line.

    Args:
        progress: The content of the run's `progress.json`.
    """
    last = progress["last"]
    shown = [f"step {int(progress['step']):,} of {progress['max_steps']:,}"]
    for name, label in (("loss", "loss"), ("implicit_accuracy", "accuracy"), ("pairs_per_s", "pairs/s")):
        if name in last:
            shown.append(f"{label} {last[name]:.3g}")
    return ", ".join(shown)
