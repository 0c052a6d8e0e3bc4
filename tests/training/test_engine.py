"""DeepSpeed ZeRO computes what plain AdamW computes, in every stage, split and adapter; real ranks, no Ray."""

import math
from pathlib import Path

import pytest
from encoded import write_base
from engine_work import CONFIG, in_half, losses_of_configs, on_nvme, plain_adamw, train_and_save
from ranks import on_ranks

from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.export import read_weights
from training.state.checkpoint_format import list_checkpoints


def with_(**changes) -> TrainConfig:
    return TrainConfig.model_validate(CONFIG.model_dump() | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base") / "model"))


def test_every_stage_and_every_accumulation_gives_the_curve_of_plain_adamw(base) -> None:
    expected = plain_adamw(CONFIG, base, 20)[0]
    assert expected[-1] < 0.6 * expected[0], "nothing is learnt"
    configs = [with_(zero_stage=1), with_(zero_stage=2), with_(zero_stage=3), with_(micro_batch_size=1)]
    configs.append(with_(micro_batch_size=4, channels_last=True, gradient_checkpointing=True))
    curves = on_ranks(2, losses_of_configs, configs, base, 20)
    assert curves[0] == curves[1]
    for config, curve in zip(configs, curves[0], strict=True):
        error = max(abs(a - b) for a, b in zip(curve, expected, strict=True))
        assert error <= 1e-5, f"stage {config.zero_stage}, micro-batch {config.micro_batch_size}: off by {error}"


@pytest.mark.slow
def test_one_rank_with_more_accumulation_gives_it_too(base) -> None:
    expected = plain_adamw(CONFIG, base, 20)[0]
    configs = [with_(num_workers=1, micro_batch_size=m) for m in (8, 4, 2)]  # 1 x 8, 2 x 4, 4 x 2
    for curve in on_ranks(1, losses_of_configs, configs, base, 20)[0]:
        assert curve == pytest.approx(expected, abs=1e-5)


ROUNDING = [
    with_(offload="cpu"),
    with_(offload="cpu", zero_stage=3),
    with_(gradient_checkpointing="resnets"),
    with_(gradient_checkpointing="transformers", attention="math"),
]
BF16 = [with_(zero_stage=s, precision="bf16", learning_rate=1e-4, weight_decay=0.0) for s in (1, 2, 3)]
FP16 = [config.model_copy(update={"precision": "fp16"}) for config in BF16]
LORA = [with_(zero_stage=s, lora={"rank": 4}, learning_rate=3e-1) for s in (1, 2, 3)]
REFERENCE = [
    with_(method=method, loss={"beta": 100.0}, **more)
    for method, more in (("dpo", {}), ("ipo", {"zero_stage": 3}), ("dpo", {"lora": {"rank": 4}, "zero_stage": 3}),
                         ("dpo", {"precision": "bf16", "channels_last": True}))
]  # fmt: skip


@pytest.fixture(scope="module")
def curves(base) -> dict[str, list[float]]:
    """Four steps of many ways to train, in the same two processes."""
    configs = [*ROUNDING, *BF16, *FP16, *LORA, *REFERENCE, with_(learning_rate=1e-12)]
    found = on_ranks(2, in_half, losses_of_configs, configs, base, 4)[0]
    return {config.model_dump_json(): curve for config, curve in zip(configs, found, strict=True)}


def test_offload_partial_checkpointing_and_attention_back_ends_change_nothing_but_rounding(base, curves) -> None:
    expected = plain_adamw(CONFIG, base, 4)[0]
    for config in ROUNDING:
        assert curves[config.model_dump_json()] == pytest.approx(expected, abs=1e-5)


def test_half_precision_keeps_float32_masters(base, curves) -> None:
    """A rate at which one step is below half a unit in the last place of bf16: only float32 masters move."""
    expected = plain_adamw(with_(learning_rate=1e-4, weight_decay=0.0), base, 4)[0]
    for configs, tolerance in ((BF16, 0.02), (FP16, 1e-3)):
        for config in configs:
            curve = curves[config.model_dump_json()]
            assert curve == pytest.approx(expected, rel=tolerance)
            assert curve[-1] < curve[0]


@pytest.mark.slow  # compiles an operator of DeepSpeed first: two minutes
def test_what_lies_on_nvme_trains_as_in_memory_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("apt install libaio-dev")
    base = str(write_base(tmp_path / "base", channels=(64, 128)))  # DeepSpeed leaves less than a megabyte in memory
    in_memory = with_(zero_stage=3, ema={"decay": 0.5})
    (tmp_path / "nvme").mkdir()
    config = TrainConfig.model_validate(
        in_memory.model_dump() | {"offload": "nvme", "offload_path": str(tmp_path / "nvme")}
    )
    curves, weights = {}, {}
    for name, wanted, turns in (("memory", in_memory, [4]), ("nvme", config, [4]), ("parts", config, [2, 4])):
        storage = Storage(str(tmp_path / name))
        parts = [on_ranks(2, on_nvme, train_and_save, wanted, base, storage.url, step)[0] for step in turns]
        curves[name] = [loss for part in parts for loss in part["curve"]]
        newest = list_checkpoints(storage, "checkpoints")[-1].folder
        weights[name] = [read_weights(storage, newest, kind) for kind in ("raw", "ema")]
    assert curves["nvme"] == pytest.approx(curves["memory"], abs=1e-5)
    assert curves["parts"] == curves["nvme"]
    for expected, found in zip(weights["nvme"], weights["parts"], strict=True):
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    for expected, found in zip(weights["memory"], weights["nvme"], strict=True):
        assert max(abs(found[name] - expected[name]).max() for name in expected) < 1e-5


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_fp16_searches_its_loss_scale_and_goes_on_from_before_its_first_step(stage, base, tmp_path: Path) -> None:
    """DPO's gradients overflow at the first scales: at the checkpoint AdamW has not made one step."""
    dpo = {"method": "dpo", "loss": {"beta": 300.0}, "ema": {"decay": 0.5}, "learning_rate": 1e-4}
    config = with_(precision="fp16", zero_stage=stage, **dpo)
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    undisturbed = on_ranks(2, in_half, train_and_save, config, base, whole, 6)[0]
    first, second = (on_ranks(2, in_half, train_and_save, config, base, parts, step)[0] for step in (2, 6))
    assert first["num_adam_steps"] == 0
    assert 0 < undisturbed["num_adam_steps"] < 6
    assert first["curve"] + second["curve"] == undisturbed["curve"]
    assert second["loss_scale"] == undisturbed["loss_scale"]
    for kind in ("raw", "ema"):
        expected, found = (
            read_weights(storage, list_checkpoints(storage, "checkpoints")[-1].folder, kind)
            for storage in (Storage(whole), Storage(parts))
        )
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_a_model_that_equals_its_reference_starts_at_the_anchor(curves) -> None:
    for config in REFERENCE:
        curve = curves[config.model_dump_json()]
        assert curve[0] == pytest.approx(math.log(2) if config.method == "dpo" else 1 / (4 * 100.0**2), rel=1e-5)
        assert curve[1] != curve[0], "it moves away"


def test_adapters_learn_the_same_in_every_stage(curves) -> None:
    one, two, three = (curves[config.model_dump_json()] for config in LORA)
    unchanged = curves[with_(learning_rate=1e-12).model_dump_json()]
    assert one == pytest.approx(two, abs=1e-5)
    assert one == pytest.approx(three, abs=1e-5)
    assert one[0] == pytest.approx(unchanged[0], abs=1e-5), "adapters change nothing before the first step"
    assert sum(one) < sum(unchanged) - 0.01


def test_what_two_ranks_of_one_stage_wrote_any_ranks_of_any_stage_go_on_from(tmp_path: Path) -> None:
    """2 ranks of ZeRO-2 -> 1 of ZeRO-3 -> 2 of ZeRO-1, against one process by hand; the average too."""
    base = str(write_base(tmp_path / "base", first_up_block="CrossAttnUpBlock2D"))
    two = with_(ema={"decay": 0.5})
    expected, weights, average = plain_adamw(two, base, 12)
    storage = Storage(str(tmp_path / "run"))
    curve = []
    for turn, change in enumerate(({}, {"num_workers": 1, "zero_stage": 3}, {"zero_stage": 1})):
        config = TrainConfig.model_validate(two.model_dump() | change)
        part = on_ranks(config.worker_range[0], train_and_save, config, base, storage.url, 4 * turn + 4)[0]
        assert part["first"] == 4 * turn
        curve += part["curve"]
    assert curve == pytest.approx(expected, abs=1e-4)
    newest = list_checkpoints(storage, "checkpoints")[-1].folder
    for kind, by_hand in (("raw", weights), ("ema", average)):
        found = read_weights(storage, newest, kind)
        assert found.keys() == by_hand.keys()
        assert max(abs(found[name] - by_hand[name].numpy()).max() for name in by_hand) < 1e-4


def test_eight_bit_states_come_back_code_by_code_and_fit_other_ranks(base, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'mapo[gpu]'")
    for stage in (2, 3):
        config = with_(optimizer="adamw_8bit", zero_stage=stage)
        where = [str(tmp_path / f"{name}-{stage}") for name in ("undisturbed", "same", "other")]
        undisturbed = on_ranks(2, train_and_save, config, base, where[0], 8)[0]["curve"]
        for place, ranks in ((where[1], 2), (where[2], 1)):
            first = on_ranks(2, train_and_save, config, base, place, 4)[0]["curve"]
            then = config.model_copy(update={"num_workers": ranks})
            second = on_ranks(ranks, train_and_save, then, base, place, 8)[0]["curve"]
            assert first + second == (undisturbed if ranks == 2 else pytest.approx(undisturbed, abs=1e-2))
        plain = plain_adamw(CONFIG, base, 8)[0]
        assert undisturbed == pytest.approx(plain, rel=0.05)
