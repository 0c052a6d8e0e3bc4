"""What the drawing of an evaluation will take, said before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.dataset.model_files import read_config

if TYPE_CHECKING:
    from pipelines.samples.drawing import Drawing

TOKENS = 77
VAE_FACTOR = 8
DECODE_FLOPS = 10e12
"""Of SDXL's VAE at 1024 x 1024."""
REFERENCE_FLOPS_PER_S = 0.35 * 989.5e12
"""An H200 at 35 % of its peak, as plain diffusers reaches in 16 bits."""


def gpu_hours(drawings: Mapping[str, Drawing], missing: Mapping[str, int]) -> float:
    """Estimate the hours that one H200 would take, from the FLOPs of UNet and VAE.

    Args:
        drawings: One drawing for each fingerprint.
        missing: Number of samples to draw of each.
    """
    total = sum(missing[name] * _sample_flops(drawing) for name, drawing in drawings.items() if missing[name])
    return total / REFERENCE_FLOPS_PER_S / 3600


def _sample_flops(drawing: Drawing) -> float:
    from training.flops import predicted_image_flops

    sampling = drawing.sampling
    config: Mapping[str, Any] = read_config(drawing.model.source.folder() / "unet" / "config.json")
    one = predicted_image_flops(config, sampling.height // VAE_FACTOR, sampling.width // VAE_FACTOR, TOKENS)
    passes = sampling.num_inference_steps * (2 if sampling.guidance_scale > 1 else 1)
    return passes * one + DECODE_FLOPS * sampling.height * sampling.width / 1024**2
