"""Prompts of one to four chunks, and pipelines with SDXL's own tokenizers whose text encoders follow from a formula."""

from pathlib import Path
from typing import Any

import torch
from factories import new_pipeline, new_sd15_pipeline
from scorer_twins import fill

TOKENIZERS = Path(__file__).parents[3] / "shared" / "sdxl"
NUM_CHUNKS, LENGTH = 3, 77
"""Chunks, and tokens of a chunk with both end marks."""
RECORDED = Path(__file__).parents[1] / "data" / "text" / "long_prompts.safetensors"
SCENE = (
    "an ultrawide photograph of a lighthouse keeper who repaints the weatherbeaten staircase of a lighthouse, "
    "chiaroscuro, kodachrome, cinematic volumetric lighting, seagulls above the archipelago, "
)
LONG_PROMPTS = {
    "no token": "",
    "short": "a red fox in the snow",
    "one chunk": " ".join(["cat"] * 75),
    "one token more": " ".join(["cat"] * 75 + ["dog"]),
    "cut inside a word": "in a chiaroscuro, " + SCENE * 5,
    "two chunks": " ".join(["cat", "dog", "owl"] * 50),
    "emoji over the border": "the " * 74 + "🐈🌃 " * 30,
    "CJK": "山上の猫、夜 고양이 " * 12,
    "longer than all chunks": " ".join(["red", "blue"] * 200),
}
"""None has characters that weigh words in other tools, such as parentheses."""
ROWS = (0, 1, 2, 37, 73, 74, 75, 76)
"""The tokens of each chunk that are recorded; besides them the mean of all."""


def write_pipeline(kind: str, folder: Path) -> Any:
    """Write a tiny pipeline of `sdxl` or `sd15` with SDXL's tokenizers; return it."""
    from transformers import CLIPTokenizer

    pipeline = new_pipeline() if kind == "sdxl" else new_sd15_pipeline()
    for suffix in ("", "_2") if kind == "sdxl" else ("",):
        tokenizer = CLIPTokenizer.from_pretrained(TOKENIZERS / f"tokenizer{suffix}")
        part = getattr(pipeline, f"text_encoder{suffix}")
        part.config.vocab_size = len(tokenizer)
        part.config.bos_token_id, part.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        encoder = type(part)(part.config).eval()
        fill(encoder)
        pipeline.register_modules(**{f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer})
    pipeline.save_pretrained(folder)
    return pipeline


def thinned(embeds_SD: torch.Tensor) -> torch.Tensor:
    """Return what is recorded of an embedding: some tokens of each chunk, and the mean of all; chunks, rows, D."""
    chunks = embeds_SD.unflatten(0, (-1, LENGTH))
    return torch.cat([chunks[:, list(ROWS)], chunks.mean(1, keepdim=True)], dim=1).contiguous()
