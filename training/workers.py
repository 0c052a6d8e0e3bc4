"""What the workers tell about themselves and where the run is."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from training.engine import Engine
from training.metrics import History, MetricsWriter
from training.spec import TrainSpec

Show = Callable[[History], None]


def gather_workers(engine: Engine) -> list[dict[str, Any]]:
    """The identity of every rank, in order; collective."""
    everyone: list[Any] = [None] * engine.world_size
    torch.distributed.all_gather_object(everyone, engine.identity())
    return everyone


class Progress:
    """The run's place: who works, how far, the last numbers.

    Args:
        spec: The run.
        starts: How often workers were started, this time included.
        workers: From `gather_workers`.
    """

    def __init__(self, spec: TrainSpec, *, starts: int, workers: list[dict[str, Any]]) -> None:
        self._spec, self._starts, self._workers = spec, starts, workers
        self._began = time.time()

    def _state(self, history: History) -> dict[str, Any]:
        return {
            "key": self._spec.key,
            "step": history.steps[-1]["step"] if history.steps else 0,
            "max_steps": self._spec.config.max_steps,
            "starts": self._starts,
            "started_at": self._began,
            "workers": self._workers,
            "last": history.last(),
        }

    @contextlib.contextmanager
    def writer(self, *, enabled: bool, start: int) -> Iterator[Show]:
        """A function to call after each step; on rank 0 it writes, elsewhere it does nothing."""
        if not enabled:
            yield lambda history: None
            return
        with MetricsWriter(self._spec.storage, self._spec.folder, start) as out:
            seen_validations = 0
            out.progress(self._state(History()) | {"step": start})

            def show(history: History) -> None:
                nonlocal seen_validations
                state = self._state(history)
                out.step(history.steps[-1], state)
                for metrics in history.validations[seen_validations:]:
                    out.validation(metrics)
                seen_validations = len(history.validations)
                if state["step"] == state["max_steps"]:
                    out.progress(state)
                if state["step"] % self._spec.config.checkpoint_every == 0:
                    out.flush()

            yield show
