"""The two towers of CLIP: PickScore, HPS, CLIPScore, CLIP-I, CLIP-T and the aesthetic head stand on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import read_config
from pipelines.scores.scorers.text import ClipTokens, clean_as_open_clip
from pipelines.scores.scorers.trunks.trunk import DAMAGED, ImageTrunk, TextTrunk, check_weights, load_pretrained, shared

OPENAI = "quick_gelu"
PLAIN = "gelu"


class ClipImages(ImageTrunk):
    """The vision tower with its projection: B, D, not normalised."""

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the projected class token."""
        embeds_BD: Tensor = self.model(pixel_values=pixels_BCHW).image_embeds
        return embeds_BD


class ClipTexts(TextTrunk):
    """The text tower with its projection: B, D, not normalised."""

    def __init__(self, key: tuple[str, ...], model: Any, device: torch.device, tokens: ClipTokens) -> None:
        super().__init__(key, model, device)
        self._tokens = tokens

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, list[float]]:
        """Return the projected end token."""
        ids_BS, cut_ratios = self._tokens(prompts)
        embeds_BD: Tensor = self.model(input_ids=ids_BS.to(self.device)).text_embeds
        return embeds_BD, cut_ratios


def load_images(folder: Path, preprocessing: str, hidden_act: str, device: Any) -> ClipImages:
    """Load the vision tower of a CLIP model.

    Args:
        folder: The part's folder.
        preprocessing: The name of the preprocessing.
        hidden_act: The activation that the weights were trained with.
        device: A torch device.

    Raises:
        ModelError: Weights are missing or damaged, or the configuration names another activation.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    place = torch.device(device)
    key = ("clip-images", hidden_act, check_weights(folder))

    def build() -> Any:
        config = _tower_config(CLIPVisionConfig, folder, "vision_config", hidden_act)
        return load_pretrained(CLIPVisionModelWithProjection, folder, config)

    model = shared(("model", *key), place, build)
    return shared((*key, preprocessing), place, lambda: ClipImages((*key, preprocessing), preprocessing, model, place))


def load_texts(folder: Path, tokenizer: Path, hidden_act: str, device: Any, *, as_open_clip: bool = False) -> ClipTexts:
    """Load the text tower of a CLIP model.

    Args:
        folder: The part's folder.
        tokenizer: The folder of the tokenizer.
        hidden_act: The activation that the weights were trained with.
        device: A torch device.
        as_open_clip: Whether prompts are cleaned as open_clip does, with ftfy.

    Raises:
        ModelError: Weights are missing or damaged, or the configuration names another activation.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    place = torch.device(device)
    key = ("clip-texts", hidden_act, check_weights(folder), "open_clip" if as_open_clip else "plain")

    def build() -> ClipTexts:
        config = _tower_config(CLIPTextConfig, folder, "text_config", hidden_act)
        model = load_pretrained(CLIPTextModelWithProjection, folder, config)
        return ClipTexts(key, model, place, ClipTokens(tokenizer, clean_as_open_clip if as_open_clip else None))

    return shared(key, place, build)


def logit_scale(folder: Path) -> float:
    """Return the factor before the cosine in the model's logits.

    Raises:
        ModelError: The weights have none.
    """
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        if "logit_scale" not in opened.keys():  # noqa: SIM118 - no mapping
            raise ModelError(f"{folder} has no logit_scale", "is it a whole CLIP model?")
        return float(opened.get_tensor("logit_scale").float().exp())


def _tower_config(config_class: Any, folder: Path, tower: str, hidden_act: str) -> Any:
    """Return the configuration of one tower, with the size of the shared space from the whole model's.

    Published towers repeat that size, and some repeat a default instead. OpenAI's weights need QuickGELU, and with
    plain GELU give other numbers without a word. A published tower without an activation has the class's default.

    Raises:
        ModelError: The configuration names another activation, or is not CLIP's.
    """
    whole = read_config(folder / "config.json")
    config = whole.get(tower)
    if not isinstance(config, dict) or "projection_dim" not in whole:
        raise ModelError(f"{folder / 'config.json'} is not the configuration of a CLIP model: no {tower}", DAMAGED)
    if (found := config.get("hidden_act", OPENAI)) != hidden_act:
        raise ModelError(
            f"{folder / 'config.json'} says hidden_act {found}, but these weights were trained with {hidden_act}",
            f'fetch the part again, or set "hidden_act": "{hidden_act}"',
        )
    try:
        return config_class(**{**config, "projection_dim": whole["projection_dim"]})
    except Exception as error:  # transformers checks the values of a configuration with errors of its own
        text = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{folder / 'config.json'} is not the configuration of a CLIP model: {text}", DAMAGED
        ) from error
