"""The fingerprint of everything that shapes a sample, except its text and its noise.

It depends on content, never on a path, and is needed at every start: neither ray, torch nor diffusers is imported here.
"""

from pathlib import Path

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import (
    FAMILIES,
    MODEL_INDEX,
    Family,
    file_digests,
    read_model_index,
    weight_files,
)
from pipelines.dataset.values import JsonObject
from pipelines.encode.fingerprint import fingerprint_of
from pipelines.samples.drawing import DrawnModel, Sampling
from pipelines.samples.overlays import lora_digest, unet_folder

SAMPLES_VERSION = 1  # raise it when the same text, noise, model and settings would give another sample

CONFIG = "config.json"
DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model", "model"


def samples_fingerprint(model: DrawnModel, sampling: Sampling) -> str:
    """Return 32 hex digits that name everything that shapes a sample, except its text and its noise.

    Raises:
        ModelError: A part of the model is missing, damaged or of another class.
    """
    return fingerprint_of(samples_parts(model, sampling))


def samples_parts(model: DrawnModel, sampling: Sampling) -> JsonObject:
    """Return the parts that `samples_fingerprint` hashes: the settings, and the digest of every file of the model."""
    return {
        "kind": "samples",
        "version": SAMPLES_VERSION,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": float(sampling.guidance_scale),
        "negative_prompt": sampling.negative_prompt,
        "height": sampling.height,
        "width": sampling.width,
        "dtype": sampling.dtype,
        "prediction_type": model.prediction_type,
        "model": _named_parts(model),
    }


def _named_parts(model: DrawnModel) -> JsonObject:
    """Digest the model's files; an error names the model, for there may be several."""
    try:
        return _model_parts(model)
    except ModelError as error:
        raise ModelError(f"{model.name}: {error.message}", error.hint) from error


def _model_parts(model: DrawnModel) -> JsonObject:
    """Digest the model's files; `identity` stands for what lies over the pipeline, or else for the pipeline itself."""
    has_overlay = model.unet is not None or model.lora is not None
    parts: JsonObject = {} if model.identity is None else {"identity": model.identity}
    if model.identity is None or has_overlay:
        parts |= _pipeline_parts(model)
    elif model.source.vae is not None:
        parts["vae"] = _vae_digests(model)
    if model.identity is None and model.unet is not None:
        folder = unet_folder(model)
        assert folder is not None
        parts["unet"] = _digests(folder, DIFFUSERS_WEIGHTS, model.unet_variant)
    if model.identity is None and model.lora is not None:
        parts["lora"] = lora_digest(model)
    return parts


def _pipeline_parts(model: DrawnModel) -> JsonObject:
    """Digest the files of the pipeline; its UNet only if no other one replaces it."""
    source = model.source
    folder = source.folder()
    family = FAMILIES[read_model_index(folder)["_class_name"]]
    parts: JsonObject = {
        "index": file_digests([folder / MODEL_INDEX]),
        "scheduler": file_digests([folder / "scheduler" / "scheduler_config.json"]),
        "vae": _vae_digests(model),
        **_text_parts(folder, family, source.variant),
    }
    if model.unet is None:
        parts["unet"] = _digests(folder / "unet", DIFFUSERS_WEIGHTS, source.variant)
    return parts


def _text_parts(folder: Path, family: Family, variant: str | None) -> JsonObject:
    """Digest text encoders and tokenizers."""
    parts: JsonObject = {name: _digests(folder / name, TRANSFORMERS_WEIGHTS, variant) for name in family.text_encoders}
    for name in family.tokenizers:
        files = sorted(file for file in (folder / name).glob("*") if file.is_file())
        if not files:
            raise ModelError(f"{folder / name} is missing", "the model folder is incomplete; fetch it again")
        parts[name] = file_digests(files)
    return parts


def _vae_digests(model: DrawnModel) -> dict[str, str]:
    return _digests(model.source.vae_folder(), DIFFUSERS_WEIGHTS, model.source.vae_variant)


def _digests(part: Path, stem: str, variant: str | None) -> dict[str, str]:
    """Return the digests of a part's configuration and weights."""
    weights = weight_files(part, stem, variant)
    config = part / CONFIG
    if not config.is_file():
        raise ModelError(f"{config} is missing", "the model folder is incomplete; fetch it again")
    return file_digests([config, *weights])
