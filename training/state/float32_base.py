"""Finds a 16-bit base's float32 weights, if they lie next to it: training starts from the exact ones.

Reads headers and a few thousand numbers; needs no torch, because the driver uses it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import ModelSource, file_digests, weight_files
from pipelines.dataset.safetensors_header import StoredTensor, stored_tensors

STEM = "diffusion_pytorch_model"
NUM_COMPARED, MAX_NUMBERS = 16, 4096  # tensors, and of each the first numbers
STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}

Places = Mapping[str, StoredTensor]


def float32_weights_digest(source: ModelSource) -> str | None:
    """Return a digest of the UNet's float32 weights, if they lie next to the 16-bit ones that `encode.variant` names.

    They count if they are the same weights: same names and shapes, and the numbers compared round to the variant's.
    This works only for a model in a local folder, which every node sees alike: otherwise only the variant is fetched.

    Args:
        source: The base pipeline, as the section `encode` names it.
    """
    if source.variant is None or not Path(source.model).expanduser().is_dir():
        return None
    unet = source.folder() / "unet"
    try:
        plain = weight_files(unet, STEM)
        exact, rounded = stored_tensors(plain), stored_tensors(weight_files(unet, STEM, source.variant))
    except ModelError:  # there are no plain weights, or they are damaged
        return None
    if not _could_be_rounded(exact, rounded):
        return None
    names = sorted(exact)
    compared = names[:: max(1, len(names) // NUM_COMPARED)]
    if not all(_rounds_to(_numbers(exact[name]), _numbers(rounded[name])) for name in compared):
        return None
    return hashlib.sha256(json.dumps(file_digests(plain), sort_keys=True).encode()).hexdigest()[:16]


def _could_be_rounded(exact: Places, rounded: Places) -> bool:
    """Return whether names, shapes and types are those of float32 weights and of the same weights in 16 bits."""
    types = [{place.dtype for place in places.values()} for places in (exact, rounded)]
    shapes = [{name: place.shape for name, place in places.items()} for places in (exact, rounded)]
    return types[0] == {"F32"} and types[1] <= {"F16", "BF16"} and shapes[0] == shapes[1]


def _numbers(place: StoredTensor) -> NDArray[Any]:
    dtype = STORED[place.dtype]
    return np.fromfile(place.file, dtype, min(MAX_NUMBERS, place.num_bytes // dtype.itemsize), offset=place.start)


def _rounds_to(exact: NDArray[Any], rounded: NDArray[Any]) -> bool:
    """Return whether float32 numbers round (to nearest, ties to even) to these float16, or bits of bfloat16."""
    if rounded.dtype == STORED["F16"]:
        with np.errstate(over="ignore"):
            return bool(np.array_equal(exact.astype("<f2"), rounded))
    bits = exact.view("<u4").astype(np.uint64)
    return bool(np.array_equal((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, rounded))
