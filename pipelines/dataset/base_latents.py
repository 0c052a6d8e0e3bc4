"""Checks of a base model's VAE: which latents it makes, and whether training and drawing scale them alike."""

import math
from dataclasses import dataclass
from typing import Any

from pipelines.dataset.base_config import OTHER_CONFIG, STEM, VAE_CLASS, WAY_OUT, whole_number, whole_numbers
from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import CHOOSE_A_BASE, SDXL, Family, ModelSource, read_config, weight_files
from pipelines.dataset.safetensors_header import tensor_shapes
from pipelines.dataset.values import JsonObject

SD_SCALING_FACTOR = 0.18215  # diffusers' default, for old VAE configurations that do not say


@dataclass(frozen=True)
class LatentSpace:
    """The latents of a VAE, and how they are scaled for the UNet.

    Args:
        channels: C.
        factor: Pixels per latent along each side.
        scaling_factor: The UNet's latents are the VAE's times this.
        mean: Per channel, subtracted before scaling; None for most VAEs.
        std: Per channel, a divisor after scaling; set if `mean` is.
    """

    channels: int
    factor: int
    scaling_factor: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def latent_space(source: ModelSource, family: Family) -> LatentSpace:
    """Return the latent space of the pipeline's own VAE, or of another VAE with the same one.

    Raises:
        ModelError: The pipeline would scale these latents for the UNet differently from training, or the other VAE
            belongs to another family.
    """
    config = read_config(source.vae_folder() / "config.json")
    where = source.model if source.vae is None else source.vae
    found = _read_latent_space(config, family, where)
    own = source.folder() / "vae" / "config.json"
    if source.vae is None or not own.is_file():
        return found
    expected = _read_latent_space(read_config(own), family, source.model)
    for key in ("channels", "factor", "scaling_factor", "mean", "std"):
        ours, theirs = getattr(found, key), getattr(expected, key)
        if ours != theirs:
            raise ModelError(
                f"encode.vae {where} has different latents from the VAE that {source.model} was trained with: {key} is "
                f"{ours}, not {theirs}",
                "set `encode.vae` to a VAE of the base's own family, or leave it out",
            )
    return found


def _read_latent_space(config: JsonObject, family: Family, where: str) -> LatentSpace:
    if (kind := config.get("_class_name", VAE_CLASS)) != VAE_CLASS:
        raise ModelError(
            f"the VAE of {where} is a {kind}, not an {VAE_CLASS}", "set `encode.vae` to a VAE of the base's own family"
        )
    channels = whole_number(config, "latent_channels", 4, "vae", where)
    if config.get("shift_factor"):
        raise ModelError(
            f"vae.shift_factor of {where} is {config['shift_factor']}, which {family.pipeline_class} ignores when "
            "sampling",
            CHOOSE_A_BASE,
        )
    scale = config.get("scaling_factor", SD_SCALING_FACTOR)
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ModelError(f"vae.scaling_factor of {where} is {scale}, not a positive number", WAY_OUT)
    statistics = {key: config.get(key) for key in ("latents_mean", "latents_std")}
    factor = 2 ** (len(whole_numbers(config, "block_out_channels", [0], "vae", where)) - 1)
    if statistics == dict.fromkeys(statistics):
        return LatentSpace(channels, factor, float(scale))
    if family is not SDXL:
        raise ModelError(
            f"vae.latents_mean and latents_std of {where} are set, but {family.pipeline_class} ignores them when "
            "sampling",
            f"{CHOOSE_A_BASE}; or remove them from vae/config.json, if the UNet was trained without them",
        )
    found = {key: _per_channel(values, channels, key, where) for key, values in statistics.items()}
    if channels != 4:
        raise ModelError(
            f"vae.latents_mean of {where} has {channels} channels, but {family.pipeline_class} samples with 4",
            CHOOSE_A_BASE,
        )
    if min(found["latents_std"]) <= 0:
        raise ModelError(f"vae.latents_std of {where} is {list(found['latents_std'])}, not positive", WAY_OUT)
    return LatentSpace(channels, factor, float(scale), found["latents_mean"], found["latents_std"])


def _per_channel(values: Any, channels: int, key: str, where: str) -> tuple[float, ...]:
    is_one_each = isinstance(values, list) and len(values) == channels
    if not is_one_each or not all(type(each) in (int, float) and math.isfinite(each) for each in values):
        raise ModelError(f"vae.{key} of {where} is {values}, not a number for each of {channels} channels", WAY_OUT)
    return tuple(map(float, values))


def check_vae_weights(source: ModelSource, latents: LatentSpace) -> None:
    """Check that the VAE's weights make the latents that its configuration describes."""
    where = source.model if source.vae is None else source.vae
    shapes = tensor_shapes(weight_files(source.vae_folder(), STEM, source.vae_variant))
    for name, axis, count in (("decoder.conv_in.weight", 1, 1), ("encoder.conv_out.weight", 0, 2)):
        if name not in shapes:
            raise ModelError(f"{name} is missing from the weights of the VAE of {where}", WAY_OUT)
        if shapes[name][axis] != count * latents.channels:
            raise ModelError(
                f"vae.latent_channels of {where} is {latents.channels}, but {name} has the shape "
                f"{list(shapes[name])}: config.json does not belong to these weights",
                OTHER_CONFIG,
            )
