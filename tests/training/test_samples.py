"""Grids of samples: number for number as diffusers samples, and training never notices them."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import encoded
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from encoded import write_base, write_encoded
from engine_work import CONFIG as TWO_RANKS
from factories import new_sd15_pipeline
from PIL import Image
from ranks import on_ranks
from sample_work import FEW_STEPS, draw_average, with_and_without

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training import samples
from training.config import TrainConfig
from training.data.index import PairIndex, load_index, load_texts
from training.data.loader import PairReader
from training.data.order import validation_seed
from training.export import correct_schedule
from training.model import load_base
from training.samples import (
    GAP,
    GUIDANCE,
    MAX_SIDE,
    NUM_STEPS,
    SampleGrid,
    _image,
    grid_of,
    sample_file,
    subjects_of,
)
from training.spec import TrainSpec

# diffusers' scheduler about torch's tensors, with any numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CONFIG = TWO_RANKS.model_copy(update={"num_samples": 3, "channels_last": True})
VAE = {"latent_channels": 4, "block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2}


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def make_spec(folder: Path, base: Path, **data: Any) -> TrainSpec:
    storage = Storage(str(folder / "storage"))
    snapshot = write_encoded(storage, folder, **data)
    return TrainSpec(storage.url, "photos", ModelSource(str(base)), "0" * 16, 7, CONFIG, snapshot)


def opened(spec: TrainSpec) -> tuple[PairIndex, PairReader]:
    reader = PairReader(spec.storage, load_texts(spec.storage, spec.snapshot))
    return load_index(spec.storage, spec.snapshot, "validation"), reader


def lone_engine(unet: Any) -> Any:
    """What a grid needs of an engine, around a plain UNet."""
    return SimpleNamespace(
        unet=unet, rank=0, world_size=1, is_first=True, device=torch.device("cpu"), dtype=torch.float32
    )


def by_diffusers(pipeline: Any, reader: PairReader, subject: Any, *, seed: int) -> Image.Image:
    """The same sample, by the pipeline's own `__call__`."""
    batch, (null_SD, null_P) = reader.read([subject.record]), reader.null_conditioning
    generator = torch.Generator().manual_seed(validation_seed(seed, subject.record.prompt_id))
    inputs: dict[str, Any] = {
        "prompt_embeds": batch.prompt_embeds_BSD.float(),
        "negative_prompt_embeds": null_SD[None].float(),
        "latents": torch.randn(tuple(batch.chosen_BCHW.shape), generator=generator),
    }
    if isinstance(pipeline, StableDiffusionXLPipeline):
        inputs |= {
            "pooled_prompt_embeds": batch.pooled_BP.float(),
            "negative_pooled_prompt_embeds": null_P[None].float(),
        }
        inputs |= {"original_size": (subject.height, subject.width), "target_size": (subject.height, subject.width)}
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**inputs, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE).images[0]


def far(a: Any, b: Any) -> int:
    """The largest difference between two images, in levels of 0..255."""
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


@pytest.mark.parametrize("kind", ["sdxl", "sd15", "v_prediction", "statistics", "overridden", "three_chunks"])
def test_a_sample_is_what_the_diffusers_pipeline_gives(kind, tiny_pipeline, one_rank, tmp_path, monkeypatch) -> None:
    base_folder = tmp_path / "base"
    if kind == "sd15":
        new_sd15_pipeline().save_pretrained(base_folder)
    else:
        shutil.copytree(tiny_pipeline, base_folder)
        monkeypatch.setattr(encoded, "EMBEDDING", 40)
        monkeypatch.setattr(encoded, "POOLED", 24)
    if kind == "three_chunks":
        monkeypatch.setattr(encoded, "TOKENS", 231)
    if kind == "v_prediction":
        DDIMScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True,
            timestep_spacing="trailing", clip_sample=False,
        ).save_pretrained(base_folder / "scheduler")  # fmt: skip
    if kind == "statistics":
        file = base_folder / "vae/config.json"
        statistics = {"latents_mean": [-1.6, 1.1, 3.0, -2.6], "latents_std": [8.4, 6.0, 5.3, 4.3]}
        file.write_text(json.dumps(json.loads(file.read_text()) | statistics))
    spec = make_spec(tmp_path, base_folder, sides=(16,), num_validation=9)
    held_out, reader = opened(spec)
    held_out.buckets[0] = (96, 160)  # height, width: told to the UNet in this order
    base = load_base(spec.base, prediction_type="v_prediction" if kind == "overridden" else None)
    if kind == "overridden":
        correct_schedule(base_folder / "scheduler/scheduler_config.json", "v_prediction")
    assert base.has_time_ids == (kind != "sd15")
    grid = SampleGrid(held_out, reader, spec, lone_engine(base.unet), base).draw(100)
    cls = StableDiffusionPipeline if kind == "sd15" else StableDiffusionXLPipeline
    pipeline = (
        cls.from_pretrained(base_folder, safety_checker=None) if kind == "sd15" else cls.from_pretrained(base_folder)
    )
    expected = [by_diffusers(pipeline, reader, each, seed=7) for each in subjects_of(held_out, 3)]
    assert far(expected[0], expected[1]) > 20, "the prompts or the noise change nothing"
    assert far(grid, grid_of(expected)) <= 1
    stored = Image.open(io.BytesIO(spec.storage.read(f"runs/photos/samples/{spec.key}/step-00000100.jpg")))
    assert stored.size == grid.size


@pytest.mark.slow
def test_ranks_draw_one_grid_and_train_as_if_they_had_not(tmp_path, monkeypatch) -> None:
    """Three samples on two ranks, in buckets of two shapes; ZeRO-2 and ZeRO-3; against one plain UNet, to the bit."""
    base_folder = write_base(tmp_path / "base")
    AutoencoderKL(**VAE, sample_size=64, scaling_factor=0.5, down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4).save_pretrained(base_folder / "vae")  # fmt: skip
    spec = make_spec(tmp_path, base_folder, sides=(8, 12))
    configs = [CONFIG.model_copy(update={"zero_stage": stage}) for stage in (2, 3)]
    first, second = on_ranks(2, with_and_without, spec, configs)
    for with_grids, without in [*first, *second]:
        assert with_grids["is_still"]
        assert with_grids["weights"].keys() == without["weights"].keys()
        assert all(torch.equal(value, without["weights"][name]) for name, value in with_grids["weights"].items())
    assert all(grid is None for drawn, _ in second for grid in drawn["grids"])
    zero_2, zero_3 = (drawn["grids"] for drawn, _ in first)
    assert zero_2[0].shape == (2 * 96 + GAP, 2 * 96 + GAP, 3)
    assert all(far(a, b) <= 1 for a, b in zip(zero_2, zero_3, strict=True))
    assert far(zero_2[0], zero_2[1]) > 1, "training changes the grid"
    assert spec.storage.exists(sample_file(spec, 1))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    base = load_base(spec.base)
    monkeypatch.setattr(samples, "NUM_STEPS", FEW_STEPS)
    alone = SampleGrid(*opened(spec), spec, lone_engine(base.unet), base)
    assert far(alone.draw(0), zero_2[0]) <= 1
    assert far(alone.draw(1), zero_2[0]) <= 1, "the same weights draw the same grid"
    torch.distributed.destroy_process_group()


def test_a_grid_is_of_the_average_if_there_is_one(tmp_path) -> None:
    """The average has stayed at the start while the weights moved."""
    base = write_base(tmp_path / "base")
    AutoencoderKL(
        **VAE, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
    ).save_pretrained(base / "vae")
    spec = make_spec(tmp_path, base)
    changes = {"num_workers": 1, "ema": {"decay": 0.9}, "learning_rate": 0.05, "zero_stage": 3}
    spec = replace(spec, config=TrainConfig.model_validate(spec.config.model_dump() | changes))
    before, of_average, of_weights = on_ranks(1, draw_average, spec)[0]
    assert far(before, of_average) == 0
    assert far(before, of_weights) > 20


def test_the_first_distinct_prompts_by_key_are_drawn_whatever_their_bucket(tmp_path) -> None:
    held_out, _ = opened(make_spec(tmp_path, tmp_path, sides=(8, 12, 16), num_validation=30))
    buckets = range(len(held_out.buckets))
    pairs = [held_out.pair(bucket, i) for bucket in buckets for i in range(held_out.bucket_sizes[bucket])]
    in_order = list(dict.fromkeys(pair.prompt_id for pair in sorted(pairs, key=lambda pair: pair.pair_key)))
    assert [each.record.prompt_id for each in subjects_of(held_out, 3)] == in_order[:3]
    assert [each.record.prompt_id for each in subjects_of(held_out, 100)] == in_order
    assert len({each.height for each in subjects_of(held_out, 100)}) > 1


def test_nothing_held_out_is_said_once_and_draws_nothing(tmp_path) -> None:
    spec = make_spec(tmp_path, tmp_path / "not even a model", num_validation=0)
    nothing = SampleGrid(*opened(spec), spec, lone_engine(None), None)
    assert "no pairs are held out" in nothing.note
    assert nothing.draw(0) is None


def test_a_base_without_a_vae_is_refused_before_the_first_step(tmp_path) -> None:
    spec = make_spec(tmp_path, write_base(tmp_path / "base"))
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model.safetensors is missing"):
        SampleGrid(*opened(spec), spec, lone_engine(None), None)


def test_a_grid_keeps_every_shape_and_no_side_is_longer_than_512() -> None:
    images = [_image(torch.full((1, 3, height, width), level)) for height, width, level in
              ((768, 1344, -1.0), (1344, 768, 1.0), (64, 64, float("nan")))]  # fmt: skip
    assert [image.size for image in images] == [(MAX_SIDE, 293), (293, MAX_SIDE), (64, 64)]
    assert [image.getpixel((5, 5)) for image in images] == [(0, 0, 0), (255, 255, 255), (0, 0, 0)]
    grid = grid_of(images)
    assert grid.size == (2 * MAX_SIDE + GAP, 2 * MAX_SIDE + GAP)
    assert grid.getpixel((256, 256)) == (0, 0, 0)
    assert grid.getpixel((MAX_SIDE + GAP + 256, 256)) == (255, 255, 255)
    assert grid.getpixel((256, 20)) == grid.getpixel((900, 900)) == (128, 128, 128)
