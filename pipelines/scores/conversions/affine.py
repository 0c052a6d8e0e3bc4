"""Linear layers without activations between them, as the one affine map that they are."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]


def collapse_affine(weights: "Weights", prefix: str = "") -> "Weights":
    """Multiply out linear layers without activations between them, in float64: weight (1, D) and bias (1).

    The five layers of the aesthetic head and of ImageReward are one affine map; dropout does nothing at evaluation.
    """
    import torch

    if f"{prefix}weight" in weights and f"{prefix}bias" in weights:
        return {name: weights[f"{prefix}{name}"].float() for name in ("weight", "bias")}
    found = (re.fullmatch(re.escape(prefix) + r"layers\.(\d+)\.weight", name) for name in weights)
    places = sorted(int(match[1]) for match in found if match)
    if not places:
        raise KeyError(f"{prefix}layers.0.weight")
    first = weights[f"{prefix}layers.{places[0]}.weight"]
    weight, bias = torch.eye(first.shape[1], dtype=torch.float64), torch.zeros(first.shape[1], dtype=torch.float64)
    for place in places:
        layer, shift = (weights[f"{prefix}layers.{place}.{each}"].double() for each in ("weight", "bias"))
        weight, bias = layer @ weight, layer @ bias + shift
    return {"weight": weight.float(), "bias": bias.float()}
