"""The demo's base model: a small pipeline with SDXL's architecture, trained on the plain photos.

`python -m orchestration.demo.base OUT_DIR` trains it again from scratch (about half an hour on two cores);
the result is in `BASE_MODEL` and comes with the package.
"""

import argparse
import hashlib
import json
import logging
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.demo.scenes import RESOLUTION, scenes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

BASE_MODEL = Path(__file__).parent / "base_model"
"""The shipped folder: a `StableDiffusionXLPipeline`, less than 6 MB."""

MAX_FOLDER_BYTES = 6_000_000
VOCABULARY_SIZE = 640
PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "pillow", "scikit-image")
Recipe = dict[str, object]
"""The content of `recipe.json` in the shipped folder."""
TEXT_WIDTHS = (32, 64)
"""Hidden sizes of the two text encoders; the UNet attends to both side by side."""


def new_tokenizer(pad_token: str) -> "CLIPTokenizer":
    """Train a byte-level BPE tokenizer on the captions.

    Args:
        pad_token: The token that pads a prompt to 77 tokens: `<|endoftext|>` for SDXL's first, `!` for its second.
    """
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    rules = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, end_of_word_suffix="</w>", initial_alphabet=_byte_alphabet(), show_progress=False
    )
    bpe.train_from_iterator([scene.caption for scene in scenes()], trainer)
    trained = json.loads(bpe.to_str())["model"]
    pieces = _byte_alphabet() + [letter + "</w>" for letter in _byte_alphabet()]
    merges = [tuple(pair) for pair in trained["merges"]]
    pieces += [left + right for left, right in merges if left + right not in pieces]
    vocab = {piece: position for position, piece in enumerate([*pieces, start, end])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77, do_lower_case=True)


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def new_unet() -> "UNet2DConditionModel":
    """Build the untrained UNet: SDXL's three levels, text and time conditions, with few channels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(48, 48, 64),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTHS[1],
    )


def new_vae() -> "AutoencoderKL":
    """Build the untrained VAE: four latent channels, one latent pixel for 4 x 4 image pixels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4,
        sample_size=RESOLUTION,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        force_upcast=False,
    )


def new_pipeline() -> "StableDiffusionXLPipeline":
    """Build every part of the pipeline, untrained."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizers = (new_tokenizer("<|endoftext|>"), new_tokenizer("!"))
    configs = [
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for tokenizer, width, activation in zip(tokenizers, TEXT_WIDTHS, ("quick_gelu", "gelu"), strict=True)
    ]
    return StableDiffusionXLPipeline(
        vae=new_vae(),
        text_encoder=CLIPTextModel(configs[0]),
        text_encoder_2=CLIPTextModelWithProjection(configs[1]),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=new_unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def make(folder: Path) -> Recipe:
    """Train the whole pipeline and save it, with its `recipe.json`.

    Args:
        folder: The folder to write; files with the same names are replaced.

    Returns:
        The content of `recipe.json`.

    Raises:
        ValueError: The folder is larger than `MAX_FOLDER_BYTES`.
    """
    import torch

    from orchestration.demo import base_training

    torch.manual_seed(base_training.SEED)
    pipeline = new_pipeline()
    figures = {"vae": base_training.train_vae(pipeline.vae), "unet": base_training.train_unet(pipeline)}
    settings = {name: value for name, value in vars(base_training).items() if name.isupper()}
    return save(pipeline, folder, settings, figures)


def save(
    pipeline: "StableDiffusionXLPipeline", folder: Path, settings: Mapping[str, object], figures: Mapping[str, object]
) -> Recipe:
    """Save a trained pipeline and its recipe.

    UNet and VAE are stored in float16, which diffusers loads as float32. The text encoders stay in float32, because
    transformers would load them in the stored type.

    Returns:
        The content of `recipe.json`: settings, versions, parameter counts, training figures and a sha256 per file.

    Raises:
        ValueError: The folder is larger than `MAX_FOLDER_BYTES`.
    """
    import torch

    for part in (pipeline.unet, pipeline.vae):
        part.to(torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "recipe.json")
    parts = ("vae", "unet", "text_encoder", "text_encoder_2")
    recipe: Recipe = {
        "settings": settings,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "num_parameters": {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in parts},
        "figures": figures,
        "sha256": {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if num_bytes > MAX_FOLDER_BYTES:
        raise ValueError(f"{folder} has {num_bytes:,} bytes; the limit is {MAX_FOLDER_BYTES:,}")
    return recipe


def main(arguments: list[str]) -> None:
    """Entry point of `python -m orchestration.demo.base`."""
    parser = argparse.ArgumentParser(description="Train the demo's base model from scratch.")
    parser.add_argument("out_dir", type=Path, help="folder for the pipeline")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = make(parser.parse_args(arguments).out_dir)
    print(json.dumps({key: recipe[key] for key in ("num_parameters", "figures")}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
