"""Adafactor and Prodigy step the same on any number of ranks, and like the implementations that see whole weights."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded import write_base
from engine_work import CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_work import by_hand, newest_checkpoint, optimizer_of, train_all
from ranks import on_ranks

from pipelines.dataset.errors import ConfigError
from training.config import TrainConfig
from training.engine import build_optimizer, check_machine
from training.optimizers.adafactor import begun_in, matrix_numel, shared_matrices, span_of
from training.optimizers.partition import Fragment
from training.optimizers.registry import OPTIMIZERS
from training.spec import Snapshot, TrainSpec

STEPS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "adafactor": {"optimizer": "adafactor", "learning_rate": 3e-3, "zero_stage": 3},
    "prodigy": {
        "optimizer": "prodigy", "learning_rate": 1.0, "zero_stage": 2,
        "prodigy": {"d0": 1e-4, "d_coef": 50, "growth_rate": 1.5},
    },
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2, "micro_batch_size": 1},
    "stage 3": {"zero_stage": 3},
    "offloaded": {"zero_stage": 2, "offload": "cpu", "channels_last": True},
    "offloaded 3": {"zero_stage": 3, "offload": "cpu"},
    "adapters": {"zero_stage": 3, "lora": {"rank": 4}, "weight_decay": 0.0},
    "bf16": {"zero_stage": 1, "precision": "bf16"},
}


def config_of(optimizer: str, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(CONFIG.model_dump() | SETTINGS[optimizer] | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder of storages, and what each training gave: by optimizer one without a break, one with a break, and one
    that one rank of another stage began; and one whose break is before the first step."""
    folder, begun, jobs = tmp_path_factory.mktemp("trained"), [], {}
    for optimizer in SETTINGS:
        config = config_of(optimizer, ema={"decay": 0.5})
        alone = config.model_copy(update={"num_workers": 1, "zero_stage": 5 - config.zero_stage})
        begun.append((alone, str(folder / f"{optimizer} other"), [3]))
        for name, steps in (("whole", [STEPS]), ("parts", [3, STEPS]), ("other", [STEPS])):
            jobs[f"{optimizer} {name}"] = (config, str(folder / f"{optimizer} {name}"), steps)
    config = config_of("prodigy", precision="bf16")
    for name, steps in (("16 bits whole", [3]), ("16 bits parts", [0, 3])):
        jobs[name] = (config, str(folder / name), steps)
    on_ranks(1, train_all, begun, [], base, 0)
    found = on_ranks(2, train_all, list(jobs.values()), [], base, 0)[0]["jobs"]
    return folder, dict(zip(jobs, found, strict=True))


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_two_ranks_step_like_one_process_with_whole_weights(optimizer: str, base: str, trained: Any) -> None:
    _, found = trained
    (whole,) = found[f"{optimizer} whole"]
    assert whole["curve"] == pytest.approx(by_hand(config_of(optimizer), base, STEPS), abs=2e-6)
    assert whole["curve"][-1] < whole["curve"][0] - 0.01, "nothing is learnt"
    if optimizer == "prodigy":
        assert whole["optimizer"]["d"] > 1.5 * 1e-4, "the step size has not grown"


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_a_training_with_a_break_ends_with_the_same_bits(optimizer: str, trained: Any) -> None:
    folder, _ = trained
    expected, state = newest_checkpoint(str(folder / f"{optimizer} whole"))
    found, other = newest_checkpoint(str(folder / f"{optimizer} parts"))
    assert {"adafactor": {"exp_avg_sq_row", "exp_avg_sq_col"}, "prodigy": {"s", "p0"}}[optimizer] < expected.keys()
    assert found.keys() == expected.keys()
    assert other["optimizer"] == state["optimizer"]
    assert other["num_adam_steps"] == state["num_adam_steps"] == STEPS
    for kind, weights in expected.items():
        assert all(found[kind][name].tobytes() == weight.tobytes() for name, weight in weights.items()), kind


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_what_one_rank_of_another_stage_began_two_ranks_finish(optimizer: str, trained: Any) -> None:
    folder, _ = trained
    expected, state = newest_checkpoint(str(folder / f"{optimizer} whole"))
    found, other = newest_checkpoint(str(folder / f"{optimizer} other"))
    assert other["optimizer"] == pytest.approx(state["optimizer"], rel=1e-4)
    for kind, weights in expected.items():
        for name, weight in weights.items():
            assert np.abs(found[kind][name] - weight).max() <= 1e-3 * np.abs(weight).max() + 1e-12, (kind, name)


def test_what_prodigy_measures_from_are_the_float32_weights_at_the_start(trained: Any) -> None:
    """Of bf16, they come after the engine; a checkpoint before the first step has them too."""
    folder, found = trained
    assert [each["first"] for each in found["16 bits parts"]] == [0, 0]
    assert found["16 bits parts"][1]["curve"] == found["16 bits whole"][0]["curve"]
    for (kinds, _), is_moved in (
        (newest_checkpoint(str(folder / "16 bits whole")), True),
        (newest_checkpoint(str(folder / "16 bits parts")), True),
    ):
        differing = [name for name, weight in kinds["weight"].items() if not np.array_equal(weight, kinds["p0"][name])]
        assert bool(differing) is is_moved
    wholes = [newest_checkpoint(str(folder / f"16 bits {name}"))[0] for name in ("whole", "parts")]
    assert all(np.array_equal(wholes[0]["p0"][name], p0) for name, p0 in wholes[1]["p0"].items())
    assert any((p0.view(np.uint32) & 0xFFFF).any() for p0 in wholes[0]["p0"].values()), "rounded to bf16"


@pytest.mark.slow
def test_every_way_to_train_steps_like_one_process_with_whole_weights(base: str) -> None:
    cases = [(optimizer, way) for optimizer in SETTINGS for way in WAYS]
    configs = [config_of(optimizer, **WAYS[way]) for optimizer, way in cases]
    first, second = (found["curves"] for found in on_ranks(2, train_all, [], configs, base, STEPS))
    assert first == second
    for case, config, curve in zip(cases, configs, first, strict=True):
        expected = by_hand(config.model_copy(update={"precision": "fp32"}), base, STEPS)
        tolerance = 1e-2 if config.precision == "bf16" else 1e-5
        assert curve == pytest.approx(expected, abs=tolerance), case


def test_prodigy_follows_prodigyopt_while_its_step_size_grows() -> None:
    config = TrainConfig(optimizer="prodigy", weight_decay=0.1, prodigy={"d_coef": 2, "growth_rate": 1.2})
    module = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5))
    other = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5))
    other.load_state_dict(module.state_dict())
    ours = build_optimizer(module, config, on_gpu=False)
    theirs = optimizer_of(config)(other.parameters(), lr=1.0, weight_decay=0.1)
    draw, sizes = torch.Generator().manual_seed(0), []
    for step in range(60):
        batch = torch.randn(16, 20, generator=draw)
        for each, optimizer in ((module, ours), (other, theirs)):
            optimizer.zero_grad()
            loss = (each(batch) - batch[:, :5]).square().mean()
            (loss * (step > 0)).backward()  # the first gradient is zero throughout
            optimizer.step()
        sizes.append((ours.param_groups[0]["d"], theirs.param_groups[0]["d"]))
        assert sizes[-1][0] == pytest.approx(sizes[-1][1], rel=1e-6)
    assert sizes[-1][0] > 20 * sizes[0][0]
    for weight, expected in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.allclose(weight, expected, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.data())
def test_the_ranks_write_every_row_and_column_once_and_share_those_that_they_cut(shape: list[int], data: Any) -> None:
    numel = math.prod(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, numel), max_size=4)))
    borders = [0, *cuts, numel]
    parts = [Fragment("w", a, b - a, tuple(shape)) for a, b in itertools.pairwise(borders) if b > a]
    written = [number for part in parts for number in range(*begun_in(part))]
    assert written == list(range(numel // matrix_numel(parts[0])))
    touched = [number for part in parts for number in range(*span_of(part))]
    assert shared_matrices(parts) == sorted({number for number in touched if touched.count(number) > 1})


@pytest.mark.parametrize(
    ("optimizer", "offload", "reason"),
    [
        ("adafactor", "nvme", "states are of whole weight matrices"), ("prodigy", "nvme", "from all weights"),
        ("adamw_8bit", "cpu", "on the GPU"), ("adamw_8bit", "nvme", "on the GPU"),
    ],
)  # fmt: skip
def test_what_cannot_be_exact_is_refused_with_the_reason(optimizer: str, offload: str, reason: str) -> None:
    place = {"zero_stage": 3, "offload_path": "/nvme"} if offload == "nvme" else {}
    with pytest.raises(ValueError, match=f"offload {offload} does not work with optimizer {optimizer}: .*{reason}"):
        TrainConfig(optimizer=optimizer, offload=offload, **place)
    others = set(OPTIMIZERS[optimizer].offloads) - {"nvme"}
    assert all(TrainConfig(optimizer=optimizer, offload=other).offload == other for other in others)


def test_settings_of_prodigy_need_prodigy() -> None:
    with pytest.raises(ValueError, match="`prodigy` is set, but optimizer is adamw"):
        TrainConfig(prodigy={"d_coef": 2})
    assert TrainConfig(prodigy={"d_coef": 1}) == TrainConfig()


def test_the_optimizer_and_its_settings_make_another_training_and_written_defaults_do_not() -> None:
    def key(**changes: Any) -> str:
        config = TrainConfig.model_validate({"learning_rate": 1.0, **changes})
        return TrainSpec("/storage", "run", None, "e" * 16, 7, config, Snapshot(3, "a", 4, "b", 5)).key  # type: ignore[arg-type]

    keys = [key(optimizer=name) for name in OPTIMIZERS] + [key(optimizer="prodigy", prodigy={"d0": 1e-5})]
    assert len(set(keys)) == len(keys)
    assert key(optimizer="prodigy", prodigy={"d_coef": 1.0, "growth_rate": None}) == key(optimizer="prodigy")


def test_an_optimizer_without_its_package_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"adamw_8bit needs bitsandbytes"):
        check_machine(TrainConfig(optimizer="adamw_8bit"))
    check_machine(TrainConfig(optimizer="adafactor"))
