"""What the drawing of an evaluation will take, said before it begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pipelines.dataset.model_files import read_config
from pipelines.samples.drawing import Sampling

if TYPE_CHECKING:
    from pipelines.dataset.model_files import ModelSource
    from pipelines.samples.drawing import Drawing
    from pipelines.suites.suite import Suite

TOKENS = 77
VAE_FACTOR = 8
DECODE_FLOPS = 10e12
"""Of SDXL's VAE at 1024 x 1024."""
REFERENCE_FLOPS_PER_S = 0.40 * 788e12
"""An H200 at 40 % of the matrix products that were measured on it: between plain diffusers and a compiled pipeline."""
UNET_CONFIG = "unet/config.json"


def gpu_hours(drawings: Mapping[str, Drawing], missing: Mapping[str, int]) -> float:
    """Estimate the hours that one H200 would take, from the FLOPs of UNet and VAE.

    Args:
        drawings: One drawing for each fingerprint.
        missing: Number of samples to draw of each.
    """
    wanted = {name: drawing for name, drawing in drawings.items() if missing[name]}
    total = sum(
        missing[name] * sample_flops(unet_of(each.model.source), each.sampling) for name, each in wanted.items()
    )
    return _hours(total)


def unet_of(source: ModelSource) -> Mapping[str, Any]:
    """Return the configuration of a fetched base's UNet."""
    return read_config(source.folder() / UNET_CONFIG)


def sample_flops(unet: Mapping[str, Any], sampling: Sampling) -> float:
    """Return the FLOPs of one sample.

    Args:
        unet: The configuration of the UNet.
        sampling: The settings of the sampler.
    """
    from training.flops import predicted_image_flops

    one = predicted_image_flops(unet, sampling.height // VAE_FACTOR, sampling.width // VAE_FACTOR, TOKENS)
    passes = sampling.num_inference_steps * (2 if sampling.guidance_scale > 1 else 1)
    return passes * one + DECODE_FLOPS * sampling.height * sampling.width / 1024**2


def bounded_hours(source: ModelSource, suites: Iterable[Suite], side: int) -> float | None:
    """Estimate the hours that one H200 would take for all samples of one model; None if the base is not here.

    Args:
        source: The base.
        suites: The suites, as they are drawn.
        side: Side of the samples of a suite that leaves it open, in pixels.
    """
    if not source.is_fetched():
        return None
    unet, total = unet_of(source), 0.0
    for suite in suites:
        height = width = suite.resolution or side
        sampling = Sampling(suite.num_inference_steps, suite.guidance_scale, height, width)
        total += len(suite.prompts) * suite.images_per_prompt * sample_flops(unet, sampling)
    return _hours(total)


def _hours(flops: float) -> float:
    return flops / REFERENCE_FLOPS_PER_S / 3600


def cost_line(num_units: int, hours: float) -> str:
    """Say what drawing would take."""
    units = f"{num_units:,} unit{'s' if num_units != 1 else ''}"
    return f"about {hours:.3g} GPU hours on an H200 to draw, in {units}"
