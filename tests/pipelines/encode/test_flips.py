"""Mirrored images: encoded beside the others where it is asked for, and without a trace where it is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_steps import Counting, encode_here, files_of, ingest_here, latents_of
from factories import encoded, photo_pairs, picture, write_parquet
from PIL import Image, ImageOps

from orchestration.config import parse_config
from orchestration.stages.encode import _latent_bytes
from pipelines.config import EncodeConfig
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.layout import latents_table, pairs_table
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, TextEncoder, load_vae
from pipelines.encode.fingerprint import latents_fingerprint, latents_parts, text_fingerprint
from pipelines.encode.geometry import cover, mirror, open_image, place
from pipelines.encode.plan import pending
from pipelines.encode.stale import refusal
from pipelines.maintenance.verify import verify
from training.data.index import load_index, load_texts
from training.data.reader import PairReader
from training.spec import Snapshot

SIZES = ((64, 64), (80, 61), (64, 151), (71, 70))


@pytest.fixture
def config(tiny_pipeline: Path) -> EncodeConfig:
    return EncodeConfig(model=str(tiny_pipeline), resolution=64, batch_size=4, dtype="float32")


@pytest.fixture
def both(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> tuple[EncodeConfig, EncodeConfig]:
    """The same pairs encoded without mirrored images and with them."""
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(8, num_prompts=2, sizes=SIZES)))
    flipping = config.model_copy(update={"flips": True})
    for each in (config, flipping):
        encode_here(each, storage, vae, text)
    return config, flipping


def test_the_latents_of_a_mirrored_image_are_those_of_the_mirrored_pixels(
    storage: Storage, both: tuple[EncodeConfig, EncodeConfig]
) -> None:
    reference, seen = load_vae(both[1].source), 0
    rows = latents_table(storage, latents_fingerprint(both[1])).read().to_pylist()
    pairs = {row["pair_key"]: row for row in pairs_table(storage).read().to_pylist()}
    found = latents_of(storage, both[1])
    for row in rows:
        pair, (tensors, time_ids) = pairs[row["pair_key"]], found[row["pair_key"]]
        bucket = row["bucket_height"], row["bucket_width"]
        for side in (0, 1):
            file = storage.read_range(pair["shard"], pair[f"offset_{side}"], pair[f"length_{side}"])
            image = open_image(file)
            pixels = torch.from_numpy(place(image, bucket).pixels).permute(2, 0, 1)[None]
            with torch.no_grad():
                expected = reference.encode(2.0 * (pixels.flip(-1) / 255.0) - 1.0).latent_dist.mean[0]
            torch.testing.assert_close(tensors[f"flipped_{side}"], expected, rtol=0, atol=3e-6)
            assert not torch.equal(tensors[f"flipped_{side}"], tensors[f"latents_{side}"].flip(-1))
            plain = time_ids[f"time_ids_{side}"]
            cut_off = cover(image.height, image.width, bucket).width - bucket[1]
            assert time_ids[f"flipped_time_ids_{side}"] == [*plain[:3], cut_off - plain[3], *plain[4:]]
            seen += 1
    assert seen == 16


@pytest.mark.parametrize("size", [(64, 64), (64, 100), (97, 64), (64, 101), (130, 200)])
def test_a_mirrored_crop_is_the_crop_of_the_mirrored_image(size: tuple[int, int]) -> None:
    image = picture(np.random.default_rng(0), *size)
    mirrored, other = mirror(place(image, (64, 64))), place(ImageOps.mirror(image), (64, 64))
    assert np.array_equal(mirrored.pixels, place(image, (64, 64)).pixels[:, ::-1])
    covering = cover(*size, (64, 64))
    is_odd = (covering.width - 64) % 2
    left = mirrored.time_ids[3]
    assert left - other.time_ids[3] in ((-1, 1) if is_odd else (0,)), "of an odd number of columns either half may be"
    whole = np.asarray(ImageOps.mirror(image).resize((covering.width, covering.height), Image.Resampling.BILINEAR))
    expected = whole[covering.top : covering.top + 64, left : left + 64].astype(int)
    assert np.abs(mirrored.pixels.astype(int) - expected).max() <= 1  # Pillow rounds between its two passes


def test_the_other_latents_are_the_same_to_the_bit_and_stay_where_they_are(
    tmp_path: Path,
    storage: Storage,
    config: EncodeConfig,
    both: tuple[EncodeConfig, EncodeConfig],
    vae: LatentEncoder,
    text: TextEncoder,
) -> None:
    without, with_flips = (latents_of(storage, each) for each in both)
    assert without.keys() == with_flips.keys()
    for key, (tensors, time_ids) in without.items():
        assert set(tensors) == {"latents_0", "latents_1"}
        assert set(with_flips[key][0]) == {"latents_0", "latents_1", "flipped_0", "flipped_1"}
        assert all(torch.equal(tensors[name], with_flips[key][0][name]) for name in tensors)
        assert all(time_ids[name] == with_flips[key][1][name] for name in time_ids)
    alone = Storage(str(tmp_path / "alone"))
    ingest_here(alone, tmp_path / "in.parquet")
    encode_here(config, alone, vae, text)
    tars = {name for name in files_of(alone) if name.endswith(".tar")}
    assert tars <= files_of(storage).keys()
    assert all(alone.read(name) == storage.read(name) for name in tars)
    assert verify(storage) == []


def test_the_fingerprint_says_so_only_where_images_are_mirrored(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    flipping = config.model_copy(update={"flips": True})
    assert latents_parts(flipping) == latents_parts(config) | {"flips": True}
    assert "flips" not in latents_parts(config)
    assert text_fingerprint(flipping) == text_fingerprint(config)
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(2, sizes=((64, 64),))))
    encode_here(config, storage, vae, text)
    error = refusal(flipping, storage)
    assert error is not None
    assert f"2 pairs have no latents under the fingerprint {latents_fingerprint(flipping)}" in error.message
    assert "flips was False, is True" in error.message
    encode_here(flipping, storage, vae, text)
    assert refusal(flipping, storage) is None
    assert refusal(config, storage) is None


def test_an_image_is_read_once_and_encoded_twice(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    rows = photo_pairs(4, sizes=((64, 64),))
    rows[1]["jpg_0"] = rows[0]["jpg_0"]
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", rows))
    counting = Counting(vae)
    encode_here(config.model_copy(update={"flips": True}), storage, counting, text)
    assert len(counting.shapes) == 2 * 7


def test_a_cut_image_is_quarantined_as_without(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    rows = photo_pairs(3, sizes=((64, 64),))
    whole = encoded(picture(np.random.default_rng(9), 64, 64), "PNG")
    rows[1]["jpg_1"] = whole[: len(whole) // 2]
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", rows), image_check="header")
    flipping = config.model_copy(update={"flips": True})
    encode_here(flipping, storage, vae, text)
    table = latents_table(storage, latents_fingerprint(flipping)).read()
    assert sorted(table["status"].to_pylist()) == ["kept", "kept", "quarantined"]
    assert table["reason"].drop_null().to_pylist() == ["truncated_image"]
    assert pending(flipping, storage).is_empty


def test_training_reads_the_orientation_that_a_record_asks_for(
    storage: Storage, both: tuple[EncodeConfig, EncodeConfig]
) -> None:
    def opened(config: EncodeConfig) -> tuple[Any, PairReader]:
        snapshot = Snapshot(0, latents_fingerprint(config), 0, text_fingerprint(config), 0)
        return load_index(storage, snapshot, "train"), PairReader(storage, load_texts(storage, snapshot))

    (index, reader), (plain_index, plain_reader) = opened(both[1]), opened(both[0])
    stored, labels = latents_of(storage, both[1]), set()
    for bucket, size in enumerate(index.bucket_sizes):
        for element in range(size):
            for flipped in ((False, False), (True, False), (False, True), (True, True)):
                record = index.pair(bucket, element, flipped)
                batch, (tensors, time_ids) = reader.read([record]), stored[record.pair_key]
                for side in (0, 1):
                    is_chosen = side == record.chosen
                    latents = (batch.chosen_BCHW if is_chosen else batch.rejected_BCHW)[0]
                    sizes = (batch.chosen_time_ids_B6 if is_chosen else batch.rejected_time_ids_B6)[0]
                    names = ("flipped", "flipped_time_ids") if flipped[side] else ("latents", "time_ids")
                    assert torch.equal(latents, tensors[f"{names[0]}_{side}"])
                    assert sizes.tolist() == time_ids[f"{names[1]}_{side}"]
                labels.add(record.chosen)
            plain = plain_reader.read([plain_index.pair(bucket, element)])
            unflipped = reader.read([index.pair(bucket, element)])
            assert torch.equal(plain.chosen_BCHW, unflipped.chosen_BCHW)
            assert torch.equal(plain.rejected_time_ids_B6, unflipped.rejected_time_ids_B6)
    assert labels == {0, 1}


def test_the_plan_knows_what_mirrored_images_take(storage: Storage, both: tuple[EncodeConfig, EncodeConfig]) -> None:
    plain, flipping = (_latent_bytes(each) for each in both)
    assert flipping == 2 * plain
    lengths = [sum(latents_table(storage, latents_fingerprint(each)).read()["length"].to_pylist()) for each in both]
    assert 1.8 < lengths[1] / lengths[0] < 2.2


@pytest.mark.parametrize("flips", ["pair", "image"])
def test_training_mirrored_images_that_are_not_encoded_is_refused_at_once(flips: str) -> None:
    run = f"name: a\nstorage: /b\ntrain: {{flips: {flips}}}\n"
    for encode in ("", "encode: {model: m}\n", "encode: {model: m, flips: false}\n"):
        with pytest.raises(ConfigError, match=rf"train\.flips is {flips}") as caught:
            parse_config(run + encode)
        assert "encode.flips: true" in str(caught.value.hint)
    assert parse_config(f"{run}encode: {{model: m, flips: true}}\n").train.flips == flips
    assert parse_config("name: a\nstorage: /b\ntrain: {}\nencode: {model: m, flips: true}\n").encode.flips
