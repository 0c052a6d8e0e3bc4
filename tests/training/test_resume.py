"""Killed at any moment, a run ends with the bits of an undisturbed one; with other workers, with its curve."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from encoded import write_base, write_encoded
from killer import check_killed_run

from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.launch import TrainingResult, train
from training.spec import TrainSpec, base_digest
from training.state.checkpoint_format import list_checkpoints

STEPS = 32
CONFIG = TrainConfig(
    num_workers="2..2",
    global_batch_size=10,
    micro_batch_size=2,
    max_steps=STEPS,
    learning_rate=2e-3,
    precision="fp32",
    gradient_checkpointing=False,
    checkpoint_every=2,
    validate_every=8,
    ema={"decay": 0.9},
    keep_checkpoints=20,
)
KILLS = 7  # in a run of the matrix: 3 runs and 21 kills for each case
CASES = {f"adamw-{stage}": {"zero_stage": stage} for stage in (1, 2, 3)} | {
    "adafactor-2": {"optimizer": "adafactor", "zero_stage": 2},
    "adafactor-3": {"optimizer": "adafactor", "zero_stage": 3},
    "prodigy-2": {"optimizer": "prodigy", "learning_rate": 1.0, "prodigy": {"d0": 1e-4, "d_coef": 20}},
    "prodigy-3": {"optimizer": "prodigy", "learning_rate": 1.0, "prodigy": {"d0": 1e-4, "d_coef": 20}, "zero_stage": 3},
}
SHORT = "prodigy-2 of 12 steps"  # what the suite runs: one kill


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, TrainSpec]:
    """A data set and a base that every run here copies or shares."""
    folder = tmp_path_factory.mktemp("data")
    storage = Storage(str(folder / "storage"))
    snapshot = write_encoded(storage, folder, sides=(8, 12))
    source = ModelSource(str(write_base(folder / "base")))
    return folder, TrainSpec(storage.url, "undisturbed", source, base_digest(source), 0, CONFIG, snapshot)


def changes_of(case: str) -> dict[str, Any]:
    name, is_short, _ = case.partition(" of ")
    return CASES[name] | ({"max_steps": 12} if is_short else {})


def run_of(data: tuple[Path, TrainSpec], name: str, **changes) -> TrainSpec:
    spec = data[1]
    return replace(spec, run=name, config=TrainConfig.model_validate(spec.config.model_dump() | changes))


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, data) -> dict[str, tuple[TrainSpec, TrainingResult]]:
    """By case, made when it is asked for."""

    class Made(dict):
        def __missing__(self, case: str) -> tuple[TrainSpec, TrainingResult]:
            spec = run_of(data, f"undisturbed-{case.replace(' ', '-')}", **changes_of(case))
            self[case] = spec, train(spec, lambda progress: None)
            return self[case]

    return Made()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_kill_matrix(case, seed, data, undisturbed) -> None:
    spec = run_of(data, f"killed-{case}-{seed}", **changes_of(case), max_failures=KILLS)
    check_killed_run(spec, undisturbed[case], 100 * spec.config.zero_stage + seed, KILLS)


def test_a_killed_training_of_prodigy_ends_with_the_same_bits(data, undisturbed) -> None:
    """`make kills` has twenty kills of each optimizer."""
    spec = run_of(data, "killed", **changes_of(SHORT), max_failures=1)
    check_killed_run(spec, undisturbed[SHORT], 0, 1)
    sizes = [step["step_size"] for step in undisturbed[SHORT][1].history["steps"]]
    assert sizes[-1] > sizes[0] == 1e-4, "the step size has grown"


def cut_off(undisturbed: tuple[TrainSpec, TrainingResult], spec: TrainSpec, step: int) -> None:
    """Let `spec` be the undisturbed run, interrupted after the checkpoint of this step."""
    old, storage = undisturbed[0], spec.storage
    shutil.copytree(storage.path(old.folder), storage.path(spec.folder))
    for manifest in list_checkpoints(storage, spec.checkpoints):
        if manifest.step > step:
            storage.delete(f"{manifest.folder}/manifest.json")


@pytest.mark.slow
def test_other_workers_go_on_from_the_newest_whole_checkpoint_with_the_same_curve(data, undisturbed) -> None:
    """2 workers to step 8, whose checkpoint is damaged, then 3 from step 6; neither number divides the 5 slots."""
    spec = run_of(data, "elastic", num_workers="1..3", max_failures=0)
    expected_spec, expected = undisturbed["adamw-2"]
    assert spec.key == expected_spec.key, "the number of workers does not make it another training"
    cut_off(undisturbed["adamw-2"], spec, 8)
    newest = list_checkpoints(spec.storage, spec.checkpoints)[-1]
    file = Path(spec.storage.path(f"{newest.folder}/rank-00001.safetensors"))
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    notes: list[str] = []
    trained = train(spec, lambda progress: notes.extend(progress.notes))
    assert any(newest.name in note for note in notes), "it is said which one was not used"
    assert newest.folder not in [each.folder for each in list_checkpoints(spec.storage, spec.checkpoints)]
    assert [step["step"] for step in trained.history["steps"]] == list(range(1, STEPS + 1))
    assert (len(trained.workers), trained.starts) == (3, 2)
    assert trained.digest == expected.digest
    losses = [[step["loss"] for step in each.history["steps"]] for each in (expected, trained)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][:6] == losses[1][:6]


@pytest.mark.slow
def test_a_notice_that_a_node_will_go_gives_a_checkpoint_in_time(data, tmp_path) -> None:
    """No checkpoint is due before the end: the one in time is the notice's. Workers elsewhere go on from it."""
    changes = {"num_workers": "1..2", "max_steps": 300, "checkpoint_every": 1000, "validate_every": 1000}
    spec = run_of(data, "preempted", **changes)
    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    driver = [sys.executable, "-m", "preempted", str(tmp_path / "spec")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    done = subprocess.run(driver, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["before"] == []
    assert len(found["in_time"]) == 1
    assert 0 < found["in_time"][0] < 300
    assert found["starts"] == 2
    assert found["steps"] == list(range(1, 301))
