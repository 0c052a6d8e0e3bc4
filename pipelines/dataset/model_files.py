"""A base model as a folder of files: found, fetched and checked, without loading a tensor.

Pipelines and training read their parts of one diffusers pipeline, of one of the FAMILIES. Only safetensors are
accepted: other weights are pickles, which run code when they are opened.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_fetch import HUB_ID, fetch_folder, fetch_from_hub, is_fetched
from pipelines.dataset.safetensors_header import check_safetensors
from pipelines.dataset.storage import file_sha256
from pipelines.dataset.values import JsonObject

MODEL_INDEX = "model_index.json"
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of single-file checkpoints, as published by the original repositories and Civitai."""
HASHERS = 8


@dataclass(frozen=True)
class Family:
    """A family of base models: the facts that are not in a model's files."""

    pipeline_class: str
    """The pipeline's class in diffusers, as in `model_index.json`."""
    title: str
    text_encoders: dict[str, str]
    """Part -> its class in transformers."""
    tokenizers: tuple[str, ...]
    not_for_text: tuple[str, ...]
    """Parts that are not needed to embed a prompt."""
    has_pooled: bool
    """Whether a prompt also has a pooled embedding, which the UNet takes together with the time ids."""


SDXL = Family(
    "StableDiffusionXLPipeline",
    "SDXL",
    {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
    ("tokenizer", "tokenizer_2"),
    ("unet", "vae", "scheduler"),
    has_pooled=True,
)
STABLE_DIFFUSION = Family(
    "StableDiffusionPipeline",
    "Stable Diffusion 1.x and 2.x",
    {"text_encoder": "CLIPTextModel"},
    ("tokenizer",),
    ("unet", "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder"),
    has_pooled=False,
)
FAMILIES = {family.pipeline_class: family for family in (SDXL, STABLE_DIFFUSION)}
CHOOSE_A_BASE = f"choose a base of {' or of '.join(family.title for family in FAMILIES.values())}"


@dataclass(frozen=True)
class ModelSource:
    """A base model by name: where it is, and which of its files are used.

    Args:
        model: A folder, an fsspec URL of one, or a hub id.
        vae: A VAE that replaces the pipeline's own: its folder, URL or hub id, or a local pipeline that has one.
        revision: Branch, tag or commit, if `model` is a hub id.
        variant: Variant of the pipeline's weights, such as fp16; the plain ones by default, and for a separate VAE.
    """

    model: str
    vae: str | None = None
    revision: str | None = None
    variant: str | None = None

    def folder(self) -> Path:
        """Return the local folder of the pipeline, which is fetched first if it is remote.

        Raises:
            ModelError: There is no such pipeline, or it cannot be fetched.
        """
        return resolve_model(self.model, revision=self.revision, variant=self.variant)

    def vae_folder(self) -> Path:
        """Return the folder of the VAE: the pipeline's own, or the one that replaces it.

        Raises:
            ModelError: See `folder`.
        """
        if self.vae is None:
            return self.folder() / "vae"
        separate = Path(self.vae).expanduser()
        if separate.is_dir() and (separate / MODEL_INDEX).is_file():
            return resolve_model(self.vae) / "vae"
        return resolve_model(self.vae, marker="config.json")

    def is_fetched(self) -> bool:
        """Return whether the pipeline and the VAE are on this machine, so that `folder` and `vae_folder` fetch nothing.

        Raises:
            ModelError: A URL cannot be listed.
        """
        if not is_fetched(self.model, self.revision, self.variant):
            return False
        return self.vae is None or is_fetched(self.vae, None, None)

    @property
    def vae_variant(self) -> str | None:
        """The variant of the VAE's weights."""
        return self.variant if self.vae is None else None


def resolve_model(
    model: str, marker: str = MODEL_INDEX, *, revision: str | None = None, variant: str | None = None
) -> Path:
    """Return the local folder of a model, which is fetched first if it is remote.

    Args:
        model: A folder, an fsspec URL of one, or a hub id.
        marker: The file that such a folder must contain.
        revision: Branch, tag or commit of a hub id.
        variant: The variant of the weights to fetch.

    Raises:
        ModelError: There is no such folder, it cannot be fetched, or it does not contain `marker`.
    """
    is_url, path = "://" in model, Path(model).expanduser()
    is_there = not is_url and path.exists()
    if revision is not None and (is_url or is_there):
        raise ModelError(
            f"{model} has no revision {revision}: only models on the hub have revisions",
            "remove `encode.revision`, or give a hub id as `encode.model`",
        )
    if path.suffix.lower() in SINGLE_FILES and not path.is_dir():
        raise ModelError(_single_file(model, is_there=is_there or is_url), _turn_into_folder(model, marker))
    folder = _find_folder(model, revision, variant)
    if not (folder / marker).is_file():
        raise ModelError(
            f"{model} has no {marker}",
            "give a folder written by `save_pretrained`; " + _turn_into_folder("FILE.safetensors", marker),
        )
    return folder


def _find_folder(model: str, revision: str | None, variant: str | None) -> Path:
    """Return the folder of a model: a local one, or one fetched from a URL or the hub."""
    path = Path(model).expanduser()
    if "://" in model:
        return fetch_folder(model, variant)
    if path.is_dir():
        return path.resolve()
    if HUB_ID.fullmatch(model) and not path.exists():
        return fetch_from_hub(model, revision, variant)
    raise ModelError(
        f"there is no model folder {path.absolute()}",
        "set `encode.model` to the folder, fsspec URL or hub id of a pipeline that diffusers saved",
    )


def _single_file(model: str, *, is_there: bool) -> str:
    if is_there:
        return f"{model} is a single-file checkpoint, not the folder of a pipeline that diffusers saved"
    return f"there is no file {Path(model).expanduser().absolute()}, and single-file checkpoints cannot be read anyway"


def _turn_into_folder(file: str, marker: str) -> str:
    """Explain how to convert a single-file checkpoint to a folder."""
    kind, key = (SDXL.pipeline_class, "encode.model") if marker == MODEL_INDEX else ("AutoencoderKL", "encode.vae")
    name = Path(file).stem
    other = f" ({STABLE_DIFFUSION.pipeline_class} for Stable Diffusion 1.x and 2.x)" if marker == MODEL_INDEX else ""
    return (
        "convert a single-file checkpoint to a folder once, with diffusers: "
        f'`{kind}.from_single_file("{file}").save_pretrained("{name}")`{other}; then set `{key}: {name}`'
    )


def read_model_index(folder: Path) -> JsonObject:
    """Read the `model_index.json` of a pipeline of one of the families.

    Raises:
        ModelError: The file is missing, damaged or of another pipeline class.
    """
    index = read_config(folder / MODEL_INDEX)
    if (found := str(index.get("_class_name"))) not in FAMILIES:
        raise ModelError(f"{folder} is a {found}, not a {' or a '.join(FAMILIES)}", CHOOSE_A_BASE)
    family = FAMILIES[found]
    for part in ("unet", "vae", "scheduler", *family.text_encoders, *family.tokenizers):
        kind = index.get(part)
        if kind is not None and not (isinstance(kind, list) and len(kind) == 2):
            raise ModelError(
                f"`{part}` in {folder / MODEL_INDEX} is {kind!r}, not a library and a class", "fetch the model again"
            )
    return index


def read_family(folder: Path) -> Family:
    """Return the family of a pipeline.

    Raises:
        ModelError: It belongs to none of the families.
    """
    return FAMILIES[read_model_index(folder)["_class_name"]]


def read_config(file: Path) -> JsonObject:
    """Read a JSON configuration file of a model.

    Raises:
        ModelError: The file is missing or not valid JSON.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}", "the model folder is incomplete; fetch it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} is not a JSON object", "the model folder is damaged; fetch it again")
    return found


def weight_files(part: Path, stem: str, variant: str | None = None) -> list[Path]:
    """List the safetensors files of one part, and its index if there are several; check each header.

    Args:
        part: The part's folder, such as `<model>/vae`.
        stem: `model` for transformers, `diffusion_pytorch_model` for diffusers.
        variant: The variant, such as fp16 in names like `model.fp16.safetensors`.

    Raises:
        ModelError: The files are missing, of another format, or truncated.
    """
    of_variant = "" if variant is None else f".{variant}"
    index = part / f"{stem}.safetensors.index{of_variant}.json"
    has_index = index.is_file()
    names = _names_in_index(index) if has_index else [f"{stem}{of_variant}.safetensors"]
    files = [part / name for name in names]
    for file in files:
        if not file.is_file():
            others = sorted(found.name for found in part.glob("*") if found.suffix in (".bin", ".safetensors", ".pth"))
            raise ModelError(
                f"{file} is missing" + (f"; the folder contains {', '.join(others)}" if others else ""),
                "mapo reads only safetensors, of the variant `encode.variant` or without one: load the pipeline with "
                "diffusers once and save it with `save_pretrained`",
            )
        check_safetensors(file)
    return [index, *files] if has_index else files


def _names_in_index(index: Path) -> list[str]:
    """Return the names of the files that an index of weights lists, sorted.

    Raises:
        ModelError: The index lists no files.
    """
    mapped = read_config(index).get("weight_map", {})
    if not isinstance(mapped, dict) or not all(isinstance(name, str) for name in mapped.values()):
        raise ModelError(f"{index} does not say which file holds which weight", "fetch the model again")
    return sorted(set(mapped.values()))


def file_digests(files: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of every file by its name; unchanged files are not read again."""
    with ThreadPoolExecutor(HASHERS) as hashers:
        return dict(zip((file.name for file in files), hashers.map(_digest, files), strict=True))


def _digest(file: Path) -> str:
    state = file.stat()
    return _digest_of_state(file, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=1024)
def _digest_of_state(file: Path, size: int, changed_ns: int, changed_status_ns: int) -> str:
    return file_sha256(file)
