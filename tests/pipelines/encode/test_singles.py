"""Single images through encode: one latent each in a bucket of their own, and nothing changes for pairs beside them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from encode_steps import Counting, encode_here, files_of, ingest_in_process, latents_of
from factories import encoded, photo_pairs, picture, write_parquet

from pipelines.config import EncodeConfig, IngestConfig, SourceConfig
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.pair import JUDGED, KINDS, PAIR, PRIOR, prompt_id
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, TextEncoder, load_vae
from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint
from pipelines.encode.geometry import bucket_list, choose_bucket, open_image, place
from pipelines.encode.latents import LatentWriter
from pipelines.encode.plan import is_encoded, pending
from pipelines.encode.stale import refusal
from pipelines.maintenance.verify import verify
from training.data.index import load_index, load_texts
from training.data.reader import PairReader
from training.spec import Snapshot

SIZES = ((64, 64), (80, 61), (64, 151))


@pytest.fixture
def config(tiny_pipeline: Path) -> EncodeConfig:
    return EncodeConfig(model=str(tiny_pipeline), resolution=64, batch_size=4, dtype="float32")


@pytest.fixture
def flipping(config: EncodeConfig) -> EncodeConfig:
    return config.model_copy(update={"flips": True})


@pytest.fixture
def pairs(tmp_path: Path) -> SourceConfig:
    file = write_parquet(tmp_path / "pairs.parquet", photo_pairs(6, num_prompts=2, sizes=SIZES))
    return SourceConfig(format="pickapic", path=str(file), split="train")


@pytest.fixture
def singles(tmp_path: Path) -> SourceConfig:
    """Six judged images of three sizes, and three of a class."""
    rng, rows = np.random.default_rng(1), []
    for number in range(9):
        image = encoded(picture(rng, *SIZES[number % len(SIZES)]), "PNG")
        rows.append({"image": image, "prompt": f"single {number % 2}", "good": number % 2 == 0, "prior": number >= 6})
    return judged(tmp_path / "singles.parquet", rows)


def judged(file: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    pq.write_table(pa.Table.from_pylist(rows), file)
    return SourceConfig(format="judged", path=str(file), split="train")


def ingested(storage: Storage, *sources: SourceConfig, image_check: Any = "full") -> None:
    ingest_in_process(IngestConfig(sources=sources, image_check=image_check), storage)


def test_a_single_image_has_one_latent_in_the_bucket_of_its_own_size(
    storage: Storage, flipping: EncodeConfig, singles: SourceConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    ingested(storage, singles)
    encode_here(flipping, storage, vae, text)
    reference, buckets, seen = load_vae(flipping.source), bucket_list(64, True), set()
    rows = {row["pair_key"]: row for row in pairs_table(storage).read().to_pylist()}
    found = latents_of(storage, flipping)
    assert found.keys() == rows.keys()
    for row in latents_table(storage, latents_fingerprint(flipping)).read().to_pylist():
        (tensors, time_ids), single = found[row["pair_key"]], rows[row["pair_key"]]
        assert set(tensors) == {"latents_0", "flipped_0"}
        assert set(time_ids) == {"time_ids_0", "flipped_time_ids_0"}
        image = open_image(storage.read_range(single["shard"], single["offset_0"], single["length_0"]))
        size = image.height, image.width
        bucket = row["bucket_height"], row["bucket_width"]
        assert bucket == choose_bucket(size, size, buckets)
        nearest = min(buckets, key=lambda each: abs(np.log(each[1] / each[0]) - np.log(size[1] / size[0])))
        assert bucket[1] / bucket[0] == nearest[1] / nearest[0]
        placed = place(image, bucket)
        pixels = torch.from_numpy(placed.pixels).permute(2, 0, 1)[None]
        with torch.no_grad():
            for name, shown in (("latents_0", pixels), ("flipped_0", pixels.flip(-1))):
                expected = reference.encode(2.0 * (shown / 255.0) - 1.0).latent_dist.mean[0]
                torch.testing.assert_close(tensors[name], expected, rtol=0, atol=3e-6)
        assert time_ids["time_ids_0"] == list(placed.time_ids)
        seen.add(bucket)
    assert len(seen) == 3


def test_pairs_have_the_units_the_fingerprint_and_the_bytes_that_they_have_without_single_images(
    tmp_path: Path,
    storage: Storage,
    config: EncodeConfig,
    pairs: SourceConfig,
    singles: SourceConfig,
    vae: LatentEncoder,
    text: TextEncoder,
) -> None:
    alone = Storage(str(tmp_path / "alone"))
    ingested(alone, pairs)
    ingested(storage, singles, pairs)
    units = [{unit.id: unit for unit in pending(config, each).latents} for each in (alone, storage)]
    assert units[0].keys() < units[1].keys()
    for each in (alone, storage):
        encode_here(config, each, vae, text)
    tars = [name for name in files_of(alone) if name.startswith("dataset/latents/") and name.endswith(".tar")]
    assert tars
    assert all(alone.read(name) == storage.read(name) for name in tars)
    ingested(alone, pairs, singles)
    before = {name: at for name, at in files_of(alone).items() if name.endswith(".tar")}
    todo = encode_here(config, alone, vae, text)
    assert {unit.rows.num_rows for unit in todo.latents} == {9}, "the single images alone are encoded"
    assert before.items() <= files_of(alone).items(), "what was there is not written again"
    assert latents_of(alone, config).keys() == latents_of(storage, config).keys()
    assert verify(storage) == []


def test_what_is_missing_of_single_images_is_missing(
    storage: Storage,
    config: EncodeConfig,
    pairs: SourceConfig,
    singles: SourceConfig,
    vae: LatentEncoder,
    text: TextEncoder,
) -> None:
    ingested(storage, pairs)
    encode_here(config, storage, vae, text)
    assert is_encoded(config, storage)
    ingested(storage, pairs, singles)
    assert not is_encoded(config, storage)
    assert refusal(config, storage) is not None
    encode_here(config, storage, vae, text)
    assert is_encoded(config, storage)
    assert refusal(config, storage) is None
    assert pending(config, storage).is_empty
    prompts = set(text_table(storage, text_fingerprint(config)).read()["prompt_id"].to_pylist())
    assert {prompt_id("single 0"), prompt_id("single 1")} < prompts


def test_each_distinct_image_is_counted_and_encoded_once(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder
) -> None:
    rng = np.random.default_rng(2)
    images = [encoded(picture(rng, 64, 64), "PNG") for _ in range(2)]
    rows = [{"image": images[n // 2], "prompt": f"prompt {n}", "good": True} for n in range(4)]
    ingested(storage, judged(tmp_path / "same.parquet", rows))
    (unit,) = pending(config, storage).latents
    counting = Counting(vae)
    _, effort = LatentWriter(config, storage, "a" * 32, counting).write(unit.id, unit.rows)
    assert len(counting.shapes) == 2
    assert (effort.num_images, effort.num_slots) == (2, 4)


def test_a_cut_single_image_is_quarantined_alone(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    rng = np.random.default_rng(3)
    images = [encoded(picture(rng, 64, 64), "PNG") for _ in range(3)]
    images[1] = images[1][: len(images[1]) // 2]
    rows = [{"image": image, "prompt": "p", "good": True} for image in images]
    ingested(storage, judged(tmp_path / "cut.parquet", rows), image_check="header")
    encode_here(config, storage, vae, text)
    table = latents_table(storage, latents_fingerprint(config)).read()
    assert sorted(table["status"].to_pylist()) == ["kept", "kept", "quarantined"]
    assert table["reason"].drop_null().to_pylist() == ["truncated_image"]
    assert pending(config, storage).is_empty


def test_training_reads_what_was_encoded(
    storage: Storage,
    flipping: EncodeConfig,
    pairs: SourceConfig,
    singles: SourceConfig,
    vae: LatentEncoder,
    text: TextEncoder,
) -> None:
    ingested(storage, pairs, singles)
    encode_here(flipping, storage, vae, text)
    snapshot = Snapshot(
        pairs_table(storage).version, latents_fingerprint(flipping),
        latents_table(storage, latents_fingerprint(flipping)).version, text_fingerprint(flipping),
        text_table(storage, text_fingerprint(flipping)).version,
    )  # fmt: skip
    index = load_index(storage, snapshot, "train", kinds=KINDS)
    reader, stored, counts = PairReader(storage, load_texts(storage, snapshot)), latents_of(storage, flipping), {}
    for bucket, kind in enumerate(index.kinds):
        counts[kind] = counts.get(kind, 0) + index.bucket_sizes[bucket]
        for flipped in (False, True):
            records = [index.pair(bucket, each, (flipped, flipped)) for each in range(index.bucket_sizes[bucket])]
            batch, name = reader.read(records), "flipped" if flipped else "latents"
            for row, record in enumerate(records):
                tensors, time_ids = stored[record.pair_key]
                assert torch.equal(batch.chosen_BCHW[row], tensors[f"{name}_{record.chosen}"])
                times = time_ids[f"{'flipped_' if flipped else ''}time_ids_{record.chosen}"]
                assert batch.chosen_time_ids_B6[row].tolist() == times
    assert counts == {PAIR: 6, JUDGED: 6, PRIOR: 3}
    good = pairs_table(storage).read(["label_0"], pc.field("kind") == JUDGED)["label_0"].to_pylist()
    assert sorted(good) == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert len(load_index(storage, snapshot, "train", kinds=(JUDGED,), only_good=True)) == 3
