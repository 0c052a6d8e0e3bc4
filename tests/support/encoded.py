"""A small encoded data set written straight to tables and tars, for tests of training alone."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import safetensors.torch
import torch

from pipelines.dataset.layout import LATENTS_SCHEMA, TEXT_SCHEMA, latents_table, pairs_table, text_table
from pipelines.dataset.pair import (
    JUDGED,
    NULL_PROMPT_ID,
    PAIR,
    PAIRS_SCHEMA,
    PRIOR,
    pair_key,
    prompt_id,
    single_key,
)
from pipelines.dataset.shard import write_shard
from pipelines.dataset.storage import Storage
from training.spec import Snapshot

LATENTS, TEXT = "a" * 32, "b" * 32
TOKENS, EMBEDDING, POOLED = 77, 32, 16


def write_encoded(
    storage: Storage,
    work: Path,
    *,
    num_train: int = 24,
    num_validation: int = 6,
    sides: tuple[int, ...] = (8,),
    labels: tuple[float, ...] = (0.0, 1.0),
    dtype: torch.dtype = torch.float16,
    pooled: bool = True,
    num_shards: int = 1,
    flips: bool = False,
    include_empty_prompt: bool = False,
    num_judged: int = 0,
    num_judged_validation: int = 0,
    num_prior: int = 0,
    weights: tuple[float | None, ...] = (None,),
) -> Snapshot:
    """Pairs whose chosen latents are near +1 and rejected near -1, image 0 being chosen in a tie.

    Args:
        storage: Where tables and shards go.
        work: A local folder for what is not there yet.
        num_train: Training pairs.
        num_validation: Held-out pairs.
        sides: Of the latents: square buckets, which pairs have in turn.
        labels: The pairs have these in turn.
        dtype: What everything is stored in.
        pooled: Whether prompts have a pooled embedding; those of SD 1.5 have none.
        num_shards: Of the latents; a pair's is its number modulo this.
        flips: Whether mirrored images have latents too; those of an image are its own mirrored, and 3 more.
        include_empty_prompt: Whether the embedding of "" is stored.
        num_judged: Single training images, good ones near +1 and bad ones near -1 in turn.
        num_judged_validation: The same, held out.
        num_prior: Training images of a class, near +2, for prior preservation.
        weights: Rows have these in turn.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [f"prompt {i}" for i in range(4)]
    pairs, members = [], []
    num_pairs, num_singles = num_train + num_validation, num_judged + num_judged_validation
    kinds = [PAIR] * num_pairs + [JUDGED] * num_singles + [PRIOR] * num_prior
    held_out = {*range(num_train, num_pairs), *range(num_pairs + num_judged, num_pairs + num_singles)}
    for i, kind in enumerate(kinds):
        digests = [hashlib.sha256(f"{i}/{side}".encode()).hexdigest() for side in (0, 1)]
        prompt, label = prompts[i % len(prompts)], labels[i % len(labels)]
        size = sides[i % len(sides)]
        if kind == PAIR:
            key, signs = pair_key(prompt, *digests), (1.0, -1.0) if label >= 0.5 else (-1.0, 1.0)
        else:
            label = 1.0 if kind == PRIOR else float(i % 2)
            key, signs = single_key(prompt, digests[0]), (2.0 if kind == PRIOR else 2 * label - 1,)
        tensors = {
            f"latents_{side}": (sign + 0.1 * torch.randn(4, size, size, generator=generator)).to(dtype)
            for side, sign in enumerate(signs)
        }
        time_ids = json.dumps([8 * size, 8 * size, 0, 0, 8 * size, 8 * size])
        metadata = {f"time_ids_{side}": time_ids for side in range(len(signs))}
        if flips:
            tensors |= {f"flipped_{side}": tensors[f"latents_{side}"].flip(-1) + 3 for side in range(len(signs))}
            metadata |= {
                f"flipped_time_ids_{side}": json.dumps([8 * size, 8 * size, 0, 1, 8 * size, 8 * size])
                for side in range(len(signs))
            }
        data = safetensors.torch.save(tensors, metadata)
        members.append((f"{key}.safetensors", data))
        row = dict.fromkeys(PAIRS_SCHEMA.names)
        row.update(pair_key=key, prompt=prompt, prompt_id=prompt_id(prompt), label_0=label, status="kept")
        row.update(split="validation" if i in held_out else "train", source="test", source_uri="memory", source_row=i)
        row.update(unit="unit", width_0=8 * size, height_0=8 * size)
        row.update(kind=None if kind == PAIR else kind, weight=weights[i % len(weights)])
        pairs.append(row)
    pairs_table(storage).append("unit", pa.Table.from_pylist(pairs, PAIRS_SCHEMA))
    sizes = [row["width_0"] for row in pairs]
    table = latents_table(storage, LATENTS)
    for number in range(num_shards):
        mine, unit = slice(number, None, num_shards), f"unit-{number}" if number else "unit"
        _commit(storage, work, table, f"dataset/latents/{LATENTS}/{unit}.tar", unit, members[mine], sizes[mine])
    texts = []
    for identity in [NULL_PROMPT_ID, *map(prompt_id, [*prompts, ""] if include_empty_prompt else prompts)]:
        scale = 0.0 if identity == NULL_PROMPT_ID else 1.0
        tensors = {"prompt_embeds": (scale * torch.randn(TOKENS, EMBEDDING, generator=generator)).to(dtype)}
        if pooled:
            tensors["pooled_prompt_embeds"] = (scale * torch.randn(POOLED, generator=generator)).to(dtype)
        texts.append((f"{identity}.safetensors", safetensors.torch.save(tensors)))
    _commit(storage, work, text_table(storage, TEXT), f"dataset/text/{TEXT}/unit.tar", "unit", texts, None)
    return Snapshot(0, LATENTS, num_shards - 1, TEXT, 0)


def _commit(storage, work, table, shard, unit, members, sizes):
    file = work / "shard.tar"
    written, num_bytes, sha256 = write_shard(file, members)
    storage.upload(shard, file)
    rows = []
    for position, member in enumerate(written):
        row = dict.fromkeys(table.schema.names)
        row.update(status="kept", unit=unit, shard=shard, shard_bytes=num_bytes, shard_sha256=sha256)
        row.update(offset=member.offset, length=member.length, sha256=member.sha256, crc32=member.crc32)
        key = member.name.split(".")[0]
        if sizes is None:
            row.update(prompt_id=key, num_tokens=3)
        else:
            row.update(pair_key=key, bucket_height=sizes[position], bucket_width=sizes[position])
        rows.append(row)
    schema = TEXT_SCHEMA if sizes is None else LATENTS_SCHEMA
    table.append(unit, pa.Table.from_pylist(rows, schema))


def write_base(folder: Path, channels: tuple[int, int] = (16, 32), first_up_block: str = "UpBlock2D") -> Path:
    """The parts of an SDXL pipeline that training reads: a tiny UNet, a noise schedule, a VAE's configuration."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=(first_up_block, "UpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=EMBEDDING,
        attention_head_dim=8,
        transformer_layers_per_block=1,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
        use_linear_projection=True,
    )
    unet.save_pretrained(folder / "unet")
    EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.5, "_class_name": "AutoencoderKL"}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    return folder
