"""The float32 weights that the optimizer steps on ("masters"), started at the base's own.

DeepSpeed casts the model to 16 bits first and takes its masters from the cast weights. Each then sits in the middle of
a rounding cell, and its 16-bit copy, with which the model computes, moves only once the master has moved by half a
unit in the last place: at a learning rate of 1e-7 three quarters of a whole training never reach the forward pass
(docs/concepts/training.md has the figures). Here each rank reads the fragments that it owns from the base's files, by
place; no rank holds the UNet in float32.
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
from training.state.ema import ShardedEma
from training.state.parent import on_all_ranks
from training.state.zero import Fragment, ZeroState

STEM = "diffusion_pytorch_model"
TYPES: Mapping[str, tuple[torch.dtype, np.dtype[Any]]] = {
    "F32": (torch.float32, np.dtype("<f4")),
    "F16": (torch.float16, np.dtype("<f2")),
    "BF16": (torch.bfloat16, np.dtype("<u2")),
}
"""The format's name of a type -> torch's, and what numpy reads."""


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a model as they lie in its safetensors files.

    Args:
        places: By name.
    """

    places: Mapping[str, StoredTensor]

    @staticmethod
    def of(folder: Path, variant: str | None) -> "StoredWeights":
        """Open the weights of a model's part; reads headers alone.

        Args:
            folder: Of the part, such as `<model>/unet`.
            variant: Such as fp16.

        Raises:
            ModelError: They are missing, damaged, or of a type that training does not read.
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
        """Check that the files hold a parameter.

        Raises:
            ModelError: They lack it, or have it in another shape.
        """
        if fragment.name not in self.places:
            raise ModelError(
                f"the base's files lack {fragment.name}, one of {len(self.places):,} weights", "fetch the model again"
            )
        place = self.places[fragment.name]
        if place.shape != fragment.shape:
            raise ModelError(
                f"{place.file} has {fragment.name} of shape {place.shape}, the model of {fragment.shape}",
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
            raise ModelError(f"{place.file} ends within {fragment.name}", "fetch the model again")
        if place.dtype == "BF16":  # the upper half of a float32
            return torch.from_numpy((stored.astype("<u4") << 16).view("<f4"))
        return torch.from_numpy(stored.astype("<f4", copy=False))


class ReadWhenAsked(Mapping[str, Tensor]):
    """Fragments by the names of their parameters, each read when it is asked for: never all in memory at once.

    Args:
        stored: The files.
        fragments: Of this rank.
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
    """Give this rank's masters, and their average, the values that the base has on disk; collective.

    Args:
        source: The base.
        state: Of the engine, before its first step.
        ema: Its average, if the training keeps one.

    Returns:
        A word for the user where the base has no float32 weights; None where it has.

    Raises:
        ModelError: The files do not hold what the engine trains; on every rank alike.
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
    """Return a word on weights that exist in 16 bits alone: training starts from their rounding."""
    if dtypes == {torch.float32}:
        return None
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return (
        f"the base's UNet is stored in {names}: training starts from weights that were rounded once. A base with "
        "float32 weights, beside these or without `encode.variant`, starts from those"
    )


def _check_type(name: str, place: StoredTensor) -> None:
    """Refuse a type that training does not read, and bytes that are not those of type and shape."""
    known = TYPES.get(place.dtype)
    if known is None:
        raise ModelError(
            f"{place.file}: {name} is of type {place.dtype}; known are {', '.join(TYPES)}",
            "save the base in float32, float16 or bfloat16",
        )
    if place.num_bytes != math.prod(place.shape) * known[1].itemsize:
        raise ModelError(
            f"{place.file}: {name} of shape {place.shape} and type {place.dtype} has {place.num_bytes:,} bytes",
            "fetch the model again",
        )
