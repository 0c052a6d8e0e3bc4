"""Drawing: exactly what is missing, several models in turn, the same samples whatever the batch and the workers."""

import gc
import json
import logging
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from drawings import TEXTS, draw_here, drawing_of, pixels_of, sampling_of, tars_of

import pipelines.units.pool
from pipelines.dataset.errors import EncodingError, ModelError, SnapshotError, StorageError
from pipelines.dataset.layout import SAMPLES, samples_table
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.shard import read_shard
from pipelines.dataset.storage import Storage
from pipelines.encode.fingerprint import fingerprint_of
from pipelines.resources import Demand
from pipelines.samples import actor as drawing_actor
from pipelines.samples import execution, room
from pipelines.samples.actor import SampleWriter
from pipelines.samples.drawing import Drawing, DrawnModel, DrawSettings
from pipelines.samples.execution import draw, read_samples
from pipelines.samples.plan import count_missing, pending_samples
from pipelines.samples.png import to_png
from pipelines.samples.sampler import Sampler
from pipelines.units.workers import Workers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MANY = tuple(f"{text} {number}" for number in range(9) for text in TEXTS)


def workers(**changed: Any) -> Workers:
    return Workers(**({"stage": "evaluate", "batch_size": 4} | changed))


def rows_of(storage: Storage, drawing: Drawing) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_samples(storage, drawing).to_pylist()
    return rows


def test_four_models_are_drawn_in_turn_by_one_worker_and_a_rerun_draws_nothing(
    ray_cluster: None, storage: Storage, tiny_pipeline: Path, other_pipeline: Path, sd_pipeline: Path, lora: Path,
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    drawings = [
        drawing_of(tiny_pipeline, MANY, name="base"),
        drawing_of(tiny_pipeline, MANY, name="dpo", unet=str(other_pipeline)),
        drawing_of(tiny_pipeline, MANY, name="style", lora=str(lora)),
        drawing_of(sd_pipeline, MANY, name="sd"),
    ]
    started = time.monotonic()
    found = draw(storage, drawings, workers())
    assert [(each.name, each.num_drawn, each.num_quarantined) for each in found] == [
        (name, 36, 0) for name in ("base", "dpo", "style", "sd")
    ]
    for each, drawing in zip(found, drawings, strict=True):
        assert each.speed is not None
        assert each.speed.seconds_by_part["fetch"] > 0
        assert each.worker_s > 0
        assert each.seconds > 0
        rows = rows_of(storage, drawing)
        assert [row["sample_key"] for row in rows] == drawing.wanted["sample_key"].to_pylist()
        assert {(row["status"], row["width"], row["height"]) for row in rows} == {("kept", 64, 64)}
        assert sorted(Counter(row["unit"] for row in rows).values()) == [4, 32]
        parts = json.loads(storage.read(f"{SAMPLES}/{drawing.fingerprint}/fingerprint.json"))
        assert fingerprint_of(parts) == drawing.fingerprint
        assert str(tmp_path.parent) not in json.dumps(parts)
    assert sum(each.seconds for each in found) <= time.monotonic() - started, "each has its own time"
    first = [pixels_of(storage, rows_of(storage, drawing)[0]) for drawing in drawings]
    assert all(np.abs(one - first[0]).max() > 20 for one in first[1:])

    before, versions = tars_of(storage), [samples_table(storage, each.fingerprint).version for each in drawings]
    again = draw(storage, drawings, workers(num_workers=2, batch_size=16))
    assert [(each.num_drawn, each.speed) for each in again] == [(0, None)] * 4
    assert tars_of(storage) == before
    assert [samples_table(storage, each.fingerprint).version for each in drawings] == versions == [1] * 4
    shown = capfd.readouterr()
    assert "dataset" not in (shown.out + shown.err).lower().replace("dataset/", ""), "Ray Data is not quiet"


def test_a_shard_has_png_and_json_of_each_sample_and_rows_that_point_to_the_png(
    storage: Storage, tiny_pipeline: Path
) -> None:
    drawing = drawing_of(tiny_pipeline, images_per_prompt=2)
    draw_here(storage, drawing)
    rows = rows_of(storage, drawing)
    (shard,) = {row["shard"] for row in rows}
    members = dict(read_shard(storage.read(shard)))
    assert list(members) == [f"{row['sample_key']}.{kind}" for row in rows for kind in ("png", "json")]
    for row in rows:
        assert storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"]).startswith(b"\x89PNG")
        described = json.loads(members[f"{row['sample_key']}.json"])
        assert described == {
            **{name: row[name] for name in ("text", "prompt", "prompt_id", "variant", "index", "seed")},
            "fingerprint": drawing.fingerprint,
        }


def test_a_new_prompt_in_the_middle_draws_its_samples_and_no_other(
    storage: Storage, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    embed = Sampler.embed
    monkeypatch.setattr(Sampler, "embed", lambda self, text: texts.append(text) or embed(self, text))
    before = drawing_of(tiny_pipeline, images_per_prompt=3)
    draw_here(storage, before)
    assert texts == list(TEXTS), "each distinct text once"
    tars = tars_of(storage)
    after = drawing_of(tiny_pipeline, (*TEXTS[:2], "new", *TEXTS[2:]), images_per_prompt=3)
    draw_here(storage, after)
    assert texts == [*TEXTS, "new"]
    assert {name: tars_of(storage)[name] for name in tars} == tars
    assert [row["text"] for row in rows_of(storage, after)] == [
        text for text in (*TEXTS[:2], "new", *TEXTS[2:]) for _ in range(3)
    ]
    more = drawing_of(tiny_pipeline, images_per_prompt=4)
    assert count_missing(storage, more) == 4, "the fourth image of each prompt"


def test_another_checkpoint_leaves_the_samples_of_the_base_alone(
    storage: Storage, tiny_pipeline: Path, other_pipeline: Path
) -> None:
    draw_here(storage, drawing_of(tiny_pipeline))
    before = tars_of(storage)
    draw_here(storage, drawing_of(tiny_pipeline, unet=str(other_pipeline)))
    after = tars_of(storage)
    assert len(after) == 2 * len(before)
    assert {name: after[name] for name in before} == before
    assert count_missing(storage, drawing_of(tiny_pipeline)) == 0


@pytest.mark.parametrize("family", ["tiny_pipeline", "sd_pipeline"])
def test_equal_batches_give_equal_bytes_and_other_batches_the_same_pixels(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    drawing = drawing_of(request.getfixturevalue(family), images_per_prompt=2)
    storages = [Storage(str(tmp_path / name)) for name in ("one", "again", "alone")]
    for storage, batch_size in zip(storages, (8, 8, 1), strict=True):
        draw_here(storage, drawing, batch_size)
    assert tars_of(storages[0]) == tars_of(storages[1])
    one, _, alone = ([pixels_of(storage, row) for row in rows_of(storage, drawing)] for storage in storages)
    assert max(np.abs(a - b).max() for a, b in zip(one, alone, strict=True)) <= 1


def test_one_worker_and_four_draw_the_same(ray_cluster: None, tmp_path: Path, tiny_pipeline: Path) -> None:
    drawing = drawing_of(tiny_pipeline, MANY, images_per_prompt=4)
    found = []
    for num_workers in (1, 4):
        storage = Storage(str(tmp_path / str(num_workers)))
        (drawn,) = draw(storage, [drawing], workers(num_workers=num_workers, batch_size=8))
        assert drawn.speed is not None
        assert drawn.speed.num_actors == num_workers
        found.append([pixels_of(storage, row) for row in rows_of(storage, drawing)])
    assert max(np.abs(a - b).max() for a, b in zip(*found, strict=True)) <= 1


def test_two_drawings_of_one_fingerprint_are_drawn_once(
    ray_cluster: None, storage: Storage, tiny_pipeline: Path
) -> None:
    one, two = drawing_of(tiny_pipeline, name="base"), drawing_of(tiny_pipeline, (*TEXTS, "another"), name="same")
    found = draw(storage, [one, two], workers())
    assert [(each.name, each.num_drawn) for each in found] == [("base", 5), ("same", 0)]
    assert samples_table(storage, one.fingerprint).count_rows() == 5
    assert [len(rows_of(storage, each)) for each in (one, two)] == [4, 5]


def writer_of(storage: Storage, drawing: Drawing, batch_size: int = 4) -> SampleWriter:
    models = {drawing.fingerprint: (drawing.model, drawing.sampling)}
    return SampleWriter(models, storage, DrawSettings("evaluate", batch_size, 1))


def test_a_writer_that_draws_other_bytes_leaves_those_that_are_committed(
    storage: Storage, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run on the storage, with another batch or GPU: the same unit, other pixels in the last place."""
    drawing = drawing_of(tiny_pipeline)
    (unit,) = pending_samples(storage, drawing, 4)
    rows, _ = writer_of(storage, drawing).write(unit.id, unit.rows)
    samples_table(storage, drawing.fingerprint).append(unit.id, rows)
    monkeypatch.setattr(drawing_actor, "to_png", lambda pixels_HWC: to_png(pixels_HWC ^ 1))
    others, _ = writer_of(storage, drawing).write(unit.id, unit.rows)
    assert set(others["sha256"].to_pylist()).isdisjoint(rows["sha256"].to_pylist())
    for row in read_samples(storage, drawing).to_pylist():
        assert storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"]).startswith(b"\x89PNG")


def test_a_sample_that_is_not_finite_is_a_row_with_a_reason_and_its_mates_are_drawn(
    storage: Storage, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = Sampler.embed

    def damaged(self: Sampler, text: str) -> Any:
        found = embed(self, text)
        if text == TEXTS[1]:
            found.arguments["prompt_embeds"].fill_(torch.nan)
        return found

    monkeypatch.setattr(Sampler, "embed", damaged)
    drawing = drawing_of(tiny_pipeline)
    draw_here(storage, drawing)
    rows = rows_of(storage, drawing)
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("kept", None), ("quarantined", "non_finite"), ("kept", None), ("kept", None)
    ]  # fmt: skip
    assert rows[1]["shard"] is None
    assert rows[1]["text"] == TEXTS[1]
    assert count_missing(storage, drawing) == 0, "it would be as bad again"
    members = [name for name, _ in read_shard(storage.read(rows[0]["shard"]))]
    assert len(members) == 6


def test_a_unit_of_which_nothing_is_finite_has_rows_and_no_shard(
    storage: Storage, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch = Sampler.draw

    def black(self: Sampler, *arguments: Any) -> Any:
        batch = draw_batch(self, *arguments)
        batch.is_finite_B[:] = False
        return batch

    monkeypatch.setattr(Sampler, "draw", black)
    drawing = drawing_of(tiny_pipeline)
    draw_here(storage, drawing)
    assert {row["reason"] for row in rows_of(storage, drawing)} == {"non_finite"}
    assert tars_of(storage) == {}


def test_a_batch_without_memory_is_halved_for_good_and_the_samples_are_the_same(
    tmp_path: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing, sizes = drawing_of(tiny_pipeline, images_per_prompt=4), []
    whole = Storage(str(tmp_path / "whole"))
    draw_here(whole, drawing, 8)
    draw_batch = Sampler.draw

    def narrow(self: Sampler, embeddings: Any, seeds: Any) -> Any:
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError(f"no memory for {len(seeds)}")
        return draw_batch(self, embeddings, seeds)

    monkeypatch.setattr(Sampler, "draw", narrow)
    halved = Storage(str(tmp_path / "halved"))
    writer = writer_of(halved, drawing, 8)
    (unit,) = pending_samples(halved, drawing, 8)
    rows, effort = writer.write(unit.id, unit.rows)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert effort.batch_size == 2
    found = [pixels_of(halved, row) for row in rows.to_pylist()]
    expected = [pixels_of(whole, row) for row in rows_of(whole, drawing)]
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) <= 1


def test_no_memory_for_a_single_sample_or_for_the_model_is_an_error(
    storage: Storage, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory at all\nand more")

    drawing = drawing_of(tiny_pipeline, name="base")
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draw", fail)
        with pytest.raises(EncodingError) as caught:
            draw_here(storage, drawing)
    assert caught.value.message == (
        "not enough memory to draw even one sample of base of 64 x 64 pixels: no memory at all"
    )
    assert "`evaluate.resolution`" in str(caught.value.hint)
    monkeypatch.setattr(drawing_actor, "Sampler", fail)
    with pytest.raises(EncodingError, match="not enough memory to load base: no memory at all"):
        draw_here(storage, drawing)
    assert tars_of(storage) == {}


def test_a_former_model_is_gone_before_the_next_is_loaded(
    storage: Storage, tiny_pipeline: Path, other_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []

    class Counted(Sampler):
        def __init__(self, *arguments: Any) -> None:
            alive.append(sum(type(each) is Counted for each in gc.get_objects()) - 1)
            super().__init__(*arguments)

    monkeypatch.setattr(drawing_actor, "Sampler", Counted)
    drawings = [drawing_of(folder) for folder in (tiny_pipeline, other_pipeline)]
    models = {each.fingerprint: (each.model, each.sampling) for each in drawings}
    writer = SampleWriter(models, storage, DrawSettings("evaluate", 4, 1))
    for drawing in (*drawings, drawings[0]):
        for unit in pending_samples(storage, drawing, 4):
            writer.write(unit.id, unit.rows)
    assert alive == [0, 0, 0]


def test_another_model_on_a_node_is_refused(storage: Storage, tiny_pipeline: Path, other_pipeline: Path) -> None:
    drawing = drawing_of(tiny_pipeline, name="base")
    elsewhere = DrawnModel("base", ModelSource(str(other_pipeline)))  # what a node may have under the same path
    writer = SampleWriter({drawing.fingerprint: (elsewhere, drawing.sampling)}, storage, DrawSettings("evaluate", 4, 1))
    (unit,) = pending_samples(storage, drawing, 4)
    with pytest.raises(ModelError, match=f"base is [0-9a-f]{{32}} on this node, but {drawing.fingerprint}"):
        writer.write(unit.id, unit.rows)


def test_samples_that_are_not_drawn_are_no_results(storage: Storage, tiny_pipeline: Path) -> None:
    draw_here(storage, drawing_of(tiny_pipeline))
    more = drawing_of(tiny_pipeline, (*TEXTS, "another"), name="base")
    with pytest.raises(SnapshotError, match="1 of 5 samples of base are not in "):
        read_samples(storage, more)


def test_a_storage_that_cannot_be_written_is_found_before_a_model_is_loaded(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        draw(Storage(str(tmp_path / "file" / "storage")), [drawing_of(tiny_pipeline)], workers())


def test_a_pipeline_that_is_damaged_arrives_as_our_own_error(
    ray_cluster: None, storage: Storage, tiny_pipeline: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "m")
    config = folder / "unet" / "config.json"
    config.write_text(
        config.read_text().replace('"block_out_channels": [\n    16,', '"block_out_channels": [\n    24,')
    )
    with pytest.raises(ModelError) as caught:
        draw(storage, [drawing_of(folder)], workers())
    assert type(caught.value) is ModelError
    assert "UNet" in caught.value.message
    assert tars_of(storage) == {}


def test_a_unit_that_kills_its_actors_is_given_up_and_named(
    ray_cluster: None, storage: Storage, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(drawing_actor.DrawSamples):
        """At its first unit the process is gone, as by the killer of what takes too much memory."""

        def __call__(self, batch: pa.Table) -> pa.Table:
            SampleWriter.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
            return super().__call__(batch)

    monkeypatch.setattr(pipelines.units.pool, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(execution, "actor_class", lambda: Killed)
    drawing = drawing_of(tiny_pipeline, name="base")
    with pytest.raises(EncodingError, match="actors died 1 times while drawing 4 samples of base") as caught:
        draw(storage, [drawing], workers())
    assert "`evaluate.batch_size`" in str(caught.value.hint)


def test_safety_checkers_are_said_to_be_off(
    ray_cluster: None, storage: Storage, sd_pipeline: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sd_pipeline, tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    lines: list[str] = []
    draw(storage, [drawing_of(folder, TEXTS[:1], name="sd")], workers(), lines.append)
    assert len([line for line in lines if "the safety checker of sd is off" in line]) == 1


def test_as_many_samplers_start_as_there_is_memory_for(
    ray_cluster: None, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [(DrawnModel("m", ModelSource(str(tiny_pipeline))), sampling_of())]
    needed = room.sampler_bytes(models, 4)
    for memory, num_workers, expected in (
        (0.9, 4, (1, 1, False)), (1.5, 4, (1, 1, False)), (2.5, 4, (2, 2, True)), (9.0, 4, (4, 4, True)),
        (9.0, 1, (1, 1, False)), (2.5, "1..4", (1, 4, True)), (0.5, "2..4", (1, 1, False)),
    ):  # fmt: skip
        monkeypatch.setattr(room, "nodes", lambda memory=memory: [{"CPU": 8.0, "memory": memory * needed}])
        pool = room.room_for(models, workers(num_workers=num_workers), 100)
        assert (pool.least, pool.most, "memory" in pool.options) == expected, (memory, num_workers)


def test_the_memory_of_a_sampler_follows_from_weights_type_and_pixels(tiny_pipeline: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    parts = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline).components.values()
    num_weights = sum(w.numel() for part in parts if isinstance(part, torch.nn.Module) for w in part.parameters())
    model = DrawnModel("m", ModelSource(str(tiny_pipeline)))
    assert room.num_weights(model) == pytest.approx(num_weights, rel=1e-4)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        found = room.sampler_bytes([(model, sampling_of(dtype=dtype))], 2)
        assert found == room.PROCESS_BYTES + size * room.num_weights(model) + 2 * 64 * 64 * room.PIXEL_BYTES
    full_size = room.PROCESS_BYTES + 2 * 3_468_000_000 + 256 * 256 * room.PIXEL_BYTES * 16
    assert Demand("CPU", {"memory": full_size}).places([{"CPU": 8.0, "memory": 20e9}]) == 1
