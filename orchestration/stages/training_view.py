"""Training on a terminal: its workers, and a bar (or an occasional line in a log)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from orchestration.run import telemetry
from orchestration.run.context import Say
from pipelines.progress import ProgressBar

if TYPE_CHECKING:
    from training.run_progress import RunProgress
    from training.spec import TrainSpec


class TrainingView:
    """Shows the workers' progress: one line per worker at each start, then the bar."""

    def __init__(self, spec: TrainSpec, say: Say) -> None:
        self._say, self._run = say, spec.run
        self._bar = ProgressBar("train", spec.config.max_steps, "steps")
        self._starts, self._step = 0, 0
        self._num_notes = 0

    def __enter__(self) -> TrainingView:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(None, None, None)

    def watch(self, progress: RunProgress) -> None:
        """Show the newest progress."""
        telemetry.training(self._run, asdict(progress))
        if progress.starts > self._starts:
            self._starts = progress.starts
            if self._starts > 1:
                self._say(f"train     restart {self._starts}: resuming from step {progress.step:,}")
            for worker in progress.workers:
                place = f"pid {worker.pid} on {worker.node}, {worker.device}, {worker.backend}"
                engine = f"DeepSpeed ZeRO stage {worker.zero_stage}"
                self._say(f"train     rank {worker.rank} of world size {worker.world_size}: {engine}, {place}")
            parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in progress.start_up_s.items())
            self._say(f"train     started: {parts}")
            self._num_notes = 0
        for note in progress.notes[self._num_notes :]:
            self._say(f"train     note: {note}")
        self._num_notes = len(progress.notes)
        step = progress.step
        if step > self._step:
            self._bar.advance(step - self._step)
            self._step = step
