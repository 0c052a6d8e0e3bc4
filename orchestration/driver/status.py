"""Where a run is, from its storage alone."""

import json
from dataclasses import asdict
from typing import Any

from orchestration.config import RunConfig
from orchestration.driver.runner import STAGES
from orchestration.run.context import Run
from orchestration.run.lease import current_holder
from pipelines.dataset.errors import MapoError


def describe_run(config: RunConfig) -> dict[str, Any]:
    """Stages with their state, the training's progress and its last numbers.

    A stage is `up to date`, `pending` (never done), or `stale` (done for other inputs).
    """
    run = Run.open(config, lambda line: None)
    name = f"{run.folder}/progress.json"
    progress = json.loads(run.storage.read(name)) if run.storage.exists(name) else None
    stages = []
    for stage in STAGES.values():
        record = run.journal.record(stage.name)
        state = "stale" if record else "pending"
        problem = None
        try:
            key = stage.key(run) if stage.section is None or getattr(config, stage.section) else None
            if key is not None and stage.is_done(run, key):
                state = "up to date"
        except MapoError as error:
            problem = error.message
        stages.append(
            {
                "stage": stage.name,
                "state": state,
                "summary": record.summary if record else None,
                "seconds": record.seconds if record else None,
                "finished_at": record.finished_at if record else None,
                "problem": problem,
            }
        )
    holder = current_holder(run.storage, run.folder)
    return {
        "run": config.name,
        "storage": run.storage.url,
        "driver": asdict(holder) if holder else None,
        "stages": stages,
        "training": progress,
    }
