"""Arithmetic, counted: against numbers worked out by hand, a real pass on the CPU, and SDXL's published ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from encoded import EMBEDDING, POOLED, TOKENS, write_base
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.config import LoraConfig
from training.engine import set_gradient_checkpointing
from training.flops import Flops, pair_flops, peak_flops, utilization

SDXL = Path(__file__).parents[3] / "shared" / "sdxl" / "unet" / "config.json"
FORWARD, TRAINED = 6_761_236_398_080, 20_230_842_449_920  # of one image of 1024 x 1024: 6.76 and 20.23 TFLOP


@pytest.fixture(scope="module")
def unet_config(tmp_path_factory) -> dict[str, Any]:
    base = write_base(tmp_path_factory.mktemp("base"))
    return json.loads((base / "unet" / "config.json").read_text())


def counted(config: dict[str, Any], height: int = 8, width: int = 8, **changes: Any) -> Flops:
    settings = {"method_needs_reference": False, "gradient_checkpointing": False, "lora": None}
    return pair_flops(config, height, width, TOKENS, **(settings | changes))


def on_the_cpu(config: dict[str, Any], *, gradient_checkpointing: bool) -> int:
    """What torch counts while a pair is really trained on."""
    unet: Any = UNet2DConditionModel.from_config(config)
    unet.train()
    set_gradient_checkpointing(unet, gradient_checkpointing)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        prediction = unet(
            torch.randn(2, 4, 8, 8),
            torch.tensor([3, 3]),
            encoder_hidden_states=torch.randn(2, TOKENS, EMBEDDING),
            added_cond_kwargs={"text_embeds": torch.randn(2, POOLED), "time_ids": torch.zeros(2, 6)},
        ).sample
        prediction.square().mean().backward()
    return counter.get_total_flops()


def test_the_count_is_that_of_a_real_pass(unet_config) -> None:
    flops = counted(unet_config, gradient_checkpointing=True)
    assert flops.model == on_the_cpu(unet_config, gradient_checkpointing=False)
    assert flops.hardware == on_the_cpu(unet_config, gradient_checkpointing=True)


def test_attention_is_counted(unet_config) -> None:
    """Only self-attention grows with the square of the area: 2 layers of 32 channels at half the resolution."""
    by_area = [counted(unet_config, height, 8, method_needs_reference=True).model for height in (8, 16, 24)]
    without = [counted(unet_config, height, 8).model for height in (8, 16, 24)]
    forward = [(a - b) / 2 for a, b in zip(by_area, without, strict=True)]
    layer = 4 * 32 / 4**2  # queries by keys, and weights by values: 2 * 2 * channels * tokens^2; tokens = area / 4
    assert forward[2] - 2 * forward[1] + forward[0] == 2 * layer * 2 * 64**2


def test_parts_of_checkpointing_add_up_to_all_of_it(unet_config) -> None:
    whole, resnets, transformers = (
        counted(unet_config, gradient_checkpointing=mode) for mode in (True, "resnets", "transformers")
    )
    assert whole.model == resnets.model == transformers.model
    again = [flops.hardware - flops.model for flops in (whole, resnets, transformers)]
    assert again[0] == again[1] + again[2]
    assert min(again) > 0
    assert again[0] < whole.model / 3


def test_adapters_cost_by_their_rank_and_frozen_weights_have_no_gradient(unet_config) -> None:
    everything = counted(unet_config, method_needs_reference=True)
    forward = everything.model - counted(unet_config).model
    by_rank = [counted(unet_config, lora=LoraConfig(rank=rank)).model for rank in (4, 8, 12)]
    assert by_rank[2] - by_rank[1] == by_rank[1] - by_rank[0] > 0
    frozen = 2 * by_rank[0] - by_rank[1]
    assert 1.5 * forward < frozen < 2 * forward  # what lies before the first adapter has no backward pass at all


def test_a_unet_without_time_ids_is_counted(unet_config) -> None:
    changes = {"addition_embed_type": None, "addition_time_embed_dim": None}
    plain = unet_config | changes | {"projection_class_embeddings_input_dim": None}
    assert 0 < counted(plain).model < counted(unet_config).model


@pytest.mark.skipif(not SDXL.exists(), reason="SDXL's configuration lies beside the repository")
def test_sdxl_has_its_known_numbers() -> None:
    flops = pair_flops(json.loads(SDXL.read_text()), 128, 128, 77, True, False, None)
    assert flops == Flops(2 * (FORWARD + TRAINED), 2 * (FORWARD + TRAINED))


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 156),
        ("NVIDIA H100 80GB HBM3", 989.5, 494.7),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H200", 989.5, 494.7),
        ("NVIDIA B200", 2250, 1100),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA L4", 121, 60.5),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA A10", 125, 62.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA GeForce RTX 4090", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_are_of_the_device_that_is_named(name: str, bf16: float | None, fp32: float | None) -> None:
    for precision, tflops in (("bf16", bf16), ("fp16", bf16), ("fp32", fp32)):
        assert peak_flops(name, precision, None) == (None if tflops is None else tflops * 1e12)
        assert peak_flops(name, precision, 50.0) == 50e12


def test_utilization_is_the_share_of_all_devices() -> None:
    step = Flops(model=3e12, hardware=4e12) * 10
    assert utilization(step, seconds=2.0, num_devices=4, peak=10e12) == {"mfu": 0.375, "hfu": 0.5}
    assert utilization(step, seconds=2.0, num_devices=4, peak=None) == {}
