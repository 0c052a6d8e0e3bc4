"""DeepSpeed ZeRO computes what plain AdamW computes, in every stage, split and adapter; real ranks, no Ray."""

from pathlib import Path

import pytest
import torch
from encoded import write_base
from engine_work import PAIRS, losses_of_configs, plain_adamw, train_and_save
from ranks import on_ranks

from pipelines.dataset.storage import Storage
from training.checkpoint_format import committed
from training.config import TrainConfig
from training.export import read_weights

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
    assert expected[-1] < 0.6 * expected[0], "nothing is learnt"
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
        assert min(curve[1:]) < curve[0]


def test_adapters_learn_the_same_in_every_stage(base) -> None:
    configs = [with_(zero_stage=stage, lora={"rank": 4}, learning_rate=1e-2) for stage in (1, 2, 3)]
    frozen = with_(learning_rate=1e-12)
    *curves, unchanged = on_ranks(2, losses_of_configs, [*configs, frozen], base, 12)[0]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0] == pytest.approx(curves[2], abs=1e-5)
    assert curves[0][0] == pytest.approx(unchanged[0], abs=1e-5), "adapters change nothing before the first step"
    assert sum(curves[0]) < sum(unchanged) - 0.1


def test_what_two_ranks_of_one_stage_wrote_any_ranks_of_any_stage_go_on_from(base, tmp_path: Path) -> None:
    """2 ranks of ZeRO-2 -> 1 of ZeRO-3 -> 4 of ZeRO-1, against 2 of ZeRO-2 undisturbed; the average too."""
    two = with_(ema={"decay": 0.5})
    undisturbed = on_ranks(2, train_and_save, two, base, str(tmp_path / "undisturbed"), 12)[0]
    starts = [two, with_(ema={"decay": 0.5}, num_workers=1, zero_stage=3)]
    starts.append(with_(ema={"decay": 0.5}, num_workers=4, zero_stage=1))
    curve = []
    for turn, config in enumerate(starts):
        part = on_ranks(config.worker_range[0], train_and_save, config, base, str(tmp_path / "run"), 4 * turn + 4)[0]
        assert part["first"] == 4 * turn
        curve += part["curve"]
    assert curve == pytest.approx(undisturbed["curve"], abs=1e-4)
    for kind in ("raw", "ema"):
        one, other = (
            read_weights(
                Storage(str(tmp_path / name)), committed(Storage(str(tmp_path / name)), "checkpoints")[-1].folder, kind
            )
            for name in ("undisturbed", "run")
        )
        assert max(abs(one[name] - other[name]).max() for name in one) < 1e-4


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
        plain = plain_adamw(CONFIG, base, 8)
        assert undisturbed == pytest.approx(plain, rel=0.05)
