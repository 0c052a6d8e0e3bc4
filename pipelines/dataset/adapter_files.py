"""Finds the file of LoRA adapters: a file, a folder, an fsspec URL of either, or a repository of the hub.

Light: needs neither ray, torch nor diffusers. Only safetensors files are read: others may run code.
"""

import hashlib
import json
import re
from pathlib import Path

from filelock import FileLock

from pipelines.dataset.errors import ModelError, StorageError
from pipelines.dataset.model_fetch import HUB_ID, default_cache, fetch_file
from pipelines.dataset.safetensors_header import check_safetensors
from pipelines.dataset.storage import Storage

ADAPTER_NAME = "pytorch_lora_weights.safetensors"
"""The file of adapters in its folder, as diffusers saves it."""
SAFETENSORS = ".safetensors"
_HUB_FILE = re.compile(rf"({HUB_ID.pattern})/(.+\{SAFETENSORS})")


def is_hub_id(place: str) -> bool:
    """Return whether adapters are on the hub, as `owner/name` or `owner/name/FILE`; a path that exists goes first."""
    if "://" in place or Path(place).expanduser().exists():
        return False
    return bool(HUB_ID.fullmatch(place) and not place.endswith(SAFETENSORS)) or bool(_HUB_FILE.fullmatch(place))


def find_adapter(place: str) -> Path:
    """Return the local file of adapters, which is fetched first if it is remote.

    Args:
        place: A file, a folder, an fsspec URL of either, a hub id, or a hub id and the name of a file in it.

    Raises:
        ModelError: There is no such file, it cannot be fetched, or it is not a whole safetensors file.
    """
    if is_hub_id(place):
        file = _from_hub(place)
    else:
        try:
            file = stored_adapter(place, missing="there are no adapters", hint="check the path")
        except StorageError as error:
            raise ModelError(f"cannot read the adapters {place}: {error.message}", error.hint) from error
    check_safetensors(file)
    return file


def stored_adapter(place: str, *, missing: str, hint: str) -> Path:
    """Return the local file of adapters at a path or URL, which is fetched first if it is remote.

    Args:
        place: A file, a folder, or an fsspec URL of either.
        missing: How the error for a missing file begins, such as "there is no LoRA".
        hint: The way out of that error.

    Raises:
        ModelError: There is no such file.
        StorageError: It cannot be read.
    """
    parent, _, name = place.rstrip("/").rpartition("/")
    if name.endswith(SAFETENSORS):
        storage = Storage(parent or ("/" if place.startswith("/") else "."))
    else:
        storage = Storage(place)
        name = _name_in(storage, place, missing)
    if not storage.exists(name):
        raise ModelError(f"{missing} {storage.uri(name)}", hint)
    return Path(storage.path(name)) if storage.is_local else _fetched(storage, name)


def _name_in(storage: Storage, place: str, missing: str) -> str:
    """Return the name of the adapters' file in a folder."""
    names = [name for name in storage.names() if "/" not in name and name.endswith(SAFETENSORS)]
    if ADAPTER_NAME in names:
        return ADAPTER_NAME
    if len(names) != 1:
        found = f"{len(names)} safetensors files: {', '.join(sorted(names))}" if names else "no safetensors file"
        raise ModelError(
            f"{missing} in {place}: it has {found}",
            f"name the file itself, or a folder with {ADAPTER_NAME}",
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


def _from_hub(place: str) -> Path:
    """Return a file of a hub repository from the hub's own cache; without a network it must be there already."""
    from huggingface_hub import hf_hub_download

    named = _HUB_FILE.fullmatch(place)
    identifier, name = (named[1], named[2]) if named else (place, ADAPTER_NAME)
    try:
        return Path(hf_hub_download(identifier, name))
    except Exception as error:  # offline, unknown, gated, no such file: the hub's tree, httpx's and OSError
        cause = str(error).strip().splitlines()
        raise ModelError(
            f"there is no file or folder {Path(place).absolute()}, and fetching {name} of {identifier} from the hub "
            f"failed: {cause[0] if cause else type(error).__name__}",
            "check the path; give OWNER/NAME/FILE.safetensors if the repository's file has another name; or check the "
            "network (HF_HUB_OFFLINE, HF_TOKEN)",
        ) from error
