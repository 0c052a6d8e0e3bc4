"""Read a published file as plain tensors, and convert it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.dataset.errors import ModelError
from pipelines.dataset.values import JsonObject
from pipelines.scores.conversions.affine import collapse_affine
from pipelines.scores.conversions.blip import blip_vqa, imagereward
from pipelines.scores.conversions.clip import csd, open_clip
from pipelines.scores.conversions.numpy_pickle import read_array

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

VERSION = 1
"""Raise it when a conversion would give other tensors."""
GIVES_CONFIG = ("open_clip", "imagereward", "blip_vqa", "csd")
"""Conversions that also give the configuration of the model."""
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts put a state dict."""


def read_weights(file: Path) -> "Weights":
    """Read a state dict from a safetensors file, from a pickle of tensors alone, or one array from a NumPy pickle.

    Raises:
        ModelError: The file is damaged, or holds anything else than tensors: it would have to run code.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        if file.suffix == ".p":
            return {"array": torch.from_numpy(read_array(file))}
        found: Any = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle, zip, torch and safetensors have no common tree
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{file} is refused: it cannot be read as plain tensors ({cause[:200]})",
            "mapo never runs code from a weights file; give a state dict or a safetensors file from the publisher",
        ) from error
    found = found if isinstance(found, Mapping) else {}
    found = next((found[each] for each in WRAPPERS if isinstance(found.get(each), Mapping)), found)
    tensors = {str(name).removeprefix("module."): each for name, each in found.items() if torch.is_tensor(each)}
    if not tensors:
        raise ModelError(f"{file} has no tensors by name", "give a state dict or a safetensors file")
    return tensors


def check_precision(weights: "Weights", file: Path) -> None:
    """Check that no tensor was rounded to bfloat16.

    Raises:
        ModelError: One was.
    """
    rounded = [name for name, tensor in weights.items() if str(tensor.dtype) == "torch.bfloat16"]
    if rounded:
        raise ModelError(
            f"{len(rounded)} tensors of {file} are bfloat16, such as {rounded[0]}: scores would move by 4 % of their "
            "standard deviation, which flips close pairs",
            "give the published weights in float32 or float16",
        )


def convert(name: str, weights: "Weights", file: Path) -> "tuple[Weights, JsonObject | None]":
    """Rename and reshape weights.

    Args:
        name: The conversion, as in the table of parts.
        weights: The published tensors by name.
        file: The file that they come from, for messages.

    Returns:
        The tensors, contiguous and with memory of their own, and the configuration of the model; None if it has a
        published one, or needs none.

    Raises:
        ModelError: A tensor is missing, or bfloat16.
    """
    check_precision(weights, file)
    try:
        tensors, config = CONVERSIONS[name](weights)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{file} does not hold the weights that the conversion {name} expects: {error}",
            "is it the file of this scorer? compare its size with the publisher's",
        ) from error
    return {each: tensor.detach().clone().contiguous() for each, tensor in tensors.items()}, config


def _affine(weights: "Weights") -> "tuple[Weights, None]":
    return collapse_affine(weights), None


def _vgg(weights: "Weights") -> "tuple[Weights, None]":
    """Keep the convolutions of torchvision's VGG, and leave its classifier out."""
    found = {name: tensor for name, tensor in weights.items() if name.startswith("features.")}
    if not found:
        raise KeyError("features.0.weight")
    return found, None


def _q16(weights: "Weights") -> "tuple[Weights, None]":
    """Keep the two prompts of Q16: appropriate, then inappropriate."""
    prompts_2D = weights["array"] if "array" in weights else weights["prompts"]
    if prompts_2D.ndim != 2 or len(prompts_2D) != 2:
        raise ValueError(f"the prompts have the shape {tuple(prompts_2D.shape)}, not (2, width)")
    return {"prompts": prompts_2D.float()}, None


def _copy(weights: "Weights") -> "tuple[Weights, None]":
    return dict(weights), None


CONVERSIONS: "dict[str, Callable[[Weights], tuple[Weights, JsonObject | None]]]" = {
    "copy": _copy,
    "open_clip": open_clip,
    "imagereward": imagereward,
    "blip_vqa": blip_vqa,
    "affine": _affine,
    "csd": csd,
    "vgg": _vgg,
    "q16": _q16,
}
