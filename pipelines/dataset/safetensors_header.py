"""The header of a safetensors file: tells whether the file is complete, and the shapes of its tensors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.dataset.errors import ModelError
from pipelines.dataset.values import JsonObject

MAX_HEADER_BYTES = 100_000_000  # the limit of the format


def tensor_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in safetensors files, from their headers; other files are skipped.

    Raises:
        ModelError: A header is damaged.
    """
    headers = [read_header(file)[0] for file in files if file.suffix == ".safetensors"]
    return {
        name: tuple(entry["shape"])
        for header in headers
        for name, entry in header.items()
        if name != "__metadata__" and "shape" in entry
    }


def tensor_types(files: Sequence[Path]) -> set[str]:
    """Return the types of all tensors in safetensors files, by the format's names, such as F32.

    Raises:
        ModelError: A header is damaged.
    """
    headers = [read_header(file)[0] for file in files if file.suffix == ".safetensors"]
    return {str(entry.get("dtype")) for header in headers for name, entry in header.items() if name != "__metadata__"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its file, its type by the format's name, and `num_bytes` bytes from `start`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return where every tensor of safetensors files lies, by name; other files are skipped.

    Raises:
        ModelError: A header is damaged.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            entries, end = read_header(file)
            tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
            begin = end - max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            for name, entry in tensors.items():
                first, last = entry["data_offsets"]
                found[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), begin + first, last - first)
    return found


def read_header(file: Path) -> tuple[JsonObject, int]:
    """Return the header of a safetensors file, and where its last tensor ends.

    Raises:
        ModelError: The file is not a safetensors file.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size
        header = opened.read(length) if 0 < length <= min(size, MAX_HEADER_BYTES) else b""
    try:
        entries = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise ModelError(f"{file} is not a safetensors file", "the model folder is damaged; fetch it again") from None
    return entries, 8 + length + int(end)


def check_safetensors(file: Path) -> None:
    """Check that the header is JSON and the file is as long as the header says.

    Raises:
        ModelError: The file is not a safetensors file, or is truncated.
    """
    size, (_, end) = file.stat().st_size, read_header(file)
    if size != end:
        raise ModelError(f"{file} is damaged: {size:,} bytes, but its header says {end:,}", "fetch the model again")
