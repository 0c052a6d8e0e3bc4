"""Small things that tests are made with: preference parquet and random pipelines; the same every time."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Row = dict[str, Any]

PICKAPIC_SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("has_label", pa.bool_()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("user_id", pa.int64()),
    ]
)
"""The columns of Pick-a-Pic that ingest reads."""

WORDS = ("a", "photo", "of", "cat", "dog", "red", "blue", "house", "tree", "on", "the", "hill", "at", "night")
SIZES = ((64, 64), (80, 60), (60, 80), (96, 48), (70, 70))
"""Height and width of images, in turn."""

DAMAGE: tuple[Callable[[Row], Row], ...] = (
    lambda row: {"jpg_0": row["jpg_0"][: len(row["jpg_0"]) // 2]},
    lambda row: {"jpg_1": b"<html>404 Not Found</html>"},
    lambda row: {"jpg_1": None},
    lambda row: {"caption": None},
)
"""The ways in which a row is damaged, in turn."""


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A smooth coloured picture."""
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def photo_pairs(
    num_rows: int,
    *,
    seed: int = 0,
    num_ties: int = 0,
    num_damaged: int = 0,
    num_prompts: int | None = None,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> list[Row]:
    """Sound rows, then ties, then damaged rows.

    Args:
        num_rows: All of them together.
        seed: Other seeds give other images and prompts.
        num_ties: Rows with 0.5 and 0.5.
        num_damaged: Rows damaged in the ways of `DAMAGE`, in turn.
        num_prompts: Distinct prompts, used in turn; by default each row has its own.
        sizes: Height and width of both images of a row, in turn.
    """
    rng = np.random.default_rng(seed)
    prompts = [f"{' '.join(rng.choice(WORDS, 5))} {seed} {i}" for i in range(num_prompts or num_rows)]
    rows: list[Row] = []
    for index in range(num_rows):
        height, width = sizes[index % len(sizes)]
        row: Row = {"caption": prompts[index % len(prompts)], "has_label": True, "user_id": index % 7}
        row |= {f"jpg_{side}": encoded(picture(rng, height, width), quality=90) for side in (0, 1)}
        label = 0.5 if num_rows - num_damaged - num_ties <= index < num_rows - num_damaged else float(rng.integers(2))
        rows.append(row | {"label_0": label, "label_1": 1 - label})
    for number, row in enumerate(rows[num_rows - num_damaged :]):
        row |= DAMAGE[number % len(DAMAGE)](row)
    return rows


def write_parquet(file: Path, rows: list[Row], row_group_size: int = 64) -> Path:
    """Rows as a Pick-a-Pic parquet file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=PICKAPIC_SCHEMA), file, row_group_size=row_group_size)
    return file


def new_tokenizer(pad_token: str, seed_text: Sequence[str] = WORDS) -> Any:
    """A byte-level BPE of CLIP's kind in which each word of `seed_text` is one token."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    rules, letters = CLIPTokenizer().backend_tokenizer, sorted(ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    options: dict[str, Any] = {"end_of_word_suffix": "</w>", "initial_alphabet": letters, "show_progress": False}
    trained.train_from_iterator([" ".join(seed_text)] * 3, trainers.BpeTrainer(vocab_size=640, **options))
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    pieces = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)])
    vocab = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def new_pipeline(*, force_zeros: bool = True, seed: int = 0) -> Any:
    """SDXL's architecture with about 0.2 million random weights: VAE of factor 4, UNet of three levels."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizers = new_tokenizer("<|endoftext|>"), new_tokenizer("!")
    configs = [
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
            num_hidden_layers=3, num_attention_heads=2, hidden_act=activation, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
        for tokenizer, width, activation in zip(tokenizers, (16, 24), ("quick_gelu", "gelu"), strict=True)
    ]  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 2, 4),
        cross_attention_dim=40, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 24,
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=4, sample_size=64, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.13025, force_upcast=False,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
        text_encoder=CLIPTextModel(configs[0]), text_encoder_2=CLIPTextModelWithProjection(configs[1]),
        force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
    )  # fmt: skip


def new_sd15_pipeline(*, seed: int = 0) -> Any:
    """Stable Diffusion 1.5's architecture with about 0.1 million random weights: one text encoder, nothing pooled."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = new_tokenizer("<|endoftext|>")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=3,
            num_attention_heads=2, hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
        cross_attention_dim=32,
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=4, sample_size=64, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.18215,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
