"""Finds what replaces or changes a part of a pipeline: the folder of a UNet, the file of a LoRA; fetched if remote.

Light: needs neither ray, torch nor diffusers. Files that are not safetensors are refused: they may run code.
"""

import hashlib
import json
from pathlib import Path

from filelock import FileLock

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_fetch import default_cache, fetch_file
from pipelines.dataset.model_files import read_config, resolve_model
from pipelines.dataset.safetensors_header import check_safetensors
from pipelines.dataset.storage import Storage, file_sha256
from pipelines.samples.drawing import DrawnModel

LORA_NAME = "pytorch_lora_weights.safetensors"
"""The file of a LoRA in its folder, as diffusers saves it."""
SAFETENSORS = ".safetensors"
UNET_CONFIG = "config.json"
FITTING = ("in_channels", "cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")
"""Keys of a UNet's configuration that its pipeline relies on."""


def unet_folder(model: DrawnModel) -> Path | None:
    """Return the local folder of the UNet that replaces the pipeline's own; None if there is none.

    Authors publish a UNet alone, with its `config.json` at the top, or below `unet/` as in a pipeline.

    Raises:
        ModelError: There is no such folder, it has no UNet, or one that does not fit the pipeline.
    """
    if model.unet is None:
        return None
    options = {"revision": model.unet_revision, "variant": model.unet_variant}
    try:
        folder = resolve_model(model.unet, f"unet/{UNET_CONFIG}", **options) / "unet"
    except ModelError:
        folder = resolve_model(model.unet, UNET_CONFIG, **options)
    _check_fits(folder, model)
    return folder


def _check_fits(folder: Path, model: DrawnModel) -> None:
    """Check that a UNet has the inputs that the pipeline gives it."""
    own = read_config(model.source.folder() / "unet" / UNET_CONFIG)
    other = read_config(folder / UNET_CONFIG)
    for key in FITTING:
        if own.get(key) != other.get(key):
            raise ModelError(
                f"the UNet {folder} does not fit {model.source.model}: its `{key}` is {other.get(key)}, not "
                f"{own.get(key)}",
                "use a UNet that was trained from a base of the same family",
            )


def lora_file(model: DrawnModel) -> Path | None:
    """Return the local file of the LoRA; None if there is none.

    Raises:
        ModelError: There is no such file, it cannot be fetched, or it is not a safetensors file.
    """
    if model.lora is None:
        return None
    folder, _, name = model.lora.rstrip("/").rpartition("/")
    if name.endswith(SAFETENSORS):
        storage = Storage(folder or ("/" if model.lora.startswith("/") else "."))
    else:
        storage = Storage(model.lora)
        name = _name_in(storage, model.lora)
    if not storage.exists(name):
        raise ModelError(f"there is no LoRA {storage.uri(name)}", "check the path of `lora`")
    file = Path(storage.path(name)) if storage.is_local else _fetched(storage, name)
    check_safetensors(file)
    return file


def _name_in(storage: Storage, lora: str) -> str:
    """Return the name of the LoRA's file in its folder."""
    names = [name for name in storage.names() if "/" not in name and name.endswith(SAFETENSORS)]
    if LORA_NAME in names:
        return LORA_NAME
    if len(names) != 1:
        found = f"{len(names)} safetensors files: {', '.join(sorted(names))}" if names else "no safetensors file"
        raise ModelError(
            f"there is no LoRA in {lora}: it has {found}", f"name the file itself, or a folder with {LORA_NAME}"
        )
    return names[0]


def _fetched(storage: Storage, name: str) -> Path:
    """Copy a remote file into the node's cache, once for each of its states; other processes wait for the first."""
    info = storage.fs.info(storage.path(name))
    mark = str(info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or "")
    state = hashlib.sha256(json.dumps([storage.uri(name), int(info["size"]), mark]).encode()).hexdigest()[:32]
    cache = default_cache() / "loras"
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{state}{SAFETENSORS}"
    with FileLock(cache / f".{state}.lock"):
        if not target.is_file():
            unfinished = target.with_suffix(".part")
            fetch_file(storage, name, unfinished)
            unfinished.rename(target)
    return target


def lora_digest(model: DrawnModel) -> str | None:
    """Return the sha256 of the LoRA's file; None if there is none."""
    file = lora_file(model)
    return None if file is None else file_sha256(file)
