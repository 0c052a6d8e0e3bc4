"""Fingerprints of everything that shapes encoded numbers: one for latents, one for text embeddings.

They depend on content, never on a path: a copied model has the same fingerprint, and one changed byte of its weights
gives another. The driver needs them at every start, so neither ray, torch nor diffusers is imported here.
"""

import hashlib
import json

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import (
    CHOOSE_A_BASE,
    FAMILIES,
    SDXL,
    file_digests,
    read_config,
    read_model_index,
    weight_files,
)
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject
from pipelines.encode.geometry import bucket_list

LATENTS_VERSION = 2  # raise it when the same images, model and settings would give other latents
TEXT_VERSION = 1  # the same for prompts

NOTE = "fingerprint.json"


def latents_fingerprint(config: EncodeConfig) -> str:
    """Return 32 hex digits that name everything that shapes a latent, except the image.

    Raises:
        ModelError: The VAE is missing, damaged or of another class.
    """
    return fingerprint_of(latents_parts(config))


def text_fingerprint(config: EncodeConfig) -> str:
    """Return 32 hex digits that name everything that shapes a text embedding, except the prompt.

    Raises:
        ModelError: A text encoder or tokenizer is missing, damaged or of another class.
    """
    return fingerprint_of(text_parts(config))


def fingerprint_of(parts: JsonObject) -> str:
    """Return a hash of the canonical JSON of `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def note_parts(storage: Storage, folder: str, parts: JsonObject) -> None:
    """Write the parts of a fingerprint next to its table, for people and for `stale`.

    Args:
        storage: The data set's storage.
        folder: LATENTS or TEXT.
        parts: The parts that `fingerprint_of` hashes.
    """
    name = f"{folder}/{fingerprint_of(parts)}/{NOTE}"
    if not storage.exists(name):
        storage.write(name, json.dumps(parts, indent=2, sort_keys=True).encode() + b"\n")


def noted_parts(storage: Storage, folder: str, fingerprint: str) -> JsonObject:
    """Read the parts written by `note_parts`; return an empty object if there are none."""
    name = f"{folder}/{fingerprint}/{NOTE}"
    return dict(json.loads(storage.read_if_there(name) or b"{}"))


def latents_parts(config: EncodeConfig) -> JsonObject:
    """Return the parts that `latents_fingerprint` hashes."""
    read_model_index(config.source.folder())
    folder = config.source.vae_folder()
    found = read_config(folder / "config.json").get("_class_name")
    if found != "AutoencoderKL":
        raise ModelError(
            f"the VAE {folder} is a {found}, not an AutoencoderKL", "set `encode.vae` to a VAE of the base's own family"
        )
    weights = weight_files(folder, "diffusion_pytorch_model", config.source.vae_variant)
    flips = {"flips": True} if config.flips else {}  # latents of before have no such part
    return flips | {
        "kind": "latents",
        "version": LATENTS_VERSION,
        "dtype": config.dtype,
        "vae_dtype": config.vae_dtype,
        "resolution": config.resolution,
        "buckets": [list(bucket) for bucket in bucket_list(config.resolution, config.buckets)],
        "vae": file_digests([folder / "config.json", *weights]),
    }


def text_parts(config: EncodeConfig) -> JsonObject:
    """Return the parts that `text_fingerprint` hashes. For SDXL, the first family, they do not name the family."""
    folder = config.source.folder()
    index = read_model_index(folder)
    family = FAMILIES[index["_class_name"]]
    parts: JsonObject = {"kind": "text", "version": TEXT_VERSION, "dtype": config.dtype}
    if config.prompt_chunks > 1:  # embeddings of before have no such part
        parts["prompt_chunks"] = config.prompt_chunks
    if family is SDXL:
        parts["force_zeros_for_empty_prompt"] = bool(index.get("force_zeros_for_empty_prompt", True))
    else:
        parts["pipeline"] = family.pipeline_class
    for name, expected in family.text_encoders.items():
        kind = (index.get(name) or [None, None])[1]
        if kind != expected:
            raise ModelError(f"the {name} of {folder} is {kind}, not {expected}", CHOOSE_A_BASE)
        parts[name] = file_digests(
            [folder / name / "config.json", *weight_files(folder / name, "model", config.variant)]
        )
    for name in family.tokenizers:
        files = sorted(file for file in (folder / name).glob("*") if file.is_file())
        if not files:
            raise ModelError(f"{folder / name} is missing", "the model folder is incomplete; fetch it again")
        parts[name] = file_digests(files)
    return parts
