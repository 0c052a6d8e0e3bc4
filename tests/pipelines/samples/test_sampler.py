"""The sampler: diffusers' own samples, whatever the batch; every kind of model; nothing silently wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from drawings import TEXTS, sampling_of
from factories import new_sd15_pipeline
from numpy.typing import NDArray

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import ModelSource
from pipelines.samples.drawing import DrawnModel, Sampling
from pipelines.samples.loading import load_pipeline
from pipelines.samples.sampler import Sampler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CPU = torch.device("cpu")
SEEDS = (11, 12, 13, 14)
TOLERANCE = 1  # of 255


def model_of(folder: Path, **options: Any) -> DrawnModel:
    return DrawnModel("m", ModelSource(str(folder)), **options)


def drawn(model: DrawnModel, sampling: Sampling | None = None, batch: int = len(TEXTS)) -> NDArray[np.int16]:
    """The samples of TEXTS, drawn in batches of this size."""
    sampler = Sampler(model, sampling or sampling_of(), CPU)
    embeddings = [sampler.embed(text) for text in TEXTS]
    parts = [sampler.draw(embeddings[i : i + batch], SEEDS[i : i + batch]) for i in range(0, len(TEXTS), batch)]
    assert all(part.is_finite_B.all() for part in parts)
    return np.concatenate([part.pixels_BHWC for part in parts]).astype(np.int16)


def reference(pipeline: Any, sampling: Sampling | None = None) -> NDArray[np.int16]:
    """The samples of TEXTS as diffusers draws them."""
    sampling = sampling or sampling_of()
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        list(TEXTS), negative_prompt=None if sampling.negative_prompt is None else [sampling.negative_prompt] * 4,
        height=sampling.height, width=sampling.width, num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    )  # fmt: skip
    return np.stack([np.asarray(image) for image in result.images]).astype(np.int16)


def loaded(folder: Path, **parts: Any) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder, **parts)


def differ(one: NDArray[np.int16], other: NDArray[np.int16]) -> bool:
    return bool(np.abs(one - other).max() > 20)


@pytest.mark.parametrize(
    "sampling",
    [
        sampling_of(), sampling_of(guidance_scale=1.0), sampling_of(guidance_scale=0.0),
        sampling_of(height=32, width=96), sampling_of(negative_prompt="blue at night"),
        sampling_of(num_inference_steps=3),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("family", ["tiny_pipeline", "sd_pipeline"])
def test_samples_are_those_of_diffusers(family: str, sampling: Sampling, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    found, expected = drawn(model_of(folder), sampling), reference(loaded(folder), sampling)
    assert np.abs(found - expected).max() <= TOLERANCE
    assert expected.std() > 10, "a picture, not a surface"
    assert differ(found[0], found[1])


@pytest.mark.parametrize("family", ["tiny_pipeline", "sd_pipeline"])
def test_a_sample_does_not_depend_on_its_batch(family: str, request: pytest.FixtureRequest) -> None:
    model = model_of(request.getfixturevalue(family))
    together, alone = drawn(model), drawn(model, batch=1)
    assert np.abs(together - alone).max() <= TOLERANCE
    assert np.array_equal(together, drawn(model))
    assert np.array_equal(alone, drawn(model, batch=1))


def test_a_unet_alone_and_that_of_another_pipeline_replace_the_own(
    tiny_pipeline: Path, other_pipeline: Path, tmp_path: Path
) -> None:
    alone = shutil.copytree(other_pipeline / "unet", tmp_path / "unet")
    unet = diffusers.UNet2DConditionModel.from_pretrained(alone)
    expected = reference(loaded(tiny_pipeline, unet=unet))
    for folder in (alone, other_pipeline, f"file://{alone}"):
        assert np.abs(drawn(model_of(tiny_pipeline, unet=str(folder))) - expected).max() <= TOLERANCE
    assert differ(expected, drawn(model_of(tiny_pipeline)))


def test_a_lora_changes_unet_and_text_encoder_as_in_diffusers(tiny_pipeline: Path, lora: Path) -> None:
    pipeline = loaded(tiny_pipeline)
    pipeline.load_lora_weights(lora)
    expected = reference(pipeline)
    for path in (lora, lora / "pytorch_lora_weights.safetensors"):
        assert np.abs(drawn(model_of(tiny_pipeline, lora=str(path))) - expected).max() <= TOLERANCE
    assert differ(expected, drawn(model_of(tiny_pipeline)))


def test_a_lora_in_bfloat16(tiny_pipeline: Path, lora: Path) -> None:
    exact = drawn(model_of(tiny_pipeline, lora=str(lora)))
    coarse = drawn(model_of(tiny_pipeline, lora=str(lora)), sampling_of(dtype="bfloat16"))
    assert np.abs(exact - coarse).mean() < 6


def test_another_vae_and_another_prediction_type(tiny_pipeline: Path, other_pipeline: Path) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(other_pipeline / "vae")
    model = DrawnModel("m", ModelSource(str(tiny_pipeline), vae=str(other_pipeline / "vae")))
    assert np.abs(drawn(model) - reference(loaded(tiny_pipeline, vae=vae))).max() <= TOLERANCE
    pipeline = loaded(tiny_pipeline)
    schedule = pipeline.scheduler
    pipeline.scheduler = type(schedule).from_config(schedule.config, prediction_type="v_prediction")
    found = drawn(model_of(tiny_pipeline, prediction_type="v_prediction"))
    assert np.abs(found - reference(pipeline)).max() <= TOLERANCE
    assert differ(found, drawn(model_of(tiny_pipeline)))


def test_a_variant_of_the_weights(tiny_pipeline: Path, tmp_path: Path) -> None:
    pipeline = loaded(tiny_pipeline)
    pipeline.save_pretrained(tmp_path / "m", variant="special")
    model = DrawnModel("m", ModelSource(str(tmp_path / "m"), variant="special"))
    assert np.array_equal(drawn(model), drawn(model_of(tiny_pipeline)))


@pytest.mark.parametrize("family", ["tiny_pipeline", "sd_pipeline"])
def test_bfloat16_is_loaded_as_such_and_draws_nearly_the_same(family: str, request: pytest.FixtureRequest) -> None:
    model = model_of(request.getfixturevalue(family))
    pipeline = load_pipeline(model, "bfloat16", CPU)
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.bfloat16}
    exact, coarse = drawn(model), drawn(model, sampling_of(dtype="bfloat16"))
    assert np.abs(exact - coarse).mean() < 6
    assert np.array_equal(coarse, drawn(model, sampling_of(dtype="bfloat16")))


def test_a_safety_checker_is_not_loaded(tmp_path: Path) -> None:
    pipeline = new_sd15_pipeline()
    pipeline.save_pretrained(tmp_path / "m")
    index = tmp_path / "m" / "model_index.json"
    named = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index.write_text(json.dumps(json.loads(index.read_text()) | named))
    assert load_pipeline(model_of(tmp_path / "m"), "float32", CPU).safety_checker is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_found_and_its_mates_are_sound(tiny_pipeline: Path, value: float) -> None:
    sampler, whole = Sampler(model_of(tiny_pipeline), sampling_of(), CPU), drawn(model_of(tiny_pipeline))
    embeddings = [sampler.embed(text) for text in TEXTS]
    embeddings[1].arguments["prompt_embeds"] = embeddings[1].arguments["prompt_embeds"] * value
    batch = sampler.draw(embeddings, SEEDS)
    assert batch.is_finite_B.tolist() == [True, False, True, True]
    others = [0, 2, 3]
    assert np.abs(batch.pixels_BHWC[others].astype(np.int16) - whole[others]).max() <= TOLERANCE
    assert sampler.draw(embeddings[2:], SEEDS[2:]).is_finite_B.tolist() == [True, True]


def test_an_overflow_in_the_last_layer_is_found_although_diffusers_clamps_it_to_white(tiny_pipeline: Path) -> None:
    sampler = Sampler(model_of(tiny_pipeline), sampling_of(), CPU)
    last = sampler._pipeline.vae.decoder.conv_out
    last.register_forward_hook(lambda module, inputs, output: output + torch.inf)
    batch = sampler.draw([sampler.embed(TEXTS[0])], SEEDS[:1])
    assert batch.is_finite_B.tolist() == [False]


def test_a_vae_without_memory_for_a_batch_decodes_one_by_one_and_the_unet_keeps_its_batch(tiny_pipeline: Path) -> None:
    sampler, expected = Sampler(model_of(tiny_pipeline), sampling_of(), CPU), drawn(model_of(tiny_pipeline))
    denoised, decoded = [], []

    def narrow(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("no memory for a batch")
        decoded.append(len(inputs[0]))

    sampler._pipeline.vae.decoder.register_forward_pre_hook(narrow)
    sampler._pipeline.unet.register_forward_pre_hook(lambda module, inputs: denoised.append(len(inputs[0])))
    embeddings = [sampler.embed(text) for text in TEXTS]
    for _ in range(2):
        batch = sampler.draw(embeddings, SEEDS)
        assert np.abs(batch.pixels_BHWC.astype(np.int16) - expected).max() <= TOLERANCE
        assert batch.is_finite_B.tolist() == [True] * 4
    assert denoised == [8] * 4, "guidance doubles a batch of four; two steps, twice"
    assert decoded == [1] * 8


@pytest.mark.parametrize(
    ("part", "file"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder_2", "model")],
)
def test_weights_that_are_missing_are_no_random_ones(part: str, file: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "m")
    weights = safetensors.torch.load_file(folder / part / f"{file}.safetensors")
    left_out = sorted(weights)[-1]
    del weights[left_out]
    safetensors.torch.save_file(weights, folder / part / f"{file}.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors are missing from the weights of the"):
        load_pipeline(model_of(folder), "float32", CPU)


def test_a_lora_of_another_model_is_refused_and_not_ignored(sd_pipeline: Path, tiny_pipeline: Path, lora: Path) -> None:
    with pytest.raises(ModelError, match=r"LoRA"):
        load_pipeline(model_of(sd_pipeline, lora=str(lora)), "float32", CPU)


def test_a_lora_part_of_which_fits_nowhere_is_refused(tiny_pipeline: Path, lora: Path, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(lora / "pytorch_lora_weights.safetensors")
    name = next(name for name in sorted(weights) if name.startswith("unet") and "lora_A" in name)
    for kind in ("lora_A", "lora_B"):
        known = name.replace("lora_A", kind)
        weights[known.replace("blocks.1", "blocks.9").replace("blocks.2", "blocks.9")] = weights.pop(known)
    safetensors.torch.save_file(weights, tmp_path / "odd.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"LoRA"):
        load_pipeline(model_of(tiny_pipeline, lora=str(tmp_path / "odd.safetensors")), "float32", CPU)
