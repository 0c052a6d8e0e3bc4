"""Gram matrices of VGG-19's features, as one long vector whose squared distance is the score."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.dataset.errors import ModelError
from pipelines.scores.parts import MODEL
from pipelines.scores.scorers.trunks.trunk import DAMAGED, ImageTrunk, check_weights, shared

CONVOLUTIONS = (2, 2, 4, 4, 4)
"""Number of convolutions in each block; a pooling lies between blocks."""


class _Features(nn.Module):
    """The convolutions of VGG-19 up to the first of the fifth block, in blocks that each end in a wanted ReLU."""

    def __init__(self, weights: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        layers = [nn.Conv2d(weight.shape[1], weight.shape[0], kernel_size=3, padding=1) for weight, _ in weights]
        for layer, (weight, bias) in zip(layers, weights, strict=True):
            layer.weight, layer.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
        self.layers = nn.ModuleList(layers)

    def forward(self, values_BCHW: Tensor) -> list[Tensor]:
        """Return the features after the first ReLU of each block."""
        found, place = [], 0
        for block, count in enumerate(CONVOLUTIONS):
            if block:
                values_BCHW = nn.functional.max_pool2d(values_BCHW, 2)
            for position in range(count if block < len(CONVOLUTIONS) - 1 else 1):
                values_BCHW = self.layers[place](values_BCHW).relu()
                place += 1
                if position == 0:
                    found.append(values_BCHW)
        return found


class GramImages(ImageTrunk):
    """The Gram matrices of all layers, each scaled so that a squared distance is a mean over layers and elements."""

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return B, D."""
        matrices = []
        for image_1CHW in pixels_BCHW.split(1):  # features of one image at 512 pixels take some 300 MB
            vector = []
            for features_1CHW in self.model(image_1CHW):
                features_CN = features_1CHW[0].flatten(1)
                gram_CC = features_CN @ features_CN.T / features_CN.numel()
                vector.append(gram_CC.flatten() / math.sqrt(len(CONVOLUTIONS) * gram_CC.numel()))
            matrices.append(torch.cat(vector))
        return torch.stack(matrices)


def load_vgg(folder: Path, preprocessing: str, device: Any) -> GramImages:
    """Load VGG-19's convolutions, under torchvision's names.

    Args:
        folder: The part's folder.
        preprocessing: The name of the preprocessing.
        device: A torch device.

    Raises:
        ModelError: Weights are missing or damaged.
    """
    place = torch.device(device)
    key = ("gram", check_weights(folder), preprocessing)

    def build() -> GramImages:
        state = load_file(folder / MODEL)
        numbers = sorted(int(name.split(".")[1]) for name in state if name.endswith(".weight"))
        wanted = numbers[: sum(CONVOLUTIONS[:-1]) + 1]
        try:
            weights = [(state[f"features.{each}.weight"], state[f"features.{each}.bias"]) for each in wanted]
            if len(weights) <= sum(CONVOLUTIONS[:-1]):
                raise KeyError(f"a convolution number {len(weights) + 1}")
        except KeyError as error:
            raise ModelError(f"{folder / MODEL} lacks {error}", DAMAGED) from error
        return GramImages(key, preprocessing, _Features(weights), place)

    return shared(key, place, build)
