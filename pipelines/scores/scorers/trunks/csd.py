"""CSD's model: the vision tower of CLIP without its projection, and a projection to style."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import read_config
from pipelines.scores.parts import MODEL
from pipelines.scores.scorers.trunks.trunk import DAMAGED, ImageTrunk, check_weights, load_state, shared

PROJECTION = "style_projection"


class _StyleModel(nn.Module):
    def __init__(self, vision: nn.Module, projection: Tensor) -> None:
        super().__init__()
        self.vision, self.projection = vision, nn.Parameter(projection)


class CsdImages(ImageTrunk):
    """The projection to style: B, D, not normalised."""

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the projected class token."""
        pooled_BD: Tensor = self.model.vision(pixel_values=pixels_BCHW).pooler_output
        style_BD: Tensor = pooled_BD @ self.model.projection
        return style_BD


def load_csd(folder: Path, preprocessing: str, device: Any) -> CsdImages:
    """Load CSD.

    Args:
        folder: The part's folder, as `conversions` writes it.
        preprocessing: The name of the preprocessing.
        device: A torch device.

    Raises:
        ModelError: Weights are missing, damaged or of another shape.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    place = torch.device(device)
    key = ("csd", check_weights(folder), preprocessing)

    def build() -> CsdImages:
        state, config = load_file(folder / MODEL), read_config(folder / "config.json")
        if (projection := state.pop(PROJECTION, None)) is None:
            raise ModelError(f"{folder / MODEL} has no {PROJECTION}", DAMAGED)
        vision = load_state(CLIPVisionModel(CLIPVisionConfig(**config)), state, folder)
        return CsdImages(key, preprocessing, _StyleModel(vision, projection.float()), place)

    return shared(key, place, build)
