"""DINO's vision transformer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.scores.scorers.trunks.trunk import ImageTrunk, check_weights, load_pretrained, shared


class DinoImages(ImageTrunk):
    """The class token after the last norm: B, D."""

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the class tokens."""
        states_BSD: Tensor = self.model(pixel_values=pixels_BCHW).last_hidden_state
        return states_BSD[:, 0]


def load_dino(folder: Path, preprocessing: str, device: Any) -> DinoImages:
    """Load a DINO model.

    Args:
        folder: The part's folder.
        preprocessing: The name of the preprocessing.
        device: A torch device.

    Raises:
        ModelError: Weights are missing or damaged.
    """
    from transformers import ViTModel

    place = torch.device(device)
    key = ("dino", check_weights(folder), preprocessing)

    def build() -> DinoImages:
        return DinoImages(key, preprocessing, load_pretrained(ViTModel, folder, add_pooling_layer=False), place)

    return shared(key, place, build)
