"""Checks that training supports a base model: UNet, VAE, noise schedule and text encoders together.

A base that is not what its class says would train to the end and be ruined, or fail with a shape error after hours of
encoding. Reads configuration files and the headers of weights; needs neither ray nor torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.dataset.base_config import UNET_CLASS, VAE_CLASS
from pipelines.dataset.base_latents import LatentSpace, check_vae_weights, latent_space
from pipelines.dataset.base_schedule import check_schedule, schedule_note, short_name
from pipelines.dataset.base_text import check_text
from pipelines.dataset.base_unet import check_text_width, check_unet, check_unet_weights
from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import (
    CHOOSE_A_BASE,
    FAMILIES,
    Family,
    ModelSource,
    read_config,
    read_model_index,
)


@dataclass(frozen=True)
class BaseFacts:
    """The checked facts about a base that training needs.

    Args:
        family: The base's family.
        prediction_type: What the UNet predicts: epsilon or v_prediction.
        latents: The latent space of its VAE, or of the VAE that replaces it.
        native_side: Side of the square images that the base was last trained on, in pixels, if its files say.
        notes: Remarks for the user, one line each.
    """

    family: Family
    prediction_type: str
    latents: LatentSpace
    native_side: int | None
    notes: tuple[str, ...] = ()

    def resolution_note(self, resolution: int) -> str | None:
        """Return a remark on a resolution that is not the base's own, or None."""
        if self.native_side in (None, resolution):
            return None
        return (
            f"encode.resolution is {resolution}, but the base was trained at {self.native_side} x {self.native_side} "
            "pixels (unet.sample_size times the factor of the VAE)"
        )


def check_base(source: ModelSource, *, prediction_type: str | None = None) -> BaseFacts:
    """Check all parts of a base model together, before any work.

    Args:
        source: The base.
        prediction_type: `train.prediction_type`, which overrides its scheduler file.

    Raises:
        ModelError: A part is missing, damaged or unsupported, or does not fit another part.
    """
    folder = source.folder()
    index = read_model_index(folder)
    _check_class(index, "unet", UNET_CLASS, source.model)
    _check_class(index, "vae", VAE_CLASS, source.model)
    facts = check_denoiser(source, prediction_type=prediction_type)
    unet = read_config(folder / "unet" / "config.json")
    widths = check_text(folder, index, facts.family, model=source.model, variant=source.variant)
    check_text_width(unet, widths, facts.family, source.model)
    check_vae_weights(source, facts.latents)
    return facts


def check_denoiser(source: ModelSource, *, prediction_type: str | None = None) -> BaseFacts:
    """Check the parts that training itself reads: the UNet and its weights, the noise schedule, the latents' scale.

    Args:
        source: The base.
        prediction_type: `train.prediction_type`, which overrides its scheduler file.

    Raises:
        ModelError: See `check_base`.
    """
    folder = source.folder()
    index = read_model_index(folder)
    family = FAMILIES[index["_class_name"]]
    unet = read_config(folder / "unet" / "config.json")
    schedule = read_config(folder / "scheduler" / "scheduler_config.json")
    latents = latent_space(source, family)
    check_unet(unet, family, latents.channels, source.model)
    check_unet_weights(folder / "unet", unet, source)
    names = [source.model, *(str(each["_name_or_path"]) for each in (index, unet) if each.get("_name_or_path"))]
    predicted = check_schedule(
        schedule,
        model=source.model,
        pipeline_scheduler=(index.get("scheduler") or (None, None))[1],
        names=list(dict.fromkeys(short_name(name) for name in names)),
        prediction_type=prediction_type,
    )
    note = schedule_note(schedule)
    side = unet.get("sample_size")
    side = max(side) if isinstance(side, list) and side and all(type(each) is int for each in side) else side
    native_side = side * latents.factor if type(side) is int else None
    return BaseFacts(family, predicted, latents, native_side, () if note is None else (note,))


def _check_class(index: Mapping[str, Any], part: str, expected: str, model: str) -> None:
    found = (index.get(part) or (None, None))[1]
    if found != expected:
        raise ModelError(f"the {part} of {model} is {found}, not {expected}", CHOOSE_A_BASE)
