"""A run's numbers for Prometheus, through Ray: each node's agent exports them as `ray_<name>`.

Does nothing, and does not import Ray, while this process is not connected to one. Metrics never fail a run.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines import progress

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mapo_stage_running": ("1 while the stage is running", ("run", "stage")),
    "mapo_units_done": ("Units, shards or batches that the stage has finished", ("run", "stage")),
    "mapo_units_total": ("Units, shards or batches in all", ("run", "stage")),
    "mapo_rows": ("Rows that this driver has ingested, by status", ("run", "status")),
    "mapo_train_step": ("Finished optimizer steps", ("run",)),
    "mapo_train_max_steps": ("Optimizer steps in all", ("run",)),
    "mapo_train_loss": ("Loss of the newest step", ("run",)),
    "mapo_implicit_accuracy": ("Share of pairs whose chosen image is denoised better", ("run",)),
    "mapo_grad_norm": ("Norm of the newest gradient", ("run",)),
    "mapo_skipped_steps": ("fp16 steps whose gradient was not finite", ("run",)),
    "mapo_pairs_per_second": ("Pairs per second in the newest step, over all workers", ("run",)),
    "mapo_mfu": ("Model FLOPs utilization, 0..1", ("run",)),
    "mapo_data_wait_ratio": ("Share of the newest step spent waiting for data, 0..1", ("run",)),
    "mapo_train_starts": ("How often the workers were started", ("run",)),
}
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mapo_stages_finished": ("Stages that succeeded", ("run", "stage")),
    "mapo_stages_failed": ("Stages that failed", ("run", "stage")),
}
"""Exported as `ray_<name>_total`."""
OF_A_STEP = {
    "mapo_train_loss": "loss",
    "mapo_implicit_accuracy": "implicit_accuracy",
    "mapo_grad_norm": "grad_norm",
    "mapo_skipped_steps": "skipped_steps",
    "mapo_pairs_per_second": "pairs_per_s",
    "mapo_mfu": "mfu",
    "mapo_data_wait_ratio": "data_wait_ratio",
}
"""Gauge -> the name of the metric in the training's history."""


class _Outlet:
    """The metrics of one connection to Ray; another connection needs new ones."""

    def __init__(self) -> None:
        self._connection: str | None = None
        self._made: dict[str, Any] = {}

    def metric(self, name: str) -> Any | None:
        """Return Ray's metric of this name; None without a connection."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return None
        connection = ray.get_runtime_context().get_job_id()
        if connection != self._connection:
            self._connection, self._made = connection, {}
        if name not in self._made:
            from ray.util.metrics import Counter, Gauge

            kind = Gauge if name in GAUGES else Counter
            description, tags = GAUGES[name] if name in GAUGES else COUNTERS[name]
            self._made[name] = kind(name, description=description, tag_keys=tags)
        return self._made[name]


_outlet = _Outlet()


def record(name: str, value: float, **tags: str) -> None:
    """Set a gauge, or add to a counter."""
    with contextlib.suppress(Exception):  # metrics must not fail a run
        metric = _outlet.metric(name)
        if metric is None:
            return
        if name in GAUGES:
            metric.set(float(value), tags=tags)
        else:
            metric.inc(value, tags=tags)


@contextlib.contextmanager
def stage(run: str, name: str) -> Iterator[None]:
    """Export that a stage is running, its progress, and how it ends.

    Args:
        run: The run's name.
        name: The stage's name.
    """
    rows: dict[str, int] = {}

    def observe(seen: progress.ProgressStep) -> None:
        record("mapo_units_done", seen.done, run=run, stage=seen.stage)
        record("mapo_units_total", seen.total, run=run, stage=seen.stage)
        for status, count in seen.statuses.items():
            rows[status] = rows.get(status, 0) + count
            record("mapo_rows", rows[status], run=run, status=status)

    record("mapo_stage_running", 1, run=run, stage=name)
    progress.observers.append(observe)
    try:
        yield
    except Exception:
        record("mapo_stages_failed", 1, run=run, stage=name)
        raise
    else:
        record("mapo_stages_finished", 1, run=run, stage=name)
    finally:
        progress.observers.remove(observe)
        record("mapo_stage_running", 0, run=run, stage=name)


def training(run: str, seen: Mapping[str, Any]) -> None:
    """Export the newest metrics of a training.

    Args:
        run: The run's name.
        seen: The content of rank 0's `progress.json`.
    """
    record("mapo_train_step", seen["step"], run=run)
    record("mapo_train_max_steps", seen["max_steps"], run=run)
    record("mapo_train_starts", seen["starts"], run=run)
    for name, key in OF_A_STEP.items():
        if key in seen["last"]:
            record(name, seen["last"][key], run=run)
