"""What is drawn is kept, models take turns where there is no room for all, and a batch without memory is halved."""

import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from orchestration.config import RunConfig
from orchestration.stages import model_samples as evaluation
from orchestration.stages import turns
from orchestration.stages.drawn_samples import DrawnSamples
from orchestration.stages.model_samples import SampleModel, draw_samples
from orchestration.stages.turns import Room, draw_missing, find_room
from pipelines.dataset.errors import EncodingError
from pipelines.dataset.storage import Storage
from pipelines.resources import Demand
from pipelines.units import waiting

FOLDER = "runs/small/evaluation"
PROMPTS, SEEDS = ["a cat", "a red house", "a dog"], [0, 1, 2]


@pytest.fixture
def config(tmp_path: Path, tiny_pipeline: Path) -> RunConfig:
    """A run whose exported model is its base."""
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "model").symlink_to(tiny_pipeline)
    return configured(tmp_path, tiny_pipeline)


def configured(storage: Path, model: Path, **evaluate: Any) -> RunConfig:
    evaluate = {"num_inference_steps": 1, "batch_size": 2, "num_samples": len(PROMPTS)} | evaluate
    encode = {"model": str(model), "resolution": 64}
    return RunConfig.model_validate({"name": "small", "storage": str(storage), "encode": encode, "evaluate": evaluate})


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def written(storage: Path) -> dict[str, int]:
    """When each image was written."""
    return {file.name: file.stat().st_mtime_ns for file in (storage / FOLDER).glob("*.png")}


def changed(before: dict[str, int], storage: Path) -> set[str]:
    return {name for name, moment in written(storage).items() if before.get(name) != moment}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_is_drawn_of_the_same_is_kept_and_nothing_else(
    ray_cluster: None, config: RunConfig, tmp_path: Path
) -> None:
    storage = Storage(config.storage)
    first = draw_samples(config, storage, FOLDER, "weights", PROMPTS, SEEDS)
    before, images = written(tmp_path), first["base"].images
    assert len(before) == 2 * len(PROMPTS)
    assert images == first["aligned"].images
    assert len(set(images)) == len(PROMPTS)

    storage.delete(f"{FOLDER}/aligned-001.png")
    storage.write(f"{FOLDER}/base-002.png", png("red"))  # somebody else's
    storage.write(f"{FOLDER}/base-007.png", png("red"))  # of a run that had more
    again = draw_samples(config, storage, FOLDER, "weights", PROMPTS, SEEDS)
    assert changed(before, tmp_path) == {"aligned-001.png", "base-002.png"}
    assert len(written(tmp_path)) == 2 * len(PROMPTS)
    assert again["base"].images == again["aligned"].images == images

    before = written(tmp_path)
    storage.write(f"{FOLDER}/evaluation.json", b"{}")
    draw_samples(config, storage, FOLDER, "weights", PROMPTS, SEEDS)
    assert changed(before, tmp_path) == set()
    assert storage.exists(f"{FOLDER}/evaluation.json")
    draw_samples(config, storage, FOLDER, "other weights", PROMPTS, SEEDS)
    assert changed(before, tmp_path) == {"aligned-000.png", "aligned-001.png", "aligned-002.png"}
    assert not storage.exists(f"{FOLDER}/evaluation.json"), "its numbers are of samples that are gone"


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 2}, {"guidance_scale": 1.0}, {"prompt": "another"}, {"seed": 9}, {"resolution": 128},
        {"prediction_type": "v_prediction"}, {"device": "gpu"}, {"base": "scheduler/scheduler_config.json"},
        {"base": "vae/config.json"}, {"base": "text_encoder_2/config.json"}, {"base": "tokenizer/tokenizer.json"},
    ],
    ids=str,
)  # fmt: skip
def test_samples_of_another_model_or_of_other_settings_are_removed_before_any_is_drawn(
    ray_cluster: None, change: dict[str, Any], config: RunConfig, tmp_path: Path, tiny_pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    storage = Storage(config.storage)
    drawers: list[dict[str, DrawnSamples]] = []
    monkeypatch.setattr(evaluation, "draw_missing", lambda config, drawn, *rest: drawers.append(dict(drawn)))

    def plan(config: RunConfig, prompts: list[str], seeds: list[int]) -> DrawnSamples:
        draw_samples(config, storage, FOLDER, "weights", prompts, seeds)
        return drawers[-1]["base"]

    plan(config, PROMPTS, SEEDS).add([0, 1, 2], [png("red"), png("green"), png("blue")], "float32")
    assert plan(config, PROMPTS, SEEDS).missing == []
    assert plan(configured(tmp_path, tiny_pipeline, batch_size=1), PROMPTS, SEEDS).missing == []
    prompts = [change.pop("prompt", PROMPTS[0]), *PROMPTS[1:]]
    seeds = [change.pop("seed", SEEDS[0]), *SEEDS[1:]]
    other = config.model_dump()
    other["encode"] |= {name: change.pop(name) for name in ("resolution", "device") if name in change}
    if "prediction_type" in change:
        other["train"] = {"prediction_type": change.pop("prediction_type")}
    if "base" in change:
        other["encode"]["model"] = str(_changed_copy(tiny_pipeline, tmp_path / "other", change.pop("base")))
    other["evaluate"] |= change
    missing = plan(RunConfig.model_validate(other), prompts, seeds).missing
    assert missing == ([0] if (prompts, seeds) != (PROMPTS, SEEDS) else [0, 1, 2])
    assert {f"base-{place:03d}.png" for place in missing} & set(written(tmp_path)) == set()


def _changed_copy(model: Path, target: Path, name: str) -> Path:
    shutil.copytree(model, target)
    file = target / name
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    return target


def test_an_image_counts_only_with_its_record_and_in_the_type_of_this_machine(tmp_path: Path) -> None:
    storage, made_from = Storage(str(tmp_path)), ["a", "b"]
    drawn = DrawnSamples(storage, "e", "base", made_from)
    storage.write("e/base-000.png", png("red"))  # the driver died before the record
    assert DrawnSamples(storage, "e", "base", made_from).missing == [0, 1]
    drawn.add([0], [png("red")], "float32")
    assert DrawnSamples(storage, "e", "base", made_from).missing == [1]
    assert DrawnSamples(storage, "e", "aligned", made_from).missing == [0, 1]
    assert DrawnSamples(storage, "e", "base", ["a"]).images == [png("red")]
    on_gpu = DrawnSamples(storage, "e", "base", made_from)
    on_gpu.remove_others("float16")
    assert on_gpu.missing == [0, 1]
    assert storage.names("e") == ["e/base.json"]
    storage.write("e/base.json", b"no record")
    assert DrawnSamples(storage, "e", "base", made_from).missing == [0, 1]


class _Pipeline:
    """In the place of a pipeline: it has memory for so many samples at once, and looks around."""

    def __init__(self, room: int, folder: Path, name: str, look: Callable[[Path, str], bytes]) -> None:
        self._room, self._folder, self._name, self._look = room, folder, name, look

    def sample(self, prompts: list[str], seeds: list[int]) -> list[bytes]:
        if len(prompts) > self._room:
            raise torch.OutOfMemoryError(f"no memory for {len(prompts)}")
        return [self._look(self._folder, self._name)] * len(prompts)


class _Model(SampleModel):
    def __init__(self, config: RunConfig, room: int, folder: Path, name: str, look: Callable[[Path, str], bytes]):
        super().__init__(config, None)
        self._pipeline = room, folder, name, look

    def _load(self) -> Any:
        return _Pipeline(*self._pipeline)


def drawn_by(
    config: RunConfig, folder: Path, look: Callable[[Path, str], bytes], *, has_memory_for: int = 9
) -> dict[str, DrawnSamples]:
    """Both models drawn by actors that have such a pipeline."""
    import ray

    storage = Storage(config.storage)
    drawn = {name: DrawnSamples(storage, FOLDER, name, PROMPTS) for name in ("base", "aligned")}

    def new_actor(name: str, room: Room) -> Any:
        actor = ray.remote(**room.demand.options())(_Model)
        return actor.remote(config, has_memory_for, folder, name, look)

    draw_missing(config, drawn, new_actor, PROMPTS, SEEDS)
    return drawn


def _alone(folder: Path, name: str) -> bytes:
    """Whether the process of any other model lives, by the files that they leave."""
    others = [int(file.read_text()) for file in folder.glob("*.pid") if file.stem != name]
    (folder / f"{name}.pid").write_text(str(os.getpid()))
    return b"alone" if not any(psutil.pid_exists(pid) for pid in others) else b"beside another"


def _met(folder: Path, name: str) -> bytes:
    """Wait until another model draws as well."""
    (folder / f"{name}.met").write_text("")
    deadline = time.monotonic() + 300
    while len(list(folder.glob("*.met"))) < 2:
        if time.monotonic() > deadline:
            return b"alone"
        time.sleep(0.02)
    return b"beside another"


def _red(folder: Path, name: str) -> bytes:
    return png("red")


def test_with_room_for_both_they_draw_side_by_side(ray_cluster: None, config: RunConfig, tmp_path: Path) -> None:
    assert find_room(config, 2).at_once == 2
    drawn = drawn_by(config, tmp_path, _met)
    assert {image for each in drawn.values() for image in each.images} == {b"beside another"}


def test_without_memory_for_both_the_first_is_gone_before_the_second_begins(
    ray_cluster: None, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PIXEL_BYTES", 1 << 40)  # as if a sample needed more than there is
    assert find_room(config, 2) == Room(Demand("CPU"), 1)
    drawn = drawn_by(config, tmp_path, _alone)
    assert {image for each in drawn.values() for image in each.images} == {b"alone"}


def test_a_batch_without_memory_is_halved_and_what_was_drawn_stays(
    ray_cluster: None, tmp_path: Path, tiny_pipeline: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured(tmp_path, tiny_pipeline, batch_size=16)
    drawn = drawn_by(config, tmp_path, _red, has_memory_for=1)
    assert drawn["base"].images == drawn["aligned"].images == [png("red")] * 3
    said = capfd.readouterr().err
    assert said.count("evaluate: out of memory in a batch of 3; continuing with batches of 1") == 2


def test_no_memory_for_a_single_sample_is_an_error(ray_cluster: None, config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(EncodingError, match="not enough memory to draw one sample of 64 x 64 pixels: no memory for 1"):
        drawn_by(config, tmp_path, _red, has_memory_for=0)


def test_a_cluster_that_is_in_use_is_waited_for_and_that_is_said(
    ray_cluster: None, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import ray

    class Holder:
        def hold(self) -> None:
            """It has its CPUs."""

    monkeypatch.setattr(waiting, "FIRST_WORD_S", 1.0)
    holder = ray.remote(num_cpus=6)(Holder).remote()
    ray.get(holder.hold.remote())
    release = threading.Timer(5, lambda: ray.kill(holder))
    release.start()
    drawn = drawn_by(config, tmp_path, _red)
    release.join()
    assert not drawn["aligned"].missing
    assert "evaluate: waiting for a free CPU (0:0" in capfd.readouterr().err


def test_the_memory_of_a_pipeline_is_that_of_its_weights_and_a_full_size_one_is_alone_on_24_gb(
    config: RunConfig, tiny_pipeline: Path
) -> None:
    from diffusers import StableDiffusionXLPipeline

    parts = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline).components
    modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    num_weights = sum(weight.numel() for part in modules for weight in part.parameters())
    assert config.encode
    assert turns.pipeline_bytes(config.encode.source) == pytest.approx(turns.PROCESS_BYTES + 4 * num_weights, rel=1e-4)
    full_size = turns.PROCESS_BYTES + 4 * 3_468_000_000  # UNet, VAE and both text encoders of SDXL
    assert Demand("CPU", {"memory": full_size}).places([{"CPU": 8.0, "memory": 24e9}]) == 1
