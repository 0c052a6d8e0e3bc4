"""What is trained is what the forward pass sees: 16-bit trainings start from the base's float32 weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from encoded import write_base
from engine_work import CONFIG, in_half, moves, train_and_save
from ranks import on_ranks

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.export import read_weights
from training.spec import Snapshot, TrainSpec
from training.state.checkpoint_format import list_checkpoints
from training.state.float32_base import float32_weights_digest
from training.state.masters import StoredWeights, note_on
from training.state.zero import Fragment

RATE = 5e-6  # in 20 steps the whole move of 2000 cosine steps at the default rate of 1e-7
STEPS = 20


def with_(**changes) -> TrainConfig:
    return TrainConfig.model_validate(CONFIG.model_dump() | {"learning_rate": RATE} | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def fp32(base) -> dict[str, float]:
    return on_ranks(2, moves, [(with_(), True)], str(base), STEPS)[0][0]


def test_in_bf16_the_forward_pass_sees_what_is_trained_in_every_stage(base, fp32) -> None:
    """And without the float32 start it does not: the test would notice if DeepSpeed's own masters were enough."""
    configs = [(with_(precision="bf16", zero_stage=stage), True) for stage in (1, 2, 3)]
    *ours, rounded = on_ranks(2, moves, [*configs, (with_(precision="bf16"), False)], str(base), STEPS)[0]
    for stage, found in enumerate(ours, start=1):
        assert found["off"] == 0, f"stage {stage} does not start at the base"
        assert 0.95 <= found["projection"] <= 1.05, f"stage {stage}: {found}"
        assert found["gain"] == pytest.approx(fp32["gain"], rel=0.1), f"stage {stage}"
        assert found["squared"] == pytest.approx(fp32["squared"], rel=0.02), "the masters move as in float32"
    assert rounded["off"] > 1e-4
    assert rounded["projection"] < 0.6
    assert rounded["gain"] > 0.7 * fp32["gain"], "both are negative"


def test_fp16_starts_at_the_base_too(base, fp32) -> None:
    configs = [(with_(precision="fp16", zero_stage=stage), True) for stage in (2, 3)]
    for found in on_ranks(2, in_half, moves, configs, str(base), STEPS)[0]:
        assert found["off"] == 0
        assert 0.95 <= found["projection"] <= 1.05
        assert found["gain"] == pytest.approx(fp32["gain"], rel=0.1)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_bf16_training_goes_on_bit_for_bit(stage: int, base, tmp_path: Path) -> None:
    config = with_(precision="bf16", zero_stage=stage, ema={"decay": 0.9})
    whole, parts = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "parts"))
    undisturbed = on_ranks(2, train_and_save, config, str(base), whole.url, 5)[0]["curve"]
    resumed = [on_ranks(2, train_and_save, config, str(base), parts.url, step)[0]["curve"] for step in (2, 5)]
    assert [*resumed[0], *resumed[1]] == undisturbed
    for kind in ("raw", "ema"):
        expected, found = (
            read_weights(each, list_checkpoints(each, "checkpoints")[-1].folder, kind) for each in (whole, parts)
        )
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_any_fragment_of_any_stored_type_is_read_exactly(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(5, 3), "b.bias": torch.randn(7)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        file = folder / "diffusion_pytorch_model.safetensors"
        safetensors.torch.save_file({name: weight.to(dtype) for name, weight in weights.items()}, file)
        stored = StoredWeights.of(folder, None)
        assert stored.dtypes == {dtype}
        for name, weight in weights.items():
            flat = weight.to(dtype).float().flatten()
            for start, numel in ((0, len(flat)), (2, 4), (len(flat) - 1, 1), (3, 0)):
                read = stored.read(Fragment(name, start, numel, tuple(weight.shape)))
                assert read.dtype == torch.float32
                assert torch.equal(read, flat[start : start + numel])
        with pytest.raises(ModelError, match="the weight c is missing"):
            stored.read(Fragment("c", 0, 1, (1,)))
        with pytest.raises(ModelError, match=r"shape \(5, 3\)"):
            stored.read(Fragment("a.weight", 0, 1, (3, 5)))


def test_weights_in_several_files_are_one(base, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    stored = StoredWeights.of(tmp_path, None)
    for name, weight in unet.named_parameters():
        read = stored.read(Fragment(name, 0, weight.numel(), tuple(weight.shape)))
        assert np.array_equal(read.numpy(), weight.detach().flatten().numpy())


def test_a_base_of_16_bits_alone_is_said() -> None:
    assert note_on({torch.float32}) is None
    assert "stored in float16, so training starts from rounded weights" in str(note_on({torch.float16}))


def test_float32_weights_beside_a_variant_are_found_if_they_are_the_same_weights(base, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    for dtype, variant in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        folder = tmp_path / variant
        shutil.copytree(base, folder)
        source = ModelSource(str(folder), variant=variant)
        assert float32_weights_digest(ModelSource(str(folder))) is None, "they are what is configured"
        assert float32_weights_digest(source) is None, "the variant is not there"
        unet = UNet2DConditionModel.from_pretrained(base / "unet", dtype=dtype)
        unet.save_pretrained(folder / "unet", variant=variant)
        digest = float32_weights_digest(source)
        assert digest is not None
        spec = TrainSpec("/s", "run", source, "e" * 16, 0, with_(precision="bf16"), Snapshot(0, "", 0, "", 0))
        assert replace(spec, float32_digest=digest).key != spec.key
        assert replace(spec, float32_digest=digest).unet_source.variant is None
        assert replace(spec, float32_digest=digest).as_legacy().unet_source == source
        with torch.no_grad():
            for weight in unet.parameters():  # another model's weights, such as averaged ones
                weight.mul_(1.01)
        unet.save_pretrained(folder / "unet", variant=variant)
        assert float32_weights_digest(source) is None
