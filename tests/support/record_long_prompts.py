"""Record how compel embeds prompts of more than 77 tokens, for tests that need none of it.

    PYTHONPATH=tests/support:PACKAGES python tests/support/record_long_prompts.py

PACKAGES holds compel 2.5.1 (MIT) and pyparsing. Chunks are cut at the same token as by truncation
(`SplitLongTextMode.BRUTAL`) and filled up with compel's own padding, the embedding of "".
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from compel import Compel, ReturnedEmbeddingsType  # type: ignore[import-not-found]
from compel.embeddings_provider import SplitLongTextMode  # type: ignore[import-not-found]
from long_prompts import LENGTH, LONG_PROMPTS, NUM_CHUNKS, RECORDED, thinned, write_pipeline
from safetensors.torch import save_file

PENULTIMATE = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
LAST = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED


def embed(compel: Compel, prompt: str) -> torch.Tensor:
    """Return the embedding of the prompt in exactly NUM_CHUNKS chunks: S, D."""
    size = NUM_CHUNKS * LENGTH
    found = compel.build_conditioning_tensor(prompt)
    found = found[0] if isinstance(found, tuple) else found
    longer = torch.zeros(1, size, found.shape[-1])
    padded: list[torch.Tensor] = compel.pad_conditioning_tensors_to_same_length([found, longer])
    return padded[0][0, :size]


def record(kind: str, pipeline: Any) -> dict[str, torch.Tensor]:
    """Return the embeddings of all prompts by one pipeline."""
    options: dict[str, Any] = {"truncate_long_prompts": False, "split_long_text_mode": SplitLongTextMode.BRUTAL}
    if kind == "sdxl":
        first = Compel(pipeline.tokenizer, pipeline.text_encoder, returned_embeddings_type=PENULTIMATE, **options)
        second = Compel(
            pipeline.tokenizer_2, pipeline.text_encoder_2, returned_embeddings_type=PENULTIMATE, requires_pooled=True,
            **options,
        )  # fmt: skip
        encoders = [first, second]
    else:
        encoders = [Compel(pipeline.tokenizer, pipeline.text_encoder, returned_embeddings_type=LAST, **options)]
    found = {}
    for name, prompt in LONG_PROMPTS.items():
        embeds = torch.cat([embed(each, prompt) for each in encoders], dim=-1)
        found[f"{kind}.{name}.prompt_embeds"] = thinned(embeds)
        if kind == "sdxl":
            found[f"{kind}.{name}.pooled_prompt_embeds"] = second.build_conditioning_tensor(prompt)[1][0].clone()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorded: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        for kind in ("sdxl", "sd15"):
            recorded |= record(kind, write_pipeline(kind, Path(scratch) / kind))
    RECORDED.parent.mkdir(parents=True, exist_ok=True)
    save_file(recorded, RECORDED)
