"""Affine heads: one number from one embedding."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.dataset.errors import ModelError
from pipelines.scores.parts import MODEL
from pipelines.scores.scorers.trunks.trunk import check_weights


class AffineHead:
    """The map e -> w . e + b.

    Args:
        weight: 1, D.
        bias: 1.
        device: The device of the embeddings.
    """

    def __init__(self, weight: Tensor, bias: Tensor, device: Any) -> None:
        self._weight_D, self._bias = weight.float().flatten().to(device), bias.float().reshape(()).to(device)

    def __call__(self, embeds_BD: Tensor) -> Tensor:
        """Return one number for each embedding."""
        with torch.no_grad():
            return (embeds_BD * self._weight_D).sum(dim=-1) + self._bias


def load_affine(folder: Path, width: int, device: Any) -> AffineHead:
    """Load a head.

    Args:
        folder: The part's folder, whose weights are `weight` (1, D) and `bias` (1).
        width: D, the size of the embeddings.
        device: The device of the embeddings.

    Raises:
        ModelError: The weights are of another shape.
    """
    check_weights(folder)
    state = load_file(folder / MODEL)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != {"weight": (1, width), "bias": (1,)}:
        raise ModelError(
            f"{folder / MODEL} has tensors {shapes}, not a weight of (1, {width}) and a bias of (1,)",
            "fetch the head again; is it one of this CLIP?",
        )
    return AffineHead(state["weight"], state["bias"], device)
