"""Each image and each prompt once, ever; and nothing that was made otherwise is ever taken for it."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_steps import Counting, CountingTexts, encode_here, files_of, ingest_here
from factories import encoded, new_pipeline, photo_pairs, picture, write_parquet

from orchestration.config import RunConfig
from orchestration.driver.runner import run_stages
from pipelines.config import EncodeConfig
from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import LATENTS, TEXT, latents_table, pairs_table, text_table
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import NULL_PROMPT_ID
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, TextEncoder
from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint
from pipelines.encode.plan import pending
from pipelines.encode.stale import refusal
from pipelines.maintenance.describe import describe_encoding
from pipelines.maintenance.verify import verify
from training.config import TrainConfig

CPU = torch.device("cpu")
PAIRS_A_PROMPT = 16  # Pick-a-Pic v2: 851,293 pairs, 58,960 prompts


def test_of_one_new_shard_among_twenty_only_it_is_encoded(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    for number in range(20):
        ingest_here(storage, write_parquet(tmp_path / f"{number}.parquet", photo_pairs(2, seed=number, num_prompts=1)))
    encode_here(config, storage, vae, text)
    before = files_of(storage)
    ingest_here(storage, write_parquet(tmp_path / "new.parquet", photo_pairs(3, seed=99, num_prompts=1)))
    counting, prompts = Counting(vae), CountingTexts(text)
    todo = encode_here(config, storage, counting, prompts)
    pairs = pairs_table(storage).read().to_pylist()
    (new_shard,) = {row["shard"] for row in pairs if row["source_uri"].endswith("new.parquet")}
    assert [set(unit.rows["shard"].to_pylist()) for unit in todo.latents] == [{new_shard}]
    assert len(counting.shapes) == 6
    assert len(prompts.prompts) == 1
    after = files_of(storage)
    assert {name: after[name] for name in before} == before, "a file of before was touched"


def test_of_one_new_prompt_among_a_thousand_only_it_is_embedded(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    image, images = photo_pairs(1)[0], np.random.default_rng(0)
    others = [encoded(picture(images, 32, 32), "PNG") for _ in range(2)]
    rows = [{**image, "jpg_0": others[0], "jpg_1": others[1], "caption": f"a cat {n}"} for n in range(1000)]
    ingest_here(storage, write_parquet(tmp_path / "old.parquet", rows, row_group_size=1000))
    config = config.model_copy(update={"batch_size": 100})
    first = CountingTexts(text)
    encode_here(config, storage, vae, first)
    assert len(set(first.prompts)) == len(first.prompts) == 1000
    new = [{**row, "label_0": 1.0, "jpg_0": image["jpg_0"]} for row in rows[:20]]
    new.append({**image, "caption": "a dog 1"})
    ingest_here(storage, write_parquet(tmp_path / "new.parquet", new))
    again = CountingTexts(text)
    encode_here(config, storage, vae, again)
    assert again.prompts == ["a dog 1"]
    table = text_table(storage, text_fingerprint(config)).read(["prompt_id"])["prompt_id"].to_pylist()
    assert len(set(table)) == len(table) == 1002  # with the null conditioning
    assert NULL_PROMPT_ID in table


def test_an_image_of_many_pairs_is_read_decoded_and_encoded_once(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    """As in Pick-a-Pic, where the better image stays and meets the next."""
    rng = np.random.default_rng(0)
    images = [encoded(picture(rng, 64, 64)) for _ in range(9)]
    rows = [{**photo_pairs(1)[0], "jpg_0": images[n], "jpg_1": images[n + 1]} for n in range(8)]
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", rows))
    counting = Counting(vae)
    encode_here(config, storage, counting, text)
    assert len(counting.shapes) == 9
    facts = describe_encoding(storage, latents_fingerprint(config), text_fingerprint(config))
    assert (facts.image_slots, facts.images, facts.pairs, facts.prompts) == (16, 9, 8, 1)


def test_text_is_stored_once_a_prompt_and_not_with_every_pair(tmp_path: Path, storage: Storage) -> None:
    """SDXL's own sizes: latents of 1024 x 1024, embeddings of 77 x 2048 and 1280, 16 pairs a prompt."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    pipeline = new_pipeline()
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    parts = []
    for old, kind, width, heads in (
        (pipeline.text_encoder, CLIPTextModel, 768, 12),
        (pipeline.text_encoder_2, CLIPTextModelWithProjection, 1280, 20),
    ):
        sizes = {"hidden_size": width, "projection_dim": width, "num_attention_heads": heads, "num_hidden_layers": 2}
        parts.append(kind(CLIPTextConfig(**old.config.to_dict() | sizes | {"intermediate_size": 64})))
    pipeline.register_modules(vae=vae, text_encoder=parts[0], text_encoder_2=parts[1])
    pipeline.save_pretrained(tmp_path / "model")
    source = ModelSource(str(tmp_path / "model"))
    config = EncodeConfig(model=source.model, batch_size=4)
    rng, rows = np.random.default_rng(0), photo_pairs(2 * PAIRS_A_PROMPT, num_prompts=2)
    images = [encoded(picture(rng, 96, 96)) for _ in range(9)]
    for row, (image_0, image_1) in zip(rows, itertools.combinations(images, 2), strict=False):
        row.update(jpg_0=image_0, jpg_1=image_1)
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", rows))
    encode_here(config, storage, LatentEncoder(source, device=CPU), TextEncoder(source, CPU))
    latents = latents_table(storage, latents_fingerprint(config)).read(["length"])["length"].to_pylist()
    texts = text_table(storage, text_fingerprint(config)).read().to_pylist()
    embeddings = {row["prompt_id"]: row["length"] for row in texts if row["prompt_id"] != NULL_PROMPT_ID}
    assert len(latents) == 32
    assert set(embeddings.values()) == {2 * (77 * 2048 + 1280) + 168}  # two bytes a number, and the header
    once = sum(latents) + sum(embeddings.values())
    prompts = pairs_table(storage).read(["prompt_id"])["prompt_id"].to_pylist()
    with_every_pair = sum(latents) + sum(embeddings[prompt] for prompt in prompts)
    assert once / with_every_pair <= 0.55
    stored = sum(size for size in {row["shard"]: row["shard_bytes"] for row in texts}.values())
    assert stored < 1.1 * 3 * embeddings.popitem()[1]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CHANGES: dict[str, tuple[Callable[[Path], dict[str, Any]], str, str]] = {
    "one bit of the VAE": (
        lambda model: flip_a_bit(model / "vae/diffusion_pytorch_model.safetensors") or {},
        "latents", "vae/diffusion_pytorch_model.safetensors was",
    ),
    "dtype": (lambda model: {"dtype": "float32"}, "latents", "dtype was float16, is float32"),
    "what the VAE computes in": (
        lambda model: {"vae_dtype": "bfloat16"}, "latents", "vae_dtype was float32, is bfloat16",
    ),
    "resolution": (lambda model: {"resolution": 96}, "latents", "resolution was 64, is 96"),
    "the list of buckets": (
        lambda model: {"buckets": ((64, 64), (48, 80))}, "latents", "is 2 buckets",
    ),
    "a tokenizer": (
        lambda model: edit(model / "tokenizer_2/tokenizer_config.json", pad_token="a") or {},
        "text embeddings", "tokenizer_2/tokenizer_config.json was",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_training_refuses_by_name_what_was_made_otherwise(
    what: str, tiny_pipeline: Path, tmp_path: Path, storage: Storage, vae: LatentEncoder, text: TextEncoder
) -> None:
    change, kind, difference = CHANGES[what]
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model)
    old = EncodeConfig(model=str(model), resolution=64, batch_size=4)
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(4, num_prompts=2)))
    encode_here(old, storage, vae, text)
    assert refusal(old, storage) is None
    names = {"latents": latents_fingerprint(old), "text embeddings": text_fingerprint(old)}
    new = old.model_copy(update=change(model))
    fingerprint = latents_fingerprint(new) if kind == "latents" else text_fingerprint(new)
    assert fingerprint != names[kind]
    train = TrainConfig(global_batch_size=2, micro_batch_size=1, max_steps=1)
    run = RunConfig(name="stale", storage=storage.url, encode=new, train=train)
    before = files_of(storage)
    with pytest.raises(SnapshotError) as caught:
        run_stages(run, ("train",), lambda line: None)
    assert f"have no {kind} under the fingerprint {fingerprint}" in caught.value.message
    assert f"{names[kind]} (" in caught.value.message
    assert difference in caught.value.message
    assert "mapo encode" in str(caught.value.hint)
    assert files_of(storage) == before


def test_a_partial_fingerprint_is_refused_with_its_numbers(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "a.parquet", photo_pairs(4, num_prompts=2)))
    encode_here(config, storage, vae, text)
    ingest_here(storage, write_parquet(tmp_path / "b.parquet", photo_pairs(3, seed=1, num_prompts=3)))
    error = refusal(config, storage)
    assert error is not None
    assert f"3 of 7 pairs have no latents under the fingerprint {latents_fingerprint(config)}" in error.message
    assert f"3 of 6 prompts have no text embeddings under the fingerprint {text_fingerprint(config)}" in error.message


def test_two_fingerprints_live_side_by_side(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(3)))
    other = config.model_copy(update={"buckets": ((32, 32), (32, 64)), "dtype": "float32"})
    for each in (config, other, config, other):
        encode_here(each, storage, vae, text)
        assert pending(each, storage).is_empty
    for each in (config, other):
        statuses = latents_table(storage, latents_fingerprint(each)).read()["status"].to_pylist()
        assert Counter(statuses) == {"kept": 3}
    heights = latents_table(storage, latents_fingerprint(other)).read()["bucket_height"].to_pylist()
    assert set(heights) == {32}


def test_an_object_store_holds_the_tars_that_a_folder_holds(
    tmp_path: Path, storage: Storage, s3_storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    file = write_parquet(tmp_path / "in.parquet", photo_pairs(6, num_prompts=2))
    tars = []
    for place in (storage, s3_storage):
        ingest_here(place, file)
        encode_here(config, place, vae, text)
        assert pending(config, place).is_empty
        assert verify(place) == []
        names = [name for folder in (LATENTS, TEXT) for name in place.names(folder) if name.endswith(".tar")]
        tars.append({name: place.read(name) for name in names})
    assert len(tars[0]) == 2
    assert tars[0] == tars[1]
