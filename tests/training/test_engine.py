"""DeepSpeed ZeRO computes what plain AdamW computes, in every stage, split and adapter; real ranks, no Ray."""

from pathlib import Path

import pytest
import torch
from encoded import write_base
from engine_work import PAIRS, losses_of_configs, plain_adamw, save_after
from ranks import on_ranks

from training.config import TrainConfig

CONFIG = TrainConfig(
    num_workers=2,
    global_batch_size=PAIRS,
    micro_batch_size=2,
    max_steps=20,
    learning_rate=1e-3,
    precision="fp32",
    gradient_checkpointing=False,
    channels_last=False,
)


def with_(**changes) -> TrainConfig:
    return TrainConfig.model_validate(CONFIG.model_dump() | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base") / "model"))


def test_every_stage_and_every_accumulation_gives_the_curve_of_plain_adamw(base) -> None:
    expected = plain_adamw(CONFIG, base, 20)
    assert expected[-1] < expected[0] / 2, "nothing is learnt"
    configs = [with_(zero_stage=1), with_(zero_stage=2), with_(zero_stage=3), with_(micro_batch_size=1)]
    configs.append(with_(micro_batch_size=4, channels_last=True, gradient_checkpointing=True))
    curves = on_ranks(2, losses_of_configs, configs, base, 20)
    assert curves[0] == curves[1]
    for config, curve in zip(configs, curves[0], strict=True):
        error = max(abs(a - b) for a, b in zip(curve, expected, strict=True))
        assert error <= 1e-5, f"stage {config.zero_stage}, micro-batch {config.micro_batch_size}: off by {error}"


def test_one_rank_with_more_accumulation_gives_it_too(base) -> None:
    expected = plain_adamw(CONFIG, base, 20)
    configs = [with_(num_workers=1, micro_batch_size=m) for m in (8, 4, 2)]
    for curve in on_ranks(1, losses_of_configs, configs, base, 20)[0]:
        assert curve == pytest.approx(expected, abs=1e-5)


def test_offload_partial_checkpointing_and_attention_back_ends_change_nothing_but_rounding(base) -> None:
    expected = plain_adamw(CONFIG, base, 6)
    configs = [
        with_(offload="cpu"),
        with_(offload="cpu", zero_stage=3),
        with_(gradient_checkpointing="resnets"),
        with_(gradient_checkpointing="transformers", attention="math"),
    ]
    for curve in on_ranks(2, losses_of_configs, configs, base, 6)[0]:
        assert curve == pytest.approx(expected, abs=1e-5)


def test_bf16_keeps_float32_masters(base) -> None:
    """A rate at which one bf16 step is below half a unit in the last place: only float32 masters move."""
    config = {"precision": "bf16", "learning_rate": 1e-4, "weight_decay": 0.0}
    expected = plain_adamw(with_(learning_rate=1e-4, weight_decay=0.0), base, 20)
    for curve in on_ranks(2, losses_of_configs, [with_(zero_stage=s, **config) for s in (1, 2, 3)], base, 20)[0]:
        assert curve == pytest.approx(expected, rel=0.02)
        assert curve[-1] < curve[0]


@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_a_model_that_equals_its_reference_starts_at_the_anchor(method, base) -> None:
    beta = 100.0
    anchor = torch.tensor(2.0).log().item() if method == "dpo" else 1 / (4 * beta**2)
    shared = {"method": method, "loss": {"beta": beta}}
    configs = [
        with_(**shared),
        with_(**shared, zero_stage=3),
        with_(**shared, lora={"rank": 4}),
        with_(**shared, lora={"rank": 4}, zero_stage=3),
    ]
    for curve in on_ranks(2, losses_of_configs, configs, base, 5)[0]:
        assert curve[0] == pytest.approx(anchor, rel=1e-5)
        assert curve[-1] < curve[0]


def test_adapters_learn_the_same_in_every_stage(base) -> None:
    configs = [with_(zero_stage=stage, lora={"rank": 4}, learning_rate=1e-2) for stage in (1, 2, 3)]
    curves = on_ranks(2, losses_of_configs, configs, base, 8)[0]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0] == pytest.approx(curves[2], abs=1e-5)
    assert curves[0][-1] < curves[0][0] - 0.05


def test_what_two_ranks_of_one_stage_wrote_any_ranks_of_any_stage_go_on_from(base, tmp_path: Path) -> None:
    """2 ranks of ZeRO-2 -> 1 of ZeRO-3 -> 4 of ZeRO-1, against 2 of ZeRO-2 undisturbed; the average too."""
    shared = {"ema": {"decay": 0.5}}
    undisturbed = on_ranks(2, save_after, with_(**shared), base, str(tmp_path / "undisturbed"), 0, 12)[0]
    first = on_ranks(2, save_after, with_(**shared), base, str(tmp_path / "run"), 4, 0)[0]
    one = with_(**shared, num_workers=1, zero_stage=3)
    second = on_ranks(1, save_after, one, base, str(tmp_path / "run"), 8, 0)[0]
    four = with_(**shared, num_workers=4, zero_stage=1)
    third = on_ranks(4, save_after, four, base, str(tmp_path / "run"), 12, 0)
    assert [part["first"] for part in (first, second, third[0])] == [0, 4, 8]
    curve = first["curve"] + second["curve"] + third[0]["curve"]
    assert curve == pytest.approx(undisturbed["curve"], abs=1e-4)
