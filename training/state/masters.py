"""The float32 weights that the optimizer updates ("masters"), initialised from the base's own.

DeepSpeed casts the model to 16 bits first and takes its masters from the cast weights. Each then sits in the middle of
a rounding cell, and its 16-bit copy, with which the model computes, moves only once the master has moved by half a
unit in the last place: at a learning rate of 1e-7 three quarters of a whole training never reach the forward pass
(docs/concepts/training.md has the figures). Here each rank reads the fragments that it owns straight from the base's
files; no rank holds the whole UNet in float32.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import ModelSource, weight_files
from pipelines.dataset.safetensors_header import StoredTensor, stored_tensors
from training.optimizers.partition import Fragment
from training.state.ema import ShardedEma
from training.state.parent import on_all_ranks
from training.state.zero import ZeroState

STEM = "diffusion_pytorch_model"
TYPES: Mapping[str, tuple[torch.dtype, np.dtype[Any]]] = {
    "F32": (torch.float32, np.dtype("<f4")),
    "F16": (torch.float16, np.dtype("<f2")),
    "BF16": (torch.bfloat16, np.dtype("<u2")),
}
"""safetensors' name of a type -> torch's type, and the type that numpy reads."""


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a model in its safetensors files.

    Args:
        places: Where each tensor lies, by name.
    """

    places: Mapping[str, StoredTensor]

    @staticmethod
    def of(folder: Path, variant: str | None) -> "StoredWeights":
        """Open the weights of a model's part; reads headers alone.

        Args:
            folder: The folder of the part, such as `<model>/unet`.
            variant: The variant, such as fp16.

        Raises:
            ModelError: The weights are missing, damaged, or of a type that training does not read.
        """
        places = stored_tensors(weight_files(folder, STEM, variant))
        for name, place in places.items():
            _check_type(name, place)
        return StoredWeights(places)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The types of the stored numbers."""
        return {TYPES[place.dtype][0] for place in self.places.values()}

    def check(self, fragment: Fragment) -> None:
        """Check that the files contain a parameter.

        Raises:
            ModelError: It is missing, or has another shape.
        """
        if fragment.name not in self.places:
            raise ModelError(f"the weight {fragment.name} is missing from the base's files", "fetch the model again")
        place = self.places[fragment.name]
        if place.shape != fragment.shape:
            raise ModelError(
                f"{fragment.name} has shape {place.shape} in {place.file}, but {fragment.shape} in the model",
                "fetch the model again",
            )

    def read(self, fragment: Fragment) -> Tensor:
        """Read a part of a parameter as float32, exactly.

        Raises:
            ModelError: See `check`; or a file ends too early.
        """
        self.check(fragment)
        place = self.places[fragment.name]
        _, dtype = TYPES[place.dtype]
        start = place.start + fragment.start * dtype.itemsize
        stored = np.fromfile(place.file, dtype, fragment.numel, offset=start)
        if len(stored) != fragment.numel:
            raise ModelError(f"{place.file} is truncated: it ends inside {fragment.name}", "fetch the model again")
        if place.dtype == "BF16":  # the upper half of a float32
            return torch.from_numpy((stored.astype("<u4") << 16).view("<f4"))
        return torch.from_numpy(stored.astype("<f4", copy=False))


class ReadWhenAsked(Mapping[str, Tensor]):
    """Fragments by parameter name, each read on access: never all in memory at once.

    Args:
        stored: The files.
        fragments: This rank's fragments.
    """

    def __init__(self, stored: StoredWeights, fragments: Sequence[Fragment]) -> None:
        self._stored, self._fragments = stored, {fragment.name: fragment for fragment in fragments}

    def __getitem__(self, name: str) -> Tensor:
        return self._stored.read(self._fragments[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._fragments)

    def __len__(self) -> int:
        return len(self._fragments)


def start_from_base(source: ModelSource, state: ZeroState, ema: ShardedEma | None) -> str | None:
    """Set this rank's masters, and their average, to the base's values on disk; collective.

    Args:
        source: The base.
        state: The state of the engine, before its first step.
        ema: The average of the weights, if the training keeps one.

    Returns:
        A note for the user if the base has no float32 weights; None if it has.

    Raises:
        ModelError: The files do not contain the weights that the engine trains; on every rank alike.
    """

    def find() -> StoredWeights:
        stored = StoredWeights.of(source.folder() / "unet", source.variant)
        for fragment in state.fragments:
            stored.check(fragment)
        return stored

    stored = on_all_ranks(find)
    weights = ReadWhenAsked(stored, state.fragments)
    state.start_from(weights)
    if ema is not None:
        ema.load(weights)
    return note_on(stored.dtypes)


def note_on(dtypes: set[torch.dtype]) -> str | None:
    """Return a note on weights that exist only in 16 bits: training starts from rounded values."""
    if dtypes == {torch.float32}:
        return None
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return (
        f"the base's UNet is stored in {names}, so training starts from rounded weights. With a base that also has "
        "float32 weights, next to these or without `encode.variant`, it would start from the exact ones"
    )


def _check_type(name: str, place: StoredTensor) -> None:
    """Reject a type that training does not read, and a size that does not match type and shape."""
    known = TYPES.get(place.dtype)
    if known is None:
        raise ModelError(
            f"{place.file}: {name} has type {place.dtype}, which is not one of: {', '.join(TYPES)}",
            "save the base in float32, float16 or bfloat16",
        )
    if place.num_bytes != math.prod(place.shape) * known[1].itemsize:
        raise ModelError(
            f"{place.file}: {name} has {place.num_bytes:,} bytes, which does not fit shape {place.shape} and type "
            f"{place.dtype}",
            "fetch the model again",
        )
