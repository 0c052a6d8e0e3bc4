"""BLIP's answers to questions about an image: how probable is yes beside no?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import read_config
from pipelines.scores.parts import MODEL
from pipelines.scores.scorers.images import VQA_SIDE
from pipelines.scores.scorers.text import BertTokens
from pipelines.scores.scorers.trunks.blip import BlipImages, below
from pipelines.scores.scorers.trunks.trunk import (
    CHUNK,
    DAMAGED,
    check_float32,
    check_weights,
    frozen,
    full_precision,
    load_state,
    shared,
)

ENCODE, DECODE = 30523, 30522
"""Ids of [ENC], which takes the place of a question's first mark, and of [DEC], which the answer begins with."""
YES, NO = 2748, 2053
"""Ids of the two answers."""


class YesHead:
    """The encoder of questions with cross attention to an image, and the decoder of answers.

    Args:
        encoder: The question's encoder.
        decoder: The answer's decoder, with scores of words.
        tokens: BERT's tokenizer.
        device: The device of the images' states.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, tokens: BertTokens, device: torch.device) -> None:
        self._encoder, self._decoder = frozen(encoder, device), frozen(decoder, device)
        self._tokens, self._device = tokens, device

    def __call__(self, states_BSD: Tensor, rows: Sequence[int], questions: Sequence[str]) -> list[float]:
        """Return for each question p(yes) / (p(yes) + p(no)), where p is over the first word of the answer.

        Questions of one length go together and none is padded: transformers 5.23 drops the mask of what is attended to.

        Args:
            states_BSD: States of images.
            rows: The image of each question.
            questions: The questions, cleaned.
        """
        check_float32(self._encoder)
        check_float32(self._decoder)
        found = [0.0] * len(questions)
        if not questions:
            return found
        ids_BS, mask_BS, _ = self._tokens(questions)
        ids_BS[:, 0] = ENCODE
        lengths = mask_BS.sum(dim=1).tolist()
        with full_precision(self._device):
            for length in sorted(set(lengths)):
                places = [place for place, each in enumerate(lengths) if each == length]
                for start in range(0, len(places), CHUNK):
                    chunk = places[start : start + CHUNK]
                    images_BSD = states_BSD[[rows[place] for place in chunk]]
                    answers = self.answer(ids_BS[chunk, :length].to(self._device), images_BSD)
                    for place, share in zip(chunk, answers.tolist(), strict=True):
                        found[place] = share
        return found

    def answer(self, ids_BS: Tensor, images_BSD: Tensor) -> Tensor:
        """Return p(yes) / (p(yes) + p(no)) of questions of one length, B."""
        questions_BSD = self._encoder(
            input_ids=ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            encoder_hidden_states=images_BSD,
            is_decoder=False,  # the configuration's True adds cross attention; this keeps attention two-sided
        ).last_hidden_state
        start_B1 = torch.full((len(ids_BS), 1), DECODE, device=ids_BS.device)
        logits_BV = self._decoder(input_ids=start_B1, encoder_hidden_states=questions_BSD, use_cache=False).logits[:, 0]
        shares_B: Tensor = (logits_BV[:, YES] - logits_BV[:, NO]).sigmoid()
        return shares_B


def load_blip_vqa(folder: Path, tokenizer: Path, preprocessing: str, device: Any) -> tuple[BlipImages, YesHead]:
    """Load BLIP for questions.

    Args:
        folder: The part's folder, as `conversions` writes it.
        tokenizer: The folder of BERT's vocabulary.
        preprocessing: The name of the preprocessing.
        device: A torch device.

    Raises:
        ModelError: Weights are missing, damaged or of another shape, or for images of another size.
    """
    from transformers import BlipTextConfig, BlipTextLMHeadModel, BlipTextModel, BlipVisionConfig, BlipVisionModel

    place = torch.device(device)
    key = ("blip-vqa-images", check_weights(folder), preprocessing)
    config, state = read_config(folder / "config.json"), load_file(folder / MODEL)
    try:
        text_config = BlipTextConfig(**config["text_config"])
        vision_config = BlipVisionConfig(**config["vision_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder} is not a converted BLIP for questions: {error}", DAMAGED) from error
    if vision_config.image_size != VQA_SIDE:
        raise ModelError(
            f"{folder} is for images of {vision_config.image_size} pixels, but T2I-CompBench's BLIP sees {VQA_SIDE}",
            "take model_base_vqa_capfilt_large.pth from its publisher: `mapo scorers fetch blip-vqa`",
        )

    def build() -> BlipImages:
        vision = load_state(BlipVisionModel(vision_config), below(state, "vision_model."), folder)
        return BlipImages(key, preprocessing, vision, place)

    encoder = load_state(BlipTextModel(text_config, add_pooling_layer=False), below(state, "text_encoder."), folder)
    decoder = load_state(BlipTextLMHeadModel(text_config), below(state, "text_decoder."), folder)
    return shared(key, place, build), YesHead(encoder, decoder, BertTokens(tokenizer), place)
