"""A finished training goes on to more steps with the bits of one long training, or the plan says why it cannot."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded import write_base, write_encoded

from orchestration.config import check_data
from orchestration.rounds.extension import as_extended, extension_notes, num_finished
from orchestration.rounds.series import made_from
from orchestration.run.context import Run
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.export import read_weights
from training.launch import TrainingResult, train
from training.spec import TrainSpec, base_digest

SETTINGS: dict[str, Any] = {
    "num_workers": 2, "global_batch_size": 8, "micro_batch_size": 2, "max_steps": 2, "learning_rate": 4e-3,
    "lr_schedule": "constant", "warmup_steps": 3, "precision": "bf16", "gradient_checkpointing": False,
    "checkpoint_every": 10, "validate_every": 10, "ema": {"decay": 0.9}, "prompt_dropout": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """A training of two steps, not run yet."""
    folder = tmp_path_factory.mktemp("extended")
    storage = Storage(str(folder / "storage"))
    snapshot = write_encoded(storage, folder)
    source = ModelSource(str(write_base(folder / "base")))
    return TrainSpec(storage.url, "short", source, base_digest(source), 0, TrainConfig(**SETTINGS), snapshot)


def run_of(spec: TrainSpec) -> Run:
    config = {
        "name": spec.run, "storage": spec.storage_url, "encode": {"model": str(spec.base.folder())}, "train": SETTINGS,
        "ingest": {"sources": [{"format": "pickapic", "path": "none.parquet"}]},
    }  # fmt: skip
    return Run.open(check_data(config), lambda line: None)


def record(spec: TrainSpec, details: dict[str, Any]) -> None:
    """What the stage would record."""
    run_of(spec).journal.finish("train", key=spec.key, summary="", seconds=0.0, details=details | made_from(spec))


def with_steps(spec: TrainSpec, steps: int, **changes: Any) -> TrainSpec:
    return replace(spec, config=spec.config.model_copy(update={"max_steps": steps, **changes}))


@pytest.fixture(scope="module")
def finished(ray_cluster: None, short: TrainSpec) -> TrainingResult:
    trained = train(short, lambda progress: None)
    record(short, asdict(trained))
    return trained


def test_an_extended_training_has_the_bits_of_one_long_training(finished: TrainingResult, short: TrainSpec) -> None:
    spec = as_extended(run_of(short), with_steps(short, 4))
    assert (spec.key, spec.begun_max_steps) == (short.key, 2)
    assert num_finished(run_of(short), spec) == 2 < spec.config.max_steps
    assert "extends the training of 2 steps to 4" in extension_notes(run_of(short), spec)[0]
    extended = train(spec, lambda progress: None)
    long = replace(with_steps(short, 4), run="long")
    assert as_extended(run_of(long), long) == long, "the runs of a storage do not mix"
    whole = train(long, lambda progress: None)
    assert extended.digest == whole.digest
    for mine, other in zip(extended.history["steps"], whole.history["steps"], strict=True):
        assert {k: v for k, v in mine.items() if "_s" not in k and k not in NOISE} == {
            k: v for k, v in other.items() if "_s" not in k and k not in NOISE
        }
    for kind in ("raw", "ema"):
        weights = [read_weights(short.storage, each.checkpoint, kind) for each in (extended, whole)]
        assert weights[0].keys() == weights[1].keys()
        assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    again = as_extended(run_of(short), with_steps(short, 6))
    assert (again.key, again.begun_max_steps) == (short.key, 2), "any number of times"


NOISE = ("memory_bytes", "data_wait_ratio", "mfu", "hfu")


def test_fewer_steps_than_there_are_change_nothing_and_are_said(finished: TrainingResult, short: TrainSpec) -> None:
    spec = as_extended(run_of(short), with_steps(short, 1))
    assert num_finished(run_of(short), spec) >= 1
    assert "already has 2 steps, more than max_steps 1" in extension_notes(run_of(short), spec)[0]


@pytest.mark.parametrize("changes", [{"learning_rate": 1e-3}, {"ema": None}, {"global_batch_size": 16}])
def test_another_setting_is_another_training(
    finished: TrainingResult, short: TrainSpec, changes: dict[str, Any]
) -> None:
    spec = with_steps(short, 4, **changes)
    assert as_extended(run_of(short), spec) == spec
    assert extension_notes(run_of(short), spec) == []


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_that_depends_on_the_steps_is_said(tmp_path: Path, short: TrainSpec, schedule: str) -> None:
    begun = replace(with_steps(short, 2, lr_schedule=schedule), run=schedule)
    record(begun, {"checkpoint": f"runs/{schedule}/checkpoints/{begun.key}/step-2", "steps": 2})
    longer = with_steps(begun, 4)
    assert as_extended(run_of(begun), longer) == longer
    (note,) = extension_notes(run_of(begun), longer)
    assert f"max_steps went from 2 to 4, and with lr_schedule {schedule} the rate of every step depends on it" in note
    assert "The old one stays in" in note
    assert "encode.model" in note
