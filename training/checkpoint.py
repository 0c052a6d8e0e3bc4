"""Checkpoints through Ray Train: every rank writes its part, Ray commits when all have.

A checkpoint holds DeepSpeed's own files (`deepspeed/`), `state.json` (step, history, what it belongs to) and one
`rank-NNNNN.json` a rank (what it consumed). Order, noise and timesteps are pure functions of the step: no other
state is needed.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train

from pipelines.dataset.errors import TrainingError
from training.engine import Engine
from training.loader import Consumed
from training.metrics import History

TAG = "deepspeed"
STATE = "state.json"


def save_checkpoint(engine: Engine, *, key: str, step: int, history: History, consumed: Consumed, starts: int) -> None:
    """Write this rank's part and report it; collective. `step` is the number of finished steps."""
    with tempfile.TemporaryDirectory(prefix="mapo-checkpoint-") as folder:
        engine.unet.save_checkpoint(folder, tag=TAG)
        rank_file = Path(folder) / f"rank-{engine.rank:05d}.json"
        rank_file.write_text(json.dumps(asdict(consumed) | engine.identity()))
        if engine.rank == 0:
            state = {
                "key": key,
                "step": step,
                "starts": starts,
                "world_size": engine.world_size,
                "zero_stage": engine.config.zero_stage,
                "history": history.to_dict(),
            }
            (Path(folder) / STATE).write_text(json.dumps(state))
        ray.train.report({"step": step, **history.last()}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def restore_checkpoint(engine: Engine, *, key: str) -> tuple[int, History, Consumed, int]:
    """Load the run's last checkpoint if there is one; collective.

    Returns:
        Finished steps, history, what this rank consumed, and how often workers were started before.

    Raises:
        TrainingError: The checkpoint is of another training or another number of workers.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, History(), Consumed(), 0
    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = json.loads((Path(folder) / STATE).read_text())
        if state["key"] != key or state["world_size"] != engine.world_size:
            raise TrainingError(
                f"the checkpoint {checkpoint.path} is of training {state['key']} with {state['world_size']} workers; "
                f"this is {key} with {engine.world_size}",
                "use another run `name` to start afresh",
            )
        loaded, _ = engine.unet.load_checkpoint(folder, tag=TAG)
        if loaded is None:
            raise TrainingError(f"DeepSpeed could not load {checkpoint.path}", "remove this checkpoint and run again")
        account = json.loads((Path(folder) / f"rank-{engine.rank:05d}.json").read_text())
    consumed = Consumed(account["num_pairs"], account["digest"])
    return state["step"], History.from_dict(state["history"]), consumed, state["starts"]
