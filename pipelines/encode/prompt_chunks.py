"""Prompts longer than a text encoder reads, in chunks of as many tokens as it takes (75 for CLIP), each embedded alone.

Letters: N chunks, S tokens of a chunk with both end marks (77), D embedding size.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.dataset.model_files import SDXL, Family

Piece = tuple[Sequence[int], ...]
"""The tokens of one chunk without end marks, for each tokenizer of the family."""


class ChunkEncoder:
    """Encoder of everything that `encode_prompt` cuts off, with the layers that it takes.

    A prompt is cut at the same token as by truncation, also inside a word. A chunk that a prompt does not fill is the
    embedding of "".

    Args:
        pipeline: The pipeline with its text encoders, on their device.
        family: Its family.
        num_chunks: Number of chunks of every prompt, with the first.
    """

    def __init__(self, pipeline: Any, family: Family, num_chunks: int) -> None:
        self._pipeline, self._num_chunks, self._is_sdxl = pipeline, num_chunks, family is SDXL
        self._tokenizers = [getattr(pipeline, name) for name in family.tokenizers]
        self._encoders = [getattr(pipeline, name) for name in family.text_encoders]
        with torch.no_grad():
            self._empty_SD: Tensor = self._embed([((),) * len(self._tokenizers)])[0]

    @torch.no_grad()
    def after_first(self, prompts: list[str]) -> Tensor:
        """Embed the second and later chunks of prompts, in passes of no more chunks than there are prompts.

        Returns:
            One row per prompt: prompts, (num_chunks - 1) * S, D; on the encoders' device.
        """
        found = self._empty_SD.repeat(len(prompts), self._num_chunks - 1, 1, 1)  # prompts, chunks, S, D
        pieces = list(self._pieces(prompts))
        for start in range(0, len(pieces), len(prompts)):
            rows, places, part = zip(*pieces[start : start + len(prompts)], strict=True)
            found[list(rows), list(places)] = self._embed(part)
        return found.flatten(1, 2)

    def _pieces(self, prompts: list[str]) -> Iterator[tuple[int, int, Piece]]:
        """Yield the row, the place and the tokens of every chunk after the first that is not empty."""
        tokens = [self._tokens(tokenizer, prompts) for tokenizer in self._tokenizers]
        length = self._tokenizers[0].model_max_length - 2  # the same of both, see `base_text`
        for row, of_prompt in enumerate(zip(*tokens, strict=True)):
            for place in range(self._num_chunks - 1):
                start = (place + 1) * length
                piece = tuple(ids[start : start + length] for ids in of_prompt)
                if any(piece):
                    yield row, place, piece

    def _tokens(self, tokenizer: Any, prompts: list[str]) -> list[list[int]]:
        """Return the tokens of prompts as `encode_prompt` finds them, before truncation and without end marks."""
        converted = self._pipeline.maybe_convert_prompt(prompts, tokenizer)
        return [ids[1:-1] for ids in tokenizer(converted).input_ids]

    def _embed(self, pieces: Sequence[Piece]) -> Tensor:
        """Embed chunks in one pass: N, S, D."""
        each = zip(self._tokenizers, self._encoders, zip(*pieces, strict=True), strict=True)
        return torch.cat([self._hidden_states(*of_encoder) for of_encoder in each], dim=-1)

    def _hidden_states(self, tokenizer: Any, encoder: Any, pieces: Sequence[Sequence[int]]) -> Tensor:
        marked = [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in pieces]
        padded = tokenizer.pad(
            {"input_ids": marked}, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).to(encoder.device)
        states: Tensor
        if self._is_sdxl:
            states = encoder(padded.input_ids, output_hidden_states=True).hidden_states[-2]
        else:
            takes_mask = getattr(encoder.config, "use_attention_mask", False)
            states = encoder(padded.input_ids, attention_mask=padded.attention_mask if takes_mask else None)[0]
        return states
