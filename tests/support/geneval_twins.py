"""Tiny twins of GenEval's detector, whose weights follow from formulas."""

from pathlib import Path
from typing import Any

import torch
from scorer_twins import fill, formula_image

from pipelines.scores.scorers.images import prepare

PART = "mask2former-swin-s-coco"


def mask2former_model(*, sureness: float = 1.0, num_labels: int = 80) -> Any:
    """Return a tiny Mask2Former.

    Args:
        sureness: Factor of the weights of its classes; with 1 no class is likely.
        num_labels: Number of its classes.
    """
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=7, image_size=224,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=10,
        num_labels=num_labels,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config).eval()
    fill(model)
    model.criterion.empty_weight[:] = 1.0
    model.class_predictor.weight.data *= sureness
    _spread_masks(model)
    return model


def _spread_masks(model: Any) -> None:
    """Centre and stretch the features of masks, so that masks are parts of an image."""
    pixel_values = prepare([formula_image(256, 256)], "clip-224")
    with torch.no_grad():
        module = model.model.pixel_level_module
        features_CHW = module(pixel_values).decoder_last_hidden_state[0]
        last = module.decoder.mask_projection
        last.bias -= features_CHW.mean(dim=(1, 2))
        scale = 8 / features_CHW.std(dim=(1, 2))
        last.weight *= scale[:, None, None, None]
        last.bias *= scale


def write_mask2former(root: Path, model: Any = None) -> Path:
    """Write a twin as its part, under the published names of its weights."""
    model = mask2former_model() if model is None else model
    folder = root / PART
    model.save_pretrained(folder)
    return folder
