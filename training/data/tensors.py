"""safetensors files as byte ranges: a header is parsed once, and a tensor is copied straight to its place in a batch.

`safetensors.torch.load` takes 30 us and copies; most samples of a data set share a few headers to the byte.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
MAX_LAYOUTS = 4096  # headers differ by size, type and time ids
LENGTH_BYTES = 8  # little endian, before the header


@dataclass(frozen=True)
class TensorPlace:
    """One tensor: its type and shape, and where its bytes start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def tensor(self, data: bytes) -> Tensor:
        """Return a copy of the tensor."""
        own = bytearray(data[self.start : self.start + self.num_bytes])
        return torch.frombuffer(own, dtype=self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in a safetensors file of at least `num_bytes`."""

    parts: Mapping[str, TensorPlace]
    metadata: Mapping[str, str]
    num_bytes: int


def layout_of(data: bytes) -> Layout:
    """Return where the tensors of a safetensors file lie.

    Raises:
        ValueError: It is not a safetensors file, or contains a type that mapo never stores.
    """
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    layout = _parse(data[LENGTH_BYTES : LENGTH_BYTES + length])
    if layout.num_bytes > len(data):
        raise ValueError(f"its tensors end at byte {layout.num_bytes:,} of {len(data):,}")
    return layout


@functools.lru_cache(MAX_LAYOUTS)
def _parse(header: bytes) -> Layout:
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", {})
    start = LENGTH_BYTES + len(header)
    parts = {name: _part(name, entry, start) for name, entry in entries.items()}
    return Layout(parts, metadata, max((part.start + part.num_bytes for part in parts.values()), default=start))


def _part(name: str, entry: Mapping[str, Any], start: int) -> TensorPlace:
    kind, (first, end) = entry["dtype"], entry["data_offsets"]
    if kind not in DTYPES:
        raise ValueError(f"{name} has type {kind}, which is not one of: {', '.join(DTYPES)}")
    part = TensorPlace(DTYPES[kind], tuple(entry["shape"]), start + first, end - first)
    if part.num_bytes != math.prod(part.shape) * part.dtype.itemsize or first < 0:
        raise ValueError(f"{name} of shape {part.shape} and type {kind} lies at {first} to {end}")
    return part
