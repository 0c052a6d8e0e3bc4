"""Qwen's vision-language models as judges: an image and a text in, the state of a token or the next token out.

Letters: B images, S tokens, D width of the model, V vocabulary, P patches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from pipelines.dataset.errors import ModelError
from pipelines.dataset.safetensors_header import check_safetensors
from pipelines.scores.parts import PARTS
from pipelines.scores.scorers.trunks.trunk import (
    DAMAGED,
    check_float32,
    frozen,
    full_precision,
    load_pretrained,
    shared,
)
from pipelines.scores.weights import files_digest, files_of

CHUNK = 8
"""Number of images in one forward pass."""
IMAGE = "<|image_pad|>"


class QwenPrompts:
    """Images and texts as a model of Qwen takes them: the published template, one image first, padded on the right.

    The models are causal, so that what follows a token changes nothing before it; padding there is never seen.

    Args:
        folder: The part with the tokenizer and its template, and the settings of the image processor.
        marks: Tokens that the published tokenizer lacks.

    Raises:
        ModelError: The folder has no such tokenizer.
    """

    def __init__(self, folder: Path, marks: Sequence[str] = ()) -> None:
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = _read(AutoTokenizer.from_pretrained, folder)
        self.processor = _read(Qwen2VLImageProcessorPil.from_pretrained, folder)
        if marks:
            self.tokenizer.add_tokens(list(marks), special_tokens=True)
        self._marks = [IMAGE, *self.tokenizer.get_added_vocab()]
        self._image = self.token(IMAGE)
        if not self.tokenizer.chat_template:
            raise ModelError(f"the tokenizer of {folder} has no chat template", DAMAGED)

    def token(self, text: str) -> int:
        """Return the id of a token.

        Raises:
            ModelError: The tokenizer has no such token.
        """
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ModelError(f"the tokenizer has no token {text}, but reads it as {len(ids)}", DAMAGED)
        return int(ids[0])

    def mark_in(self, prompt: str) -> str | None:
        """Return a mark of the model that a prompt contains, which would break the template; None without one."""
        return next((mark for mark in self._marks if mark in prompt), None)

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], **settings: Any) -> dict[str, Tensor]:
        """Return the inputs of a model for images, each with its text.

        Args:
            images: The images, RGB.
            texts: One text for each.
            settings: Settings of the image processor other than the published ones.
        """
        prepared = self.processor(images=list(images), return_tensors="pt", **settings)
        merged = self.processor.merge_size**2
        counts = (prepared["image_grid_thw"].prod(dim=-1) // merged).tolist()
        rows = [
            self.tokenizer(self._chat(text).replace(IMAGE, IMAGE * count, 1), add_special_tokens=False).input_ids
            for text, count in zip(texts, counts, strict=True)
        ]
        length = max(map(len, rows))
        padding = self.tokenizer.pad_token_id or 0
        ids_BS = torch.tensor([[*row, *[padding] * (length - len(row))] for row in rows])
        mask_BS = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return {
            "input_ids": ids_BS,
            "attention_mask": mask_BS,
            "mm_token_type_ids": (ids_BS == self._image).long(),
            "pixel_values": prepared["pixel_values"],
            "image_grid_thw": prepared["image_grid_thw"],
        }

    def _chat(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        found: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return found


def _read(load: Callable[..., Any], folder: Path) -> Any:
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    try:
        return load(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers have no common tree
        text = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"cannot load the processor of {folder}: {text}", DAMAGED) from error


class QwenVl:
    """A model with its prompts.

    Args:
        model: The model, in float32.
        prompts: Its prompts.
        device: A torch device.
    """

    def __init__(self, model: nn.Module, prompts: QwenPrompts, device: torch.device) -> None:
        self.model: Any = frozen(model, device)
        self.prompts, self.device = prompts, device
        self.num_forwards = 0

    def passes(
        self, images: Sequence[Image.Image], texts: Sequence[str], **settings: Any
    ) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        """Yield for each few images the inputs and the states of the model below its head; see `QwenPrompts`.

        Logits of all tokens would take 5 GB for eight images: the caller applies the head to the states that it needs.
        """
        check_float32(self.model)
        for start in range(0, len(images), CHUNK):
            chunk = slice(start, start + CHUNK)
            given = self.prompts(images[chunk], texts[chunk], **settings)
            inputs = {name: tensor.to(self.device) for name, tensor in given.items()}
            with full_precision(self.device):
                yield inputs, self.model.base_model(**inputs, use_cache=False).last_hidden_state
            self.num_forwards += 1


class ChatModel(QwenVl):
    """A model with its head over the vocabulary."""

    def first_tokens(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Iterator[Tensor]:
        """Yield for each few images the probabilities of the first token of the answer: B, V."""
        for inputs, states_BSD in self.passes(images, texts):
            last_B = inputs["attention_mask"].sum(dim=-1) - 1
            states_BD = states_BSD[torch.arange(len(states_BSD), device=states_BSD.device), last_B]
            yield self.model.get_output_embeddings()(states_BD).softmax(dim=-1)


def check_part(folder: Path, part: str) -> str:
    """Check the weights of a part that was published in bfloat16, and return their digest.

    Raises:
        ModelError: A file is damaged.
    """
    names = files_of(part)
    for name in names:
        if name.endswith(".safetensors"):
            check_safetensors(folder / name)
    assert PARTS[part].is_bfloat16
    return files_digest(folder, names)


def load_chat_model(folder: Path, part: str, processor: Path, device: Any) -> ChatModel:
    """Load a whole model with its head over the vocabulary; its configuration says which class it is.

    Args:
        folder: The part's folder.
        part: The part's name.
        processor: The folder of its tokenizer and image processor.
        device: A torch device.

    Raises:
        ModelError: Weights are missing or damaged.
    """
    from transformers import AutoModelForImageTextToText

    place = torch.device(device)
    key = ("qwen-vl", check_part(folder, part))
    model = shared(key, place, lambda: load_pretrained(AutoModelForImageTextToText, folder))
    return ChatModel(model, QwenPrompts(processor), place)


def read_tensors(file: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Return some tensors of a safetensors file, as float32.

    Raises:
        ModelError: The file lacks one.
    """
    with safe_open(file, framework="pt") as opened:
        if missing := set(names) - set(opened.keys()):
            raise ModelError(f"{file} lacks {len(missing)} tensors, such as {sorted(missing)[0]}", DAMAGED)
        return {name: opened.get_tensor(name).float() for name in names}
