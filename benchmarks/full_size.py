"""A pipeline of SDXL's full size with random weights, written in 16 bits: `python -m benchmarks.full_size FOLDER`.

Every part is made on torch's meta device and filled in its own type, so that 7 GB of disk take 6 GB of memory.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from factories import new_pipeline

from benchmarks import gpu_peak, train_gpu_trial
from pipelines.encode.encoders import quiet_diffusers

SCALE = 0.02  # standard deviation of the weights: activations stay finite in 16 bits
VOCABULARY = 49_408


def write_full_size(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", small: bool = False
) -> None:
    """Write the pipeline; the tokenizers are tiny ones.

    Args:
        folder: Where to.
        dtype: Type of the stored weights.
        device: Where weights are drawn.
        small: Whether to write a tiny one instead, for a rehearsal.
    """
    quiet_diffusers()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    pipeline = new_pipeline()
    if not small:
        pipeline.register_modules(
            vae=filled(lambda: AutoencoderKL(**gpu_peak.VAE_CONFIG), dtype, device),
            unet=filled(lambda: UNet2DConditionModel(**train_gpu_trial.UNET_CONFIG), dtype, device),
        )
        for end, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
            tokenizer, sizes = getattr(pipeline, f"tokenizer{end}"), gpu_peak.TEXT_ENCODERS[f"text_encoder{end}"]
            marks = {each: getattr(tokenizer, each) for each in ("bos_token_id", "eos_token_id", "pad_token_id")}
            config = CLIPTextConfig(vocab_size=VOCABULARY, **sizes, **marks)
            pipeline.register_modules(
                **{f"text_encoder{end}": filled(lambda kind=kind, config=config: kind(config), dtype, device)}
            )
    pipeline.save_pretrained(folder, max_shard_size="10GB")


def filled(new_model: Any, dtype: torch.dtype, device: str) -> Any:
    """Return a model with random weights, of which no other copy ever was in memory."""
    with torch.device("meta"):
        model = new_model()
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                tensor.copy_(torch.arange(tensor.numel(), device=device).view_as(tensor))  # position ids
            elif name.endswith("weight") and tensor.ndim == 1:
                tensor.fill_(1.0)  # of a norm
            else:
                tensor.normal_(0.0, SCALE, generator=generator)
    return model


def main() -> None:
    """Write a pipeline to the folder that is named."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    write_full_size(arguments.parse_args().folder)


if __name__ == "__main__":
    main()
