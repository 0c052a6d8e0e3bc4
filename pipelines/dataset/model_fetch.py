"""Fetches the needed files of a base model: from a URL into the node's cache, from the hub into the hub's cache."""

import fnmatch
import hashlib
import json
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from pipelines.dataset.errors import ModelError
from pipelines.dataset.object_store import Upload, WrongBytes
from pipelines.dataset.storage import Storage, retry
from pipelines.dataset.values import JsonObject

CACHE_VARIABLE = "MAPO_CACHE"
"""Environment variable: the node's folder for fetched files."""

# A repository often holds the same weights in other forms as well: tens of gigabytes. Weights of a part lie in its
# folder; those of a VAE by itself at the top, beside single-file checkpoints, which nobody here reads.
PLAIN_FILES = ("*.json", "*.txt")
WEIGHTS = ("*/*{}.safetensors", "diffusion_pytorch_model*{}.safetensors")
CARD = "README.md"
"""A model's card, which states its licence; not copied from a URL."""
IGNORED = ("*onnx*", "*openvino*", "*flax*")
VARIANTS = ("fp16", "bf16", "fp32", "non_ema", "ema_only")
"""Variants that hub repositories have in addition to the plain weights; other variants are fetched too if present."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
READERS = 8


def default_cache() -> Path:
    """Return the node's folder for fetched files."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/mapo").expanduser()


def _patterns(variant: str | None) -> tuple[list[str], list[str]]:
    """Return patterns of the files to fetch (configuration, and weights of one variant), and of those to skip."""
    if variant is not None:
        return [*PLAIN_FILES, *(pattern.format(f".{variant}*") for pattern in WEIGHTS)], list(IGNORED)
    others = [f"*.{other}{end}" for other in VARIANTS for end in (".safetensors", "-*.safetensors")]
    return [*PLAIN_FILES, *(pattern.format("") for pattern in WEIGHTS)], [*IGNORED, *others]


def is_wanted(name: str, variant: str | None) -> bool:
    """Return whether a file of a model is fetched.

    Args:
        name: The file's path below the model's folder.
        variant: The variant of the weights; None for the plain ones.
    """
    wanted, left = _patterns(variant)
    return any(fnmatch.fnmatch(name, each) for each in wanted) and not any(fnmatch.fnmatch(name, each) for each in left)


def fetch_folder(url: str, variant: str | None) -> Path:
    """Copy a folder from any fsspec file system into the node's cache, once for each of its states.

    The processes of a node wait for the first of them. Every file is checked against what the store reports.
    """
    storage = Storage(url)
    if storage.is_local:
        return Path(storage.path())
    folder, infos = _place(storage, url, variant)
    if folder.is_dir():
        return folder
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):
        if folder.is_dir():  # another process was first
            return folder
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as unfinished:
            target = Path(unfinished) / "model"
            with ThreadPoolExecutor(READERS) as readers:
                list(readers.map(lambda name: fetch_file(storage, name, target / name), infos))
            target.rename(folder)
    return folder


def _place(storage: Storage, url: str, variant: str | None) -> tuple[Path, JsonObject]:
    """Return where a remote folder in its present state belongs in the node's cache, and which files to fetch."""
    try:
        listing = storage.fs.find(storage.path(), detail=True)
    except Exception as error:  # each fsspec back end has its own exception tree
        raise ModelError(f"cannot list the model {url}: {error}", "check the URL and the credentials") from error
    found = {str(path).removeprefix(storage.path() + "/"): info for path, info in listing.items()}
    infos = {name: info for name, info in found.items() if is_wanted(name, variant)}
    if not infos:
        raise ModelError(f"there is no model at {url}", "set `encode.model` to the folder of a diffusers pipeline")
    marks = sorted((name, int(info["size"]), _mark(info)) for name, info in infos.items())
    cache = default_cache() / "models"
    return cache / hashlib.sha256(json.dumps([url, marks]).encode()).hexdigest()[:32], infos


def is_fetched(model: str, revision: str | None, variant: str | None) -> bool:
    """Return whether a model is on this machine; True also if it exists nowhere, as `resolve_model` reports."""
    if "://" in model:
        storage = Storage(model)
        return storage.is_local or _place(storage, model, variant)[0].is_dir()
    if Path(model).expanduser().exists() or not HUB_ID.fullmatch(model):
        return True
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception:  # the hub's tree and OSError: it is not in the hub's cache
        return False
    return any(is_wanted(file.relative_to(folder).as_posix(), variant) for file in folder.rglob("*.safetensors"))


def fetch_file(storage: Storage, name: str, target: Path) -> None:
    """Copy one file, and check it against what the store reports.

    Raises:
        ModelError: The file cannot be read, or the wrong bytes arrived.
    """
    target.parent.mkdir(parents=True, exist_ok=True)

    def get() -> None:
        storage.fs.get_file(storage.path(name), str(target))
        Upload(target).check(storage.fs, storage.path(name))

    try:
        retry(get)
    except WrongBytes as error:
        raise ModelError(f"fetching {storage.uri(name)} returned the wrong bytes: {error}", "try again") from error
    except Exception as error:  # each fsspec back end has its own exception tree
        raise ModelError(f"cannot fetch {storage.uri(name)}: {error}", "check the URL and the credentials") from error


def _mark(info: JsonObject) -> str:
    """Return a value that changes when an object is written again."""
    return str(info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or "")


def fetch_from_hub(identifier: str, revision: str | None, variant: str | None) -> Path:
    """Return a snapshot of a hub repository in the hub's own cache; without a network it must be there already."""
    from huggingface_hub import snapshot_download

    wanted, left = _patterns(variant)
    wanted.append(CARD)
    try:
        return Path(snapshot_download(identifier, revision=revision, allow_patterns=wanted, ignore_patterns=left))
    except Exception as error:  # offline, unknown, gated, out of space: the hub's tree, httpx's and OSError
        cause = str(error).strip().splitlines()
        at = "" if revision is None else f" at revision {revision}"
        raise ModelError(
            f"there is no folder {Path(identifier).absolute()}, and fetching {identifier}{at} from the hub failed: "
            f"{cause[0] if cause else type(error).__name__}",
            "give a local folder, or check the name and the network (HF_HUB_OFFLINE, HF_TOKEN)",
        ) from error
