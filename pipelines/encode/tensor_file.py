"""Tensors as one safetensors file, the same bytes every time.

Bytes are a pure function of names, numbers and order: safetensors itself writes its metadata in an order that
changes from call to call.
"""

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the tensors, and metadata of text, as one safetensors file."""
    data = save(dict(tensors), dict(metadata) if metadata else None)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[start:]
