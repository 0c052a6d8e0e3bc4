"""The average takes the weights' place for a validation, and training never notices."""

from pathlib import Path

import pytest
from encoded import write_base
from engine_work import CONFIG, average_in_place, on_nvme
from ranks import on_ranks

from training.config import TrainConfig


def with_(**changes) -> TrainConfig:
    return TrainConfig.model_validate(CONFIG.model_dump() | {"ema": {"decay": 0.9}, "learning_rate": 1e-3} | changes)


def test_the_average_can_be_measured_in_every_stage_and_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    base = str(write_base(tmp_path / "base"))
    configs = [with_(zero_stage=stage, precision="bf16") for stage in (1, 2, 3)]
    configs += [with_(), with_(zero_stage=3, lora={"rank": 4}), with_(zero_stage=3, offload="cpu")]
    for found in on_ranks(2, average_in_place, configs, base):
        for config, each in zip(configs, found, strict=True):
            what = f"stage {config.zero_stage}, {config.precision}"
            assert each["is_average"], what
            assert each["same_state"], what
            assert each["same_model"], what
            assert each["loss"] == each["again"] != each["of_average"], what
            assert each["last"] == each["undisturbed"], what


@pytest.mark.slow  # compiles an operator of DeepSpeed first: two minutes
def test_it_can_be_measured_from_nvme_too(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("apt install libaio-dev")
    base = str(write_base(tmp_path / "base", channels=(64, 128)))
    (tmp_path / "nvme").mkdir()
    config = with_(zero_stage=3, offload="nvme", offload_path=str(tmp_path / "nvme"))
    (found,) = on_ranks(2, on_nvme, average_in_place, [config], base)[0]
    assert found["same_state"]
    assert found["loss"] == found["again"] != found["of_average"]
