"""FLOPs of training, counted rather than estimated, and the peak FLOPs of a device.

The UNet is built without memory (torch's meta device) and run as in training under torch's FlopCounterMode: only
shapes are computed. FLOP = 2 x multiply-add, of matrix products, convolutions and attention; the rest is below 1 %.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from training.config import LoraConfig
from training.engine import set_gradient_checkpointing
from training.model import add_lora

NUM_TIME_IDS = 6  # of SDXL: the sizes and the crop

PEAK_TFLOPS: Mapping[str, tuple[float, float]] = {
    "GB200": (2500, 1250),
    "B200": (2250, 1100),
    "GH200": (989.5, 494.7),
    "H200 NVL": (835.5, 417.5),
    "H200": (989.5, 494.7),
    "H100 NVL": (835.5, 417.5),
    "H100 PCIE": (756, 378),
    "H100": (989.5, 494.7),
    "A100": (312, 156),
    "L40S": (362, 183),
    "A10G": (70, 35),
    "A10": (125, 62.5),
    "L4": (121, 60.5),
}
"""Words of a device's name -> dense tensor-core peak in bf16 or fp16, and in TF32; the first match counts.

Source: NVIDIA's data sheet of each product; half of the peak "with sparsity" where it gives no other.
"""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations.

    Args:
        model: What the mathematics needs: forward and backward, and the forward pass of a reference.
        hardware: What is actually computed: `model` plus the recomputation of gradient checkpointing.
    """

    model: float
    hardware: float

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.model + other.model, self.hardware + other.hardware)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.model * times, self.hardware * times)


def pair_flops(
    unet_config: Mapping[str, Any],
    height: int,
    width: int,
    tokens: int,
    method_needs_reference: bool,
    gradient_checkpointing: bool | str,
    lora: LoraConfig | None,
) -> Flops:
    """Count the FLOPs of training on one pair, forward and backward of both images; once for each shape.

    The first count takes seconds for SDXL, but neither memory nor the GPU.

    Args:
        unet_config: The UNet's `config`.
        height: Height of the latents.
        width: Width of the latents.
        tokens: Length of a prompt's embedding.
        method_needs_reference: Whether a frozen reference predicts both images too.
        gradient_checkpointing: `train.gradient_checkpointing`.
        lora: `train.lora`; frozen weights have no gradient of their own.
    """
    shape = json.dumps(dict(unet_config), sort_keys=True, default=str), height, width, tokens
    image = _trained_image_flops(*shape, gradient_checkpointing, lora)
    return (image + _predicted_image_flops(*shape) if method_needs_reference else image) * 2


def predicted_image_flops(unet_config: Mapping[str, Any], height: int, width: int, tokens: int) -> float:
    """Count the FLOPs of one prediction for one image, as a sampler makes it.

    Args:
        unet_config: The UNet's `config`.
        height: Height of the latents.
        width: Width of the latents.
        tokens: Length of a prompt's embedding.
    """
    return _predicted_image_flops(
        json.dumps(dict(unet_config), sort_keys=True, default=str), height, width, tokens
    ).model


@lru_cache(maxsize=256)
def _trained_image_flops(
    unet_config: str, height: int, width: int, tokens: int, gradient_checkpointing: bool | str, lora: LoraConfig | None
) -> Flops:
    unet = _meta_unet(unet_config)
    if lora is not None:
        with torch.device("meta"):
            add_lora(unet, lora, seed=0)
    model = _count(unet, height, width, tokens, backward=True)
    if not gradient_checkpointing:
        return Flops(model, model)
    set_gradient_checkpointing(unet, gradient_checkpointing)
    return Flops(model, _count(unet, height, width, tokens, backward=True))


@lru_cache(maxsize=256)
def _predicted_image_flops(unet_config: str, height: int, width: int, tokens: int) -> Flops:
    with torch.no_grad():
        forward = _count(_meta_unet(unet_config), height, width, tokens, backward=False)
    return Flops(forward, forward)


def _meta_unet(unet_config: str) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(json.loads(unet_config)).train()


def _inputs(unet: Any, height: int, width: int, tokens: int) -> dict[str, Any]:
    config = unet.config
    with torch.device("meta"):
        inputs: dict[str, Any] = {
            "sample": torch.empty(1, config.in_channels, height, width),
            "timestep": torch.empty(1, dtype=torch.int64),
            "encoder_hidden_states": torch.empty(1, tokens, config.cross_attention_dim),
            "return_dict": False,
        }
        if config.addition_embed_type == "text_time":
            sizes = NUM_TIME_IDS * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - sizes
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.empty(1, pooled),
                "time_ids": torch.empty(1, NUM_TIME_IDS),
            }
    return inputs


def _count(unet: Any, height: int, width: int, tokens: int, *, backward: bool) -> int:
    inputs = _inputs(unet, height, width, tokens)
    with FlopCounterMode(display=False) as counter:
        (prediction,) = unet(**inputs)
        if backward:
            prediction.sum().backward()
    unet.zero_grad()
    return int(counter.get_total_flops())


def peak_flops(device_name: str, precision: str, override_tflops: float | None) -> float | None:
    """Return the peak FLOPs per second of one device; None if unknown, as for a CPU or a part of a GPU.

    Args:
        device_name: From `torch.cuda.get_device_name`.
        precision: `train.precision`. fp32 counts as TF32, which torch's convolutions use by default.
        override_tflops: `train.peak_tflops`.
    """
    if override_tflops is not None:
        return override_tflops * 1e12
    words = re.split(r"[^A-Z0-9]+", device_name.upper())
    if "MIG" in words:
        return None
    for name, (half, tf32) in PEAK_TFLOPS.items():
        if all(word in words for word in name.split()):
            return (tf32 if precision == "fp32" else half) * 1e12
    return None


def utilization(flops: Flops, *, seconds: float, num_devices: int, peak: float | None) -> dict[str, float]:
    """Return `mfu` and `hfu`, the shares of the devices' peak that a step reached; empty if the peak is not known.

    Args:
        flops: FLOPs of all pairs of the step, over all devices.
        seconds: Duration of the step.
        num_devices: Devices that worked on it.
        peak: From `peak_flops`.
    """
    if peak is None:
        return {}
    possible = peak * seconds * num_devices
    return {"mfu": flops.model / possible, "hfu": flops.hardware / possible}
