"""BLIP as ImageReward uses it: the vision tower is a trunk, the text tower looks at its states."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import read_config
from pipelines.scores.parts import MODEL
from pipelines.scores.scorers.text import BertTokens
from pipelines.scores.scorers.trunks.head import AffineHead
from pipelines.scores.scorers.trunks.trunk import (
    CHUNK,
    DAMAGED,
    ImageTrunk,
    check_float32,
    check_weights,
    frozen,
    full_precision,
    load_state,
    shared,
)

State = dict[str, Tensor]


class BlipImages(ImageTrunk):
    """The vision tower: B, S, D, a state for the class token and each patch."""

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the states of the last layer."""
        states_BSD: Tensor = self.model(pixel_values=pixels_BCHW).last_hidden_state
        return states_BSD


class RewardHead:
    """The text tower with cross attention to an image, and the affine map of its first state."""

    def __init__(self, model: nn.Module, tokens: BertTokens, affine: AffineHead, device: torch.device) -> None:
        self._model, self._tokens, self._affine, self._device = frozen(model, device), tokens, affine, device

    def __call__(self, states_BSD: Tensor, prompts: Sequence[str]) -> tuple[list[float], list[float]]:
        """Return for each image the head's output, and the share of its prompt's tokens that did not fit."""
        check_float32(self._model)
        rewards: list[float] = []
        ids_BS, mask_BS, cut = self._tokens(prompts)
        with full_precision(self._device):
            for start in range(0, len(prompts), CHUNK):
                chunk = slice(start, start + CHUNK)
                # No mask of the image: transformers 5.23 ignores it, and all of its states are wanted anyway.
                first_BD = self._model(
                    input_ids=ids_BS[chunk].to(self._device),
                    attention_mask=mask_BS[chunk].to(self._device),
                    encoder_hidden_states=states_BSD[chunk],
                    is_decoder=False,  # the configuration's True adds cross attention; this keeps attention two-sided
                ).last_hidden_state[:, 0]
                rewards += self._affine(first_BD).tolist()
        return rewards, cut


def load_blip(folder: Path, tokenizer: Path, preprocessing: str, device: Any) -> tuple[BlipImages, RewardHead]:
    """Load ImageReward.

    Args:
        folder: The part's folder, as `conversions` writes it.
        tokenizer: The folder of BERT's vocabulary.
        preprocessing: The name of the preprocessing.
        device: A torch device.

    Raises:
        ModelError: Weights are missing, damaged or of another shape.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    place = torch.device(device)
    key = ("blip-images", check_weights(folder), preprocessing)
    config, state = read_config(folder / "config.json"), load_file(folder / MODEL)
    try:
        text = BlipTextModel(BlipTextConfig(**config["text_config"]), add_pooling_layer=False)
        vision_config = BlipVisionConfig(**config["vision_config"])
        affine = AffineHead(state["head.weight"], state["head.bias"], place)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder} is not a converted ImageReward: {error}", DAMAGED) from error

    def build() -> BlipImages:
        vision = load_state(BlipVisionModel(vision_config), below(state, "vision_model."), folder)
        return BlipImages(key, preprocessing, vision, place)

    load_state(text, below(state, "text_model."), folder)
    return shared(key, place, build), RewardHead(text, BertTokens(tokenizer), affine, place)


def below(state: State, prefix: str) -> State:
    """Return the weights below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
