"""A base model as a folder of files: found, fetched and checked, without loading a tensor.

Both floors read their parts of one diffusers SDXL pipeline. Only safetensors are accepted: other weights are pickles,
which run code when they are opened.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.dataset.errors import ModelError
from pipelines.dataset.storage import Storage, file_sha256

MODEL_INDEX = "model_index.json"
PIPELINE_CLASS = "StableDiffusionXLPipeline"
CACHE_VARIABLE = "MAPO_CACHE"
"""Environment variable: the node's folder for fetched models."""

# Other forms of the same weights that a hub repository often holds as well: tens of gigabytes.
HUB_PATTERNS = ["*.json", "*.txt", "*/*.safetensors", "diffusion_pytorch_model*.safetensors"]
HUB_IGNORED = ["*.fp16.safetensors", "*onnx*", "*openvino*", "*flax*"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HASHERS = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def resolve_model(model: str, marker: str = MODEL_INDEX) -> Path:
    """The local folder of a model; fetched first if it is elsewhere.

    Args:
        model: A folder, an fsspec URL of one, or a hub id.
        marker: The file that such a folder must hold.

    Raises:
        ModelError: There is no such folder, it cannot be fetched, or it lacks `marker`.
    """
    if "://" in model:
        folder = _fetch(model)
    elif Path(model).expanduser().is_dir():
        folder = Path(model).expanduser().resolve()
    elif HUB_ID.fullmatch(model) and not Path(model).expanduser().exists():
        folder = _fetch_from_hub(model)
    else:
        raise ModelError(
            f"there is no model folder {Path(model).expanduser().absolute()}",
            "set `encode.model` to the folder, fsspec URL or hub id of a diffusers SDXL pipeline",
        )
    if not (folder / marker).is_file():
        raise ModelError(
            f"{model} has no {marker}",
            "a diffusers folder is what `save_pretrained` writes; a single .safetensors checkpoint is turned into one "
            f"with `{PIPELINE_CLASS}.from_single_file(...).save_pretrained(...)`",
        )
    return folder


def resolve_vae(model: str, vae: str | None) -> Path:
    """The folder of the VAE: the pipeline's own, or another one (its own folder, or the `vae` of a pipeline).

    Raises:
        ModelError: See `resolve_model`.
    """
    if vae is None:
        return resolve_model(model) / "vae"
    if Path(vae).expanduser().is_dir() and (Path(vae).expanduser() / MODEL_INDEX).is_file():
        return resolve_model(vae) / "vae"
    return resolve_model(vae, marker="config.json")


def read_model_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of an SDXL pipeline.

    Raises:
        ModelError: It is something else.
    """
    index = read_config(folder / MODEL_INDEX)
    if (found := index.get("_class_name")) != PIPELINE_CLASS:
        raise ModelError(f"{folder} is a {found}, not a {PIPELINE_CLASS}", "choose a base of the SDXL family")
    return index


def read_config(file: Path) -> dict[str, Any]:
    """A JSON configuration file of a model.

    Raises:
        ModelError: It is missing or is not JSON.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}", "the model folder is incomplete; fetch it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} is not a configuration", "the model folder is damaged; fetch it again")
    return found


def weight_files(part: Path, stem: str) -> list[Path]:
    """The safetensors files of one part, with its index if it is in several; each with a whole header.

    Args:
        part: Its folder, such as `<model>/vae`.
        stem: `model` for transformers, `diffusion_pytorch_model` for diffusers.

    Raises:
        ModelError: They are missing, of another kind, or cut.
    """
    index = part / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_config(index).get("weight_map", {}).values()))
        files = [part / name for name in shards]
    else:
        index, files = Path(), [part / f"{stem}.safetensors"]
    for file in files:
        if not file.is_file():
            others = sorted(found.name for found in part.glob("*") if found.suffix in (".bin", ".safetensors", ".pth"))
            raise ModelError(
                f"{file} is missing" + (f"; the folder holds {', '.join(others)}" if others else ""),
                "only safetensors are read: load the pipeline with diffusers and `save_pretrained` it once",
            )
        _check_safetensors(file)
    return [*([index] if index.name else []), *files]


def file_digests(files: Sequence[Path]) -> dict[str, str]:
    """The sha256 of every file by its name; a file that has not changed since is not read again."""
    with ThreadPoolExecutor(HASHERS) as hashers:
        return dict(zip((file.name for file in files), hashers.map(_digest, files), strict=True))


def _digest(file: Path) -> str:
    state = file.stat()
    return _digest_of_state(file, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=1024)
def _digest_of_state(file: Path, size: int, changed_ns: int, changed_status_ns: int) -> str:
    return file_sha256(file)


def _check_safetensors(file: Path) -> None:
    """The header is JSON and the file is as long as the header says."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length) if 0 < length <= min(size, MAX_HEADER_BYTES) else b""
    try:
        entries = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise ModelError(f"{file} is not a safetensors file", "the model folder is damaged; fetch it again") from None
    if size != 8 + length + end:
        raise ModelError(
            f"{file} is damaged: {size:,} bytes where its header says {8 + length + end:,}", "fetch the model again"
        )


def _fetch(url: str) -> Path:
    """Copy a folder from any fsspec file system into the node's cache, once for each state it is in."""
    storage = Storage(url)
    if storage.is_local:
        return Path(storage.path())
    try:
        listing = storage.fs.find(storage.path(), detail=True)
    except Exception as error:  # each fsspec back end has its own exception tree
        raise ModelError(f"cannot list the model {url}: {error}", "check the URL and the credentials") from error
    sizes = {str(path).removeprefix(storage.path() + "/"): int(info["size"]) for path, info in listing.items()}
    if not sizes:
        raise ModelError(f"there is no model at {url}", "set `encode.model` to a diffusers SDXL pipeline")
    marks = sorted((name, sizes[name], _mark(info)) for name, info in zip(sizes, listing.values(), strict=True))
    cache = Path(os.environ.get(CACHE_VARIABLE, "~/.cache/mapo")).expanduser() / "models"
    folder = cache / hashlib.sha256(json.dumps([url, marks]).encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as unfinished:
        target = Path(unfinished) / "model"
        storage.download_folder("", target)
        for name, size in sizes.items():
            got = (target / name).stat().st_size if (target / name).is_file() else 0
            if got != size:
                raise ModelError(f"fetching {url}/{name} gave {got:,} of {size:,} bytes", "try again")
        try:
            target.rename(folder)
        except OSError:  # another process was first; the state is the same
            if not folder.is_dir():
                raise
    return folder


def _mark(info: dict[str, Any]) -> str:
    """What changes when an object is written again."""
    return str(info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or "")


def _fetch_from_hub(identifier: str) -> Path:
    """A snapshot of a hub repository in the hub's own cache; from that cache alone where there is no network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(identifier, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED))
    except Exception as error:  # offline, unknown, gated, out of space: the hub's tree, httpx's and OSError
        cause = str(error).strip().splitlines()
        raise ModelError(
            f"there is no folder {Path(identifier).absolute()}, and the hub gave no model {identifier}: "
            f"{cause[0] if cause else type(error).__name__}",
            "give a local folder, or check the name and the network (HF_HUB_OFFLINE, HF_TOKEN)",
        ) from error
