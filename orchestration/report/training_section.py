"""Training section of a report: a finished training from its record, a live one from its progress."""

import re
from collections.abc import Sequence

from orchestration.config import RunConfig
from orchestration.report.course import Course, RunState
from orchestration.report.live_curves import LiveProgress, live_curves, read_progress
from orchestration.report.records import Row, SampleGrid, TrainingSection, WorkerRow
from orchestration.run.journal import StageRecord
from orchestration.stages.stage import StageState
from pipelines.dataset.secrets import redact
from pipelines.dataset.storage import Storage
from training.schedule import of_average

MAX_GRIDS = 6  # of samples during training: each may take 200 KB of the page


def finished_training(config: RunConfig, storage: Storage, folder: str, record: StageRecord) -> TrainingSection:
    """Return the section of a finished training.

    Args:
        config: The run's configuration.
        storage: The run's storage.
        folder: The run's folder.
        record: The record of the training.
    """
    details = record.details
    return _section(
        config,
        workers=[WorkerRow.from_json(each) for each in details["workers"]],
        num_starts=details["starts"],
        steps=details["steps"],
        max_steps=details["steps"],
        is_over=True,
        notes=[],
        history=details["history"]["steps"],
        validations=details["history"]["validations"],
        samples=sample_grids(storage, folder, record.key),
    )


def live_training(config: RunConfig, storage: Storage, folder: str, progress: LiveProgress) -> TrainingSection:
    """Return the section of a training that has not finished.

    Args:
        config: The run's configuration.
        storage: The run's storage.
        folder: The run's folder.
        progress: The training's progress.
    """
    assert config.train is not None
    curves = live_curves(storage, folder, progress, validate_every=config.train.validate_every)
    return _section(
        config,
        workers=progress.workers,
        num_starts=progress.starts,
        steps=progress.step,
        max_steps=progress.max_steps,
        is_over=False,
        notes=[redact(note) for note in progress.notes],
        history=curves.steps,
        validations=curves.validations,
        samples=sample_grids(storage, folder, progress.key),
    )


def unfinished_progress(
    storage: Storage, folder: str, record: StageRecord | None, course: Course
) -> LiveProgress | None:
    """Return the progress of a training that has no record yet; None if the last one finished, or none has begun."""
    progress = read_progress(storage, folder) if course.state != RunState.FINISHED else None
    if progress is None or (record is not None and record.key == progress.key):
        return None
    newest = course.newest("train")
    return progress if newest is not None and newest.state != StageState.DONE else None


def sample_grids(storage: Storage, folder: str, key: str) -> list[SampleGrid]:
    """Return the sample grids of a training: at most MAX_GRIDS, evenly chosen, always with the first and the newest.

    Args:
        storage: The run's storage.
        folder: The run's folder.
        key: The training's key: grids of the run's other trainings are not shown.
    """
    names = storage.names(f"{folder}/samples/{key}")
    found = [(int(step[1]), name) for name in names if (step := re.search(r"/step-(\d+)\.jpg$", name))]
    last = len(found) - 1
    chosen = sorted({round(i * last / (MAX_GRIDS - 1)) for i in range(MAX_GRIDS)}) if found else []
    return [SampleGrid(found[i][0], found[i][1].removeprefix(f"{folder}/")) for i in chosen]


def _section(
    config: RunConfig,
    *,
    workers: Sequence[WorkerRow],
    num_starts: int,
    steps: int,
    max_steps: int,
    is_over: bool,
    notes: Sequence[str],
    history: Sequence[Row],
    validations: Sequence[Row],
    samples: Sequence[SampleGrid],
) -> TrainingSection:
    """Add the configuration's settings, and of the validations keep those of the weights that are exported."""
    assert config.train is not None
    average = of_average(validations) if config.export.weights != "raw" else None
    return TrainingSection(
        method=config.train.method,
        loss=config.train.loss_parameters,
        precision=config.train.precision,
        global_batch_size=config.train.global_batch_size,
        num_starts=num_starts,
        workers=workers,
        steps=steps,
        max_steps=max_steps,
        is_over=is_over,
        notes=notes,
        history=history,
        validation=validations if average is None else average,
        held_out="held out" if average is None else "held out, average",
        samples=samples,
    )
