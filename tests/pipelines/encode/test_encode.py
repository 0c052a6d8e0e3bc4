"""The encode stage: only what is missing, each thing once, the same bytes every time."""

import hashlib
import io
import json
import os
import signal
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import webdataset
from encode_steps import Counting, encode_here, files_of, ingest_here, place_pair, write_latents, write_texts
from factories import Row, encoded, photo_pairs, picture, write_parquet
from safetensors import safe_open
from safetensors.torch import load

import pipelines.encode.workers
import pipelines.units.pool
from pipelines.config import EncodeConfig
from pipelines.dataset.errors import (
    ConfigError,
    DropBudgetExceeded,
    EncodingError,
    ModelError,
    ShardCorrupt,
    SnapshotError,
)
from pipelines.dataset.layout import LATENTS, TEXT, latents_table, pairs_table, text_table
from pipelines.dataset.pair import NULL_PROMPT_ID, prompt_id
from pipelines.dataset.shard import read_shard
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, Launched, TextEncoder
from pipelines.encode.execution import encode
from pipelines.encode.fingerprint import fingerprint_of, latents_fingerprint, text_fingerprint
from pipelines.encode.geometry import bucket_list
from pipelines.encode.latents import LatentWriter, WriteLatents
from pipelines.encode.plan import pending

CPU = torch.device("cpu")


def rows_by_key(table: pa.Table, key: str) -> dict[str, Row]:
    return {row[key]: row for row in table.to_pylist()}


def test_the_stage_encodes_every_kept_pair_and_a_rerun_touches_nothing(
    ray_cluster: None, tmp_path: Path, storage: Storage, config: EncodeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config.model_copy(update={"num_workers": 2})
    rows = photo_pairs(9, num_ties=1, num_damaged=1, num_prompts=4)
    ingest_here(
        storage, write_parquet(tmp_path / "a.parquet", rows[:4]), write_parquet(tmp_path / "b.parquet", rows[4:])
    )
    encode(config, storage)
    latents = latents_table(storage, latents_fingerprint(config))
    texts = text_table(storage, text_fingerprint(config))
    pairs = pairs_table(storage).read(["pair_key", "status"]).to_pylist()
    kept = [row["pair_key"] for row in pairs if row["status"] == "kept"]
    assert sorted(latents.read()["pair_key"].to_pylist()) == sorted(kept)
    assert sorted(Counter(latents.read()["unit"].to_pylist()).values()) == [3, 4]
    prompts = {prompt_id(row["caption"]) for row in rows[:7]}
    assert sorted(texts.read()["prompt_id"].to_pylist()) == sorted({NULL_PROMPT_ID, *prompts})
    for folder, table in ((LATENTS, latents), (TEXT, texts)):
        for row in table.read().to_pylist():
            storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"])
            assert row["shard"].startswith(folder)
    parts = json.loads(storage.read(f"{LATENTS}/{latents_fingerprint(config)}/fingerprint.json"))
    assert fingerprint_of(parts) == latents_fingerprint(config)

    before, versions = files_of(storage), (latents.version, texts.version)
    encode(config, storage)
    assert files_of(storage) == before
    assert (latents.version, texts.version) == versions == (1, 0)
    shown = capfd.readouterr()
    assert "dataset" not in (shown.out + shown.err).lower(), "Ray Data is not quiet"


def test_an_error_in_an_actor_arrives_as_our_own(
    ray_cluster: None, tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any, text: TextEncoder
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(2)))
    todo = pending(config, storage)
    (unit,) = todo.texts
    name = text_fingerprint(config)
    text_table(storage, name).append(unit.id, write_texts(unit.id, unit.rows, config, storage, name, text))
    (shard,) = storage.names("dataset/shards")
    data = bytearray(storage.read(shard))
    data[600] ^= 1
    storage.write(shard, bytes(data))
    with pytest.raises(ShardCorrupt) as caught:
        encode(config, storage)
    assert type(caught.value) is ShardCorrupt
    assert shard in caught.value.message
    assert "differ from their digest" in caught.value.message
    assert "Ray" not in str(caught.value)
    assert caught.value.hint == "`mapo data verify` lists what is damaged"
    assert latents_table(storage, latents_fingerprint(config)).version is None


def test_a_unit_that_kills_its_actors_is_given_up_and_named(
    ray_cluster: None, tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any, text: TextEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Killed(WriteLatents):
        """At its first unit the process is gone, as by the killer of what takes too much memory."""

        def __call__(self, batch: pa.Table) -> pa.Table:
            LatentWriter.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(1)))
    todo = pending(config, storage)
    (unit,) = todo.texts
    name = text_fingerprint(config)
    text_table(storage, name).append(unit.id, write_texts(unit.id, unit.rows, config, storage, name, text))
    monkeypatch.setattr(pipelines.units.pool, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(pipelines.encode.workers, "actor_class", lambda kind: Killed)
    with pytest.raises(
        EncodingError, match=r"actors died 1 times while encoding the pairs of dataset/shards/"
    ) as caught:
        encode(config, storage)
    assert todo.latents[0].id in caught.value.message
    assert "encode.batch_size" in str(caught.value.hint)


def test_only_new_pairs_and_new_prompts_are_encoded(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any, text: TextEncoder
) -> None:
    old = photo_pairs(5, num_prompts=2)
    ingest_here(storage, write_parquet(tmp_path / "in/a.parquet", old))
    first = encode_here(config, storage, vae, text)
    assert pending(config, storage).is_empty
    tars = {name: stamp for name, stamp in files_of(storage).items() if name.endswith(".tar")}
    new = photo_pairs(3, seed=1, num_prompts=2)
    new[0]["caption"] = old[0]["caption"]  # a known prompt with new images
    ingest_here(storage, write_parquet(tmp_path / "in/b.parquet", new))
    counting = Counting(vae)
    second = encode_here(config, storage, counting, text)
    assert len(counting.shapes) == 6
    assert [unit.rows.num_rows for unit in (*first.latents, *second.latents)] == [5, 3]
    assert [unit.rows["prompt"].to_pylist() for unit in second.texts] == [
        [row["caption"] for row in sorted(new[1:3], key=lambda row: prompt_id(row["caption"]))]
    ]
    after = files_of(storage)
    assert {name: after[name] for name in tars} == tars
    units = latents_table(storage, latents_fingerprint(config)).read()["unit"].to_pylist()
    assert Counter(units) == {first.latents[0].id: 5, second.latents[0].id: 3}


def test_another_model_encodes_anew_and_leaves_the_old_alone(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any, text: TextEncoder
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(2)))
    encode_here(config, storage, vae, text)
    before = files_of(storage)
    again = encode_here(config.model_copy(update={"resolution": 32}), storage, vae, text)
    assert (len(again.latents), len(again.texts)) == (1, 0)  # the text does not depend on the resolution
    after = files_of(storage)
    assert {name: after[name] for name in before} == before


def test_a_bad_model_or_an_empty_data_set_fails_before_ray(storage: Storage, config: EncodeConfig) -> None:
    with pytest.raises(SnapshotError, match="no kept pair") as caught:
        encode(config, storage)
    assert "mapo ingest" in str(caught.value.hint)
    with pytest.raises(ModelError, match="no model folder"):
        encode(config.model_copy(update={"model": "./nowhere/at/all"}), storage)


def test_a_resolution_that_the_vae_cannot_halve_is_refused(
    tmp_path: Path, storage: Storage, config: EncodeConfig
) -> None:
    from diffusers import AutoencoderKL

    four = AutoencoderKL(
        block_out_channels=(4,) * 5, norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
    )  # fmt: skip
    four.save_pretrained(tmp_path / "vae")
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(1)))
    with pytest.raises(ConfigError, match="is not divisible by 16"):
        encode(config.model_copy(update={"vae": str(tmp_path / "vae"), "resolution": 72}), storage)


def test_every_member_is_what_its_row_says_and_what_diffusers_gives(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    # Batches of one: a convolution's last bits depend on the size of the batch (1.4e-6 here).
    config = config.model_copy(update={"dtype": "float32", "batch_size": 1})
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(7, num_prompts=3)))
    encode_here(config, storage, vae, text)
    for key, pair in rows_by_key(pairs_table(storage).read(), "pair_key").items():
        row = rows_by_key(latents_table(storage, latents_fingerprint(config)).read(), "pair_key")[key]
        data = storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"])
        images = [storage.read_range(pair["shard"], pair[f"offset_{s}"], pair[f"length_{s}"]) for s in (0, 1)]
        bucket, *placed = place_pair(images[0], images[1], bucket_list(64, True))
        assert (row["bucket_height"], row["bucket_width"]) == bucket
        tensors = load(data)
        assert set(tensors) == {"latents_0", "latents_1"}
        for side, image in enumerate(placed):
            torch.testing.assert_close(tensors[f"latents_{side}"], vae(image.pixels[None])[0], rtol=0, atol=1e-6)
        file = tmp_path / "member.safetensors"
        file.write_bytes(data)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert [json.loads(metadata[f"time_ids_{s}"]) for s in (0, 1)] == [list(image.time_ids) for image in placed]
    for row in text_table(storage, text_fingerprint(config)).read().to_pylist():
        tensors = load(storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"]))
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            "prompt_embeds": (77, 40), "pooled_prompt_embeds": (24,),
        }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_stored_has_the_configured_type_and_nothing_more(
    dtype: str, tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any, text: TextEncoder
) -> None:
    config = config.model_copy(update={"dtype": dtype, "buckets": False})
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(5)))
    encode_here(config, storage, vae, text)
    rows = latents_table(storage, latents_fingerprint(config)).read().to_pylist()
    for row in rows:
        data = storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"])
        assert {tensor.dtype for tensor in load(data).values()} == {getattr(torch, dtype)}
        assert row["crc32"] == zlib.crc32(data)
        assert row["length"] < 2 * 4 * 16 * 16 * getattr(torch, dtype).itemsize + 400  # not the batch's whole memory


def test_the_bytes_of_a_unit_are_the_same_every_time(
    tmp_path: Path, config: EncodeConfig, vae: Any, text: TextEncoder
) -> None:
    file = write_parquet(tmp_path / "in.parquet", photo_pairs(9))
    written = []
    for attempt in ("one", "two"):
        storage = Storage(str(tmp_path / attempt))
        ingest_here(storage, file)
        encode_here(config, storage, vae, text)
        tars = [name for name in storage.names("dataset") if name.endswith(".tar") and "/shards/" not in name]
        written.append({name: storage.read(name) for name in tars})
    assert written[0] == written[1]
    assert len(written[0]) == 2


def test_members_are_in_the_units_order_whatever_the_batches(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(12)))
    (unit,) = pending(config, storage).latents
    for batch_size in (1, 5, 100):
        batched = config.model_copy(update={"batch_size": batch_size})
        rows = write_latents(unit.id, unit.rows, batched, storage, "f" * 32, vae)
        assert rows["pair_key"].to_pylist() == unit.rows["pair_key"].to_pylist()
        members = [name.removesuffix(".safetensors") for name, _ in read_shard(storage.read(rows["shard"][0].as_py()))]
        assert members == unit.rows["pair_key"].to_pylist()
    assert len({(r["bucket_height"], r["bucket_width"]) for r in rows.to_pylist()}) > 1


def test_a_shared_prompt_is_embedded_once_and_a_shared_image_encoded_once(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any, text: TextEncoder
) -> None:
    rng = np.random.default_rng(0)
    images = [encoded(picture(rng, 64, 64)) for _ in range(3)]
    long = encoded(picture(rng, 32, 128))
    row = photo_pairs(1)[0]
    rows = [
        row | {"jpg_0": images[0], "jpg_1": images[1]},
        row | {"jpg_0": images[0], "jpg_1": images[2]},
        row | {"jpg_0": images[0], "jpg_1": long},  # another bucket: other latents
    ]
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", rows))
    counting = Counting(vae)
    todo = encode_here(config, storage, counting, text)
    assert [unit.rows["prompt_id"].to_pylist() for unit in todo.texts] == [[NULL_PROMPT_ID, prompt_id(row["caption"])]]
    assert Counter(shape[:2] for shape in counting.shapes) == {(64, 64): 3, (48, 96): 2}
    assert latents_table(storage, latents_fingerprint(config)).read().num_rows == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves the tar open
def test_webdataset_reads_the_shards(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any, text: TextEncoder
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(5)))
    encode_here(config, storage, vae, text)
    for folder, names in ((LATENTS, {"latents_0", "latents_1"}), (TEXT, {"prompt_embeds", "pooled_prompt_embeds"})):
        (tar,) = [name for name in storage.names(folder) if name.endswith(".tar")]
        samples = list(webdataset.WebDataset(storage.path(tar), shardshuffle=False))
        assert len(samples) == (5 if folder == LATENTS else 6)
        for sample in samples:
            assert len(sample["__key__"]) == 32
            assert set(load(sample["safetensors"])) == names


def test_non_finite_latents_are_counted_rows_and_too_many_fail(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any, text: TextEncoder
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(10)))
    seen = []

    class Overflowing:
        def launch(self, images: Any) -> Launched:
            latents, seconds = vae.launch(images).wait()
            if not seen:
                latents[0, 0, 0, 0] = 1e6  # finite in float32, not in the stored float16
            seen.append(len(images))
            return Launched(latents, lambda: seconds)

    encode_here(config, storage, Overflowing(), text)
    rows = latents_table(storage, latents_fingerprint(config)).read().to_pylist()
    (bad,) = [row for row in rows if row["status"] == "quarantined"]
    assert bad["reason"] == "non_finite"
    assert bad["shard"] is bad["offset"] is bad["sha256"] is None
    members = {name.split(".")[0] for name, _ in read_shard(storage.read(rows[-1]["shard"]))}
    assert members == {row["pair_key"] for row in rows} - {bad["pair_key"]}
    assert pending(config, storage).is_empty  # it is not tried for ever
    with pytest.raises(DropBudgetExceeded, match=r"1 of 10 pairs \(10.0 %|1 of 10 pairs \(10.0%") as caught:
        encode(config, storage)
    assert "encode.dtype" in str(caught.value.hint)


def test_a_bad_round_stops_early_and_does_not_hide_among_the_good_rows_of_before(
    ray_cluster: None, tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any, text: TextEncoder
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "old.parquet", photo_pairs(40, num_prompts=1)))
    encode_here(config, storage, vae, text)
    for number in range(4):
        rows = [row | {"jpg_0": row["jpg_0"][:-200]} for row in photo_pairs(2, seed=number + 1, num_prompts=1)]
        ingest_here(storage, write_parquet(tmp_path / f"{number}.parquet", rows), image_check="header")
    with pytest.raises(DropBudgetExceeded, match=r"dropped (4|6|8) of (44|46|48) pairs") as caught:
        encode(config, storage)
    assert "truncated_image" in caught.value.message
    assert "encode.max_drop_ratio" in str(caught.value.hint)
    assert pending(config, storage).latents, "what was not encoded is told apart from what was dropped"


def test_a_unit_whose_images_cannot_be_decoded_has_rows_and_no_shard(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(1)))
    (unit,) = pending(config, storage).latents
    row = unit.rows.to_pylist()[0]
    shard = io.BytesIO(storage.read(row["shard"]))
    shard.seek(row["offset_0"])
    garbage = b"\xff\xd8" + bytes(row["length_0"] - 2)
    storage.write("broken.tar", shard.getvalue()[: row["offset_0"]] + garbage + shard.read()[row["length_0"] :])
    row |= {"shard": "broken.tar", "image_0_sha256": hashlib.sha256(garbage).hexdigest()}
    rows = write_latents("u" * 32, pa.Table.from_pylist([row]), config, storage, "f" * 32, vae)
    assert rows.select(["status", "reason", "shard"]).to_pylist() == [
        {"status": "quarantined", "reason": "truncated_image", "shard": None}
    ]
    assert not storage.names(f"{LATENTS}/{'f' * 32}")


def test_planning_needs_neither_ray_nor_torch(
    tmp_path: Path, storage: Storage, config: EncodeConfig, run_python: Callable[[str], str]
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(2)))
    shown = run_python(
        "import sys\n"
        "from pipelines.config import EncodeConfig\n"
        "from pipelines.dataset.storage import Storage\n"
        "from pipelines.encode.plan import pending\n"
        f"todo = pending(EncodeConfig(model={config.model!r}, resolution=64), Storage({storage.url!r}))\n"
        "heavy = {'ray', 'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "print(len(todo.latents), len(todo.texts), sorted(heavy))"
    )
    assert shown.strip() == "1 1 []"
