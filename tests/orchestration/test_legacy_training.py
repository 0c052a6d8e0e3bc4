"""A training that a version before December 2026 began stays what it is: found under its key, up to date or resumed."""

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from torch import zeros

from orchestration.config import parse_config
from orchestration.run.context import Run
from orchestration.stages.train import as_begun
from orchestration.stages.training_notes import version_notes
from pipelines.dataset.model_files import ModelSource
from training.config import TrainConfig
from training.spec import Snapshot, TrainSpec

CONFIG = "{name: r, storage: %s, encode: {model: m}, train: {}}"


def spec_of(run: Run, **train: object) -> TrainSpec:
    config = TrainConfig.model_validate(train)
    snapshot = Snapshot(1, "a" * 32, 1, "b" * 32, 1)
    return TrainSpec(run.storage.url, "r", ModelSource("m"), "e" * 16, 0, config, snapshot)


def checkpoint_of(run: Run, spec: TrainSpec) -> None:
    write_checkpoint(run.storage, spec.checkpoints, 4, {"w": zeros(4)})


def record_of(run: Run, spec: TrainSpec) -> None:
    run.journal.finish("train", key=spec.key, summary="", seconds=1, details={})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(parse_config(CONFIG % tmp_path), lambda line: None)


def test_a_new_training_has_todays_arithmetic(run: Run) -> None:
    spec = spec_of(run, ema={})
    assert as_begun(run, spec) == spec
    assert spec.starts_from_float32
    assert version_notes(spec) == []


@pytest.mark.parametrize("leave", [checkpoint_of, record_of])
def test_what_was_begun_before_goes_on_as_it_was(run: Run, leave) -> None:
    spec = spec_of(run, ema={})
    leave(run, spec.as_legacy())
    found = as_begun(run, spec)
    assert found == spec.as_legacy()
    assert found.key != spec.key
    assert not found.starts_from_float32
    assert found.config.ema is not None
    assert not found.config.ema.warmup
    notes = " ".join(version_notes(found))
    assert "rounded to bf16" in notes
    assert "no warm-up" in notes
    assert "2,000 steps of 2,048 pairs" in notes


def test_the_old_default_rate_stays_too_and_is_said(run: Run) -> None:
    spec = spec_of(run, lora={"rank": 4})
    checkpoint_of(run, spec.as_legacy())
    found = as_begun(run, spec)
    assert (spec.config.learning_rate, found.config.learning_rate) == (5e-5, 1e-7)
    assert "learning rate is the 1e-07" in version_notes(found)[0]


def test_a_training_begun_anew_is_preferred_and_one_that_changed_nothing_is_itself(run: Run) -> None:
    spec = spec_of(run)
    checkpoint_of(run, spec.as_legacy())
    checkpoint_of(run, spec)
    assert as_begun(run, spec) == spec
    record_of(run, spec.as_legacy())
    assert as_begun(run, spec) == spec.as_legacy(), "the run's record tells which one it is"
    same = spec_of(run, precision="fp32")
    record_of(run, same.as_legacy())
    assert as_begun(run, same) == same
    other = replace(spec, seed=1)
    assert as_begun(run, other) == other, "another training was never begun"
