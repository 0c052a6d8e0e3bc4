"""Loads the diffusers pipeline of a model to draw with, directly in its type, and checks that no weight is missing."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import SDXL, STABLE_DIFFUSION, read_family
from pipelines.encode.encoders import check_complete, loading, quiet_diffusers
from pipelines.samples.drawing import DrawnModel
from pipelines.samples.overlays import lora_file, unet_folder

LORA_MARKS = ("lora_A.", "lora_B.", "lora_down.", "lora_up.", "lora.down.", "lora.up.", "lora_linear_layer.")
"""In the names of a LoRA's matrices, in the forms that diffusers reads; the rest are scales."""
UNWANTED: dict[str, dict[str, Any]] = {
    SDXL.pipeline_class: {"add_watermarker": False},
    STABLE_DIFFUSION.pipeline_class: {
        "safety_checker": None,  # it would paint samples black, and scores would be the checker's
        "feature_extractor": None,
        "requires_safety_checker": False,
    },
}
"""Arguments that leave out what changes a finished sample."""


def load_pipeline(model: DrawnModel, dtype: str, device: torch.device) -> Any:
    """Load a pipeline with its replaced parts, in evaluation mode.

    Every part is read in `dtype` from the start, so that no copy of another type is ever in memory.

    Args:
        model: The pipeline, perhaps with another VAE, UNet, LoRA or prediction type.
        dtype: float32, bfloat16 or float16.
        device: Where it computes.

    Raises:
        ModelError: A part is missing, damaged, or lacks weights.
    """
    quiet_diffusers()
    import diffusers
    import transformers

    source, kind = model.source, getattr(torch, dtype)
    folder = source.folder()
    family = read_family(folder)
    parts = dict(UNWANTED[family.pipeline_class])
    for name, encoder in family.text_encoders.items():
        parts[name] = _load_part(name, getattr(transformers, encoder), folder / name, kind, source.variant)
    vae = diffusers.AutoencoderKL
    parts["vae"] = _load_part("VAE", vae, source.vae_folder(), kind, source.vae_variant)
    replaced = unet_folder(model)
    unet = (folder / "unet", source.variant) if replaced is None else (replaced, model.unet_variant)
    parts["unet"] = _load_part("UNet", diffusers.UNet2DConditionModel, unet[0], kind, unet[1])
    with loading("pipeline", folder):
        pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(folder, dtype=kind, **parts)
    if model.prediction_type is not None:
        schedule = pipeline.scheduler
        pipeline.scheduler = type(schedule).from_config(schedule.config, prediction_type=model.prediction_type)
    if (file := lora_file(model)) is not None:
        _load_lora(pipeline, file)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", *family.text_encoders):
        getattr(pipeline, name).eval().requires_grad_(False)
    return pipeline.to(device, kind)


def _load_part(name: str, kind: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    """Load one model of the pipeline."""
    with loading(name, folder):
        part, info = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, variant=variant, output_loading_info=True
        )
    check_complete(name, folder, info)
    return part


def _load_lora(pipeline: Any, file: Path) -> None:
    """Load a LoRA into the UNet and the text encoders; diffusers only warns about matrices that fit nowhere."""
    with loading("LoRA", file):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        with safe_open(file, "pt") as opened:
            num_stored = sum(any(mark in name for mark in LORA_MARKS) for name in opened.keys())  # noqa: SIM118
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    num_loaded = sum("lora_A." in name or "lora_B." in name for part in parts for name, _ in part.named_parameters())
    if num_loaded < max(1, num_stored):
        raise ModelError(
            f"only {num_loaded:,} of the {num_stored:,} matrices of the LoRA {file} fit the pipeline",
            "use it with the base that it was trained for",
        )
