"""A base that training does not understand is one error before any work; one that it does is trained right."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import new_pipeline, new_sd15_pipeline, photo_pairs, write_parquet
from safetensors.torch import load_file, save_file

from pipelines.dataset.base_model import check_base, check_denoiser
from pipelines.dataset.base_schedule import is_distilled_name, short_name
from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import ModelSource
from pipelines.encode.encoders import LatentEncoder
from training.config import TrainConfig
from training.data.batch import Batch
from training.model import Denoiser, load_base

MAPO = Path(sys.executable).with_name("mapo")
CASES = Path(__file__).parents[4] / "shared" / "cases" / "models"
UNET, VAE = "unet/config.json", "vae/config.json"
SCHEDULE, INDEX = "scheduler/scheduler_config.json", "model_index.json"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15") / "model"
    new_sd15_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def model(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the tiny SDXL pipeline, to be changed."""
    return shutil.copytree(tiny_pipeline, tmp_path / "model")


@pytest.fixture
def sd_model(sd15: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sd15, tmp_path / "model")


def edit(name: str, *left_out: str, **values: Any) -> Change:
    """A change of one configuration file."""

    def change(model: Path) -> None:
        found = json.loads((model / name).read_text()) | values
        (model / name).write_text(json.dumps({key: each for key, each in found.items() if key not in left_out}))

    return change


def schedule(class_name: str, **values: Any) -> Change:
    """Another scheduler, in the pipeline's index too."""

    def change(model: Path) -> None:
        edit(INDEX, scheduler=["diffusers", class_name])(model)
        (model / SCHEDULE).write_text(json.dumps({"_class_name": class_name} | values))

    return change


def betas(class_name: str, **values: Any) -> Change:
    """A scheduler file with SDXL's betas."""
    written = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    return schedule(class_name, **written | values)


def weights(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def changed(model: Path) -> None:
        tensors = load_file(model / file)
        change(tensors)
        save_file(tensors, model / file, {"format": "pt"})

    return changed


def both(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]


def refused(model: Path, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        check_base(ModelSource(str(model)), **options)
    assert caught.value.hint
    assert str(model) in caught.value.message
    return caught.value


REFUSED: dict[str, tuple[Change, str]] = {
    # The UNet and its channels
    "inpainting": (edit(UNET, in_channels=9), "unet.in_channels of {} is 9, but vae.latent_channels is 4: an"),
    "edits": (edit(UNET, in_channels=8), "is 8, but vae.latent_channels is 4: a UNet that edits images"),
    "depth": (edit(UNET, in_channels=5), "is 5, but vae.latent_channels is 4: a depth-conditioned UNet"),
    "upscaler": (edit(UNET, in_channels=7), "an upscaler's UNet"),
    "16 channels": (edit(UNET, in_channels=16, out_channels=16), "unet.in_channels of {} is 16"),
    "a VAE of 16 channels": (edit(VAE, latent_channels=16), "is 4, but vae.latent_channels is 16"),
    "a variance": (edit(UNET, out_channels=8), "unet.out_channels of {} is 8, .*: a UNet that also predicts a vari"),
    "three out": (edit(UNET, out_channels=3), "unet.out_channels of {} is 3"),
    "a text for a number": (edit(UNET, in_channels="4"), "unet.in_channels of {} is 4, not a whole number"),
    "another UNet": (edit(UNET, _class_name="UNet2DModel"), "the unet of {} is a UNet2DModel"),
    "another UNet in the index": (edit(INDEX, unet=["diffusers", "UNetMotionModel"]), "unet of {} is UNetMotionModel"),
    "LCM": (edit(UNET, time_cond_proj_dim=256), "unet.time_cond_proj_dim of {} is 256: .* latent consistency model"),
    "classes": (edit(UNET, num_class_embeds=10), "unet.num_class_embeds of {} is 10"),
    "a class type": (edit(UNET, class_embed_type="timestep"), "unet.class_embed_type of {} is timestep"),
    "image embeddings": (edit(UNET, encoder_hid_dim_type="image_proj"), "unet.encoder_hid_dim_type of {} is image"),
    "Fourier times": (edit(UNET, time_embedding_type="fourier"), "unet.time_embedding_type of {} is fourier"),
    "grounded": (edit(UNET, attention_type="gated"), "unet.attention_type of {} is gated"),
    "quantized": (edit(UNET, quantization_config={"bits": 4}), "unet.quantization_config of {}"),
    "another conditioning": (edit(UNET, addition_embed_type="text_image"), "unet.addition_embed_type of {} is text_"),
    "no conditioning": (edit(UNET, addition_embed_type=None), "unet.addition_embed_type of {} is None, not text_time"),
    # The weights under the configuration
    "weights of an inpainting UNet": (
        weights(UNET_WEIGHTS, lambda found: found.update({"conv_in.weight": torch.zeros(16, 9, 3, 3)})),
        r"unet.in_channels of {} is 4, but conv_in.weight has the shape \[16, 9, 3, 3\]",
    ),
    "weights of another text width": (
        weights(
            UNET_WEIGHTS,
            lambda found: found.update(
                {name: torch.zeros(len(each), 64) for name, each in found.items() if "attn2.to_k.weight" in name}
            ),
        ),
        r"unet.cross_attention_dim of {} is 40, but .*attn2.to_k.weight has the shape",
    ),
    "weights of another pooled width": (
        weights(UNET_WEIGHTS, lambda found: found.update({"add_embedding.linear_1.weight": torch.zeros(64, 99)})),
        "unet.projection_class_embeddings_input_dim of {} is 72, but add_embedding.linear_1.weight",
    ),
    "weights of another size": (edit(UNET, block_out_channels=[16, 32, 32]), r"unet.block_out_channels\[1\] of {} is"),
    "weights that take guidance": (
        weights(UNET_WEIGHTS, lambda found: found.update({"time_embedding.cond_proj.weight": torch.zeros(16, 256)})),
        r"contain time_embedding.cond_proj.\*, but unet.time_cond_proj_dim is not set",
    ),
    "weights without a part": (
        weights(UNET_WEIGHTS, lambda found: found.pop("conv_out.weight")),
        "conv_out.weight is missing from the weights of the unet of {}",
    ),
    "weights of more layers": (
        edit(UNET, layers_per_block=2), "unet.layers_per_block of {} is 2, but the weights of down_blocks.0 have 1 la",
    ),
    "layers that are a word": (edit(UNET, layers_per_block="1"), "unet.layers_per_block of {} is 1, not a whole numb"),
    "too few kinds of blocks": (
        edit(UNET, down_block_types=["DownBlock2D"]), "unet.down_block_types of {} is .*, but block_out_channels has 3",
    ),
    "attention that the configuration leaves out": (
        edit(UNET, down_block_types=["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"]),
        r"unet.down_block_types\[1\] of {} is DownBlock2D, but the weights of that block have attention",
    ),
    "attention that the weights lack": (
        edit(UNET, up_block_types=["CrossAttnUpBlock2D"] * 3),
        r"unet.up_block_types\[2\] of {} is CrossAttnUpBlock2D, but the weights of that block have no attention",
    ),
    "weights of another VAE": (
        weights(
            "vae/diffusion_pytorch_model.safetensors",
            lambda found: found.update({"decoder.conv_in.weight": torch.zeros(16, 16, 3, 3)}),
        ),
        "vae.latent_channels of {} is 4, but decoder.conv_in.weight",
    ),
    # Text encoders
    "another text width": (
        edit(UNET, cross_attention_dim=64),
        "unet.cross_attention_dim of {} is 64, but",
    ),
    "the text encoder of another model": (
        both(
            edit("text_encoder/config.json", hidden_size=32),
            weights(
                "text_encoder/model.safetensors",
                lambda found: found.update(
                    {name: torch.zeros(len(each), 32) for name, each in found.items() if "embedding.weight" in name}
                ),
            ),
        ),
        r"unet.cross_attention_dim of {} is 40, but its text encoders have 32 \+ 24 = 56",
    ),
    "an edited text encoder": (
        edit("text_encoder_2/config.json", hidden_size=16),
        "hidden_size of the text_encoder_2 of {} is 16, but .*token_embedding.weight has the shape",
    ),
    "a refiner": (edit(INDEX, text_encoder=[None, None]), "the text_encoder of {} is None, .*: SDXL's refiner"),
    "a refiner's time ids": (
        both(
            edit(UNET, projection_class_embeddings_input_dim=5 * 8 + 24),
            weights(UNET_WEIGHTS, lambda found: found.update({"add_embedding.linear_1.weight": torch.zeros(64, 64)})),
        ),
        "is 64, not 6 x addition_time_embed_dim .* = 6 x 8 [+] 24: a refiner",
    ),
    "another encoder": (
        edit(INDEX, text_encoder_2=["transformers", "T5EncoderModel"]),
        "the text_encoder_2 of {} is T5EncoderModel, not CLIPTextModelWithProjection",
    ),
    "another tokenizer": (edit(INDEX, tokenizer=["transformers", "T5Tokenizer"]), "the tokenizer of {} is T5Tokenizer"),
    "too long a prompt": (
        edit("tokenizer/tokenizer_config.json", model_max_length=248),
        "tokenizer.model_max_length of {} is 248, but text_encoder.max_position_embeddings is 77",
    ),
    "no length of a prompt": (
        edit("tokenizer/tokenizer_config.json", "model_max_length"), "tokenizer.model_max_length of {} is None",
    ),
    "two lengths": (
        edit("tokenizer_2/tokenizer_config.json", model_max_length=64), "differ in model_max_length: tokenizer has 77",
    ),
    "more tokens than places": (
        lambda model: (model / "tokenizer/vocab.json").write_text(json.dumps({str(i): i for i in range(50_000)})),
        "tokenizer of {} has 50000 tokens, but text_encoder.vocab_size is",
    ),
    # The VAE
    "another VAE": (edit(INDEX, vae=["diffusers", "AutoencoderTiny"]), "the vae of {} is AutoencoderTiny"),
    "a shift": (edit(VAE, shift_factor=0.0609), "vae.shift_factor of {} is 0.0609, which StableDiffusionXLPipeline ig"),
    "a mean alone": (edit(VAE, latents_mean=[0.0] * 4), "vae.latents_std of {} is None, not a number for each of 4"),
    "a mean of 16": (
        edit(VAE, latents_mean=[0.0] * 16, latents_std=[1.0] * 16), "vae.latents_mean of {} .* for each of 4 channels",
    ),
    "no spread": (edit(VAE, latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 0.0, 1.0]), "vae.latents_std of {} .*not"),
    "no scale": (edit(VAE, scaling_factor=0), "vae.scaling_factor of {} is 0"),
    "an endless scale": (edit(VAE, scaling_factor=float("inf")), "vae.scaling_factor of {} is inf"),
    "a spread that is no number": (
        edit(VAE, latents_mean=[0.0] * 4, latents_std=[float("nan")] * 4), "vae.latents_std of {} .*nan",
    ),
    "channels that are one number": (edit(UNET, block_out_channels=32), "unet.block_out_channels of {} is 32, not a l"),
    "a part that is a number": (edit("model_index.json", vae=3), "`vae` in .* is 3, not a library and a class"),
    # The schedule
    "flow": (schedule("FlowMatchEulerDiscreteScheduler", shift=3.0), "is FlowMatchEulerDiscreteScheduler: a flow"),
    "flow under Heun's method": (schedule("FlowMatchHeunDiscreteScheduler"), "a flow-matching model"),
    "flow in the index alone": (
        edit(INDEX, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]), "a flow-matching model",
    ),
    "flow by its sigmas": (
        betas("DPMSolverMultistepScheduler", use_flow_sigmas=True), "scheduler.use_flow_sigmas of {} is True: a flow",
    ),
    "flow by its prediction": (
        betas("UniPCMultistepScheduler", prediction_type="flow_prediction"), "prediction_type of {} is flow_prediction",
    ),
    "EDM": (schedule("EDMEulerScheduler", prediction_type="epsilon", sigma_data=0.5), "is EDMEulerScheduler: an EDM"),
    "EDM in DPM++": (schedule("EDMDPMSolverMultistepScheduler", sigma_data=0.5), "an EDM model"),
    "EDM under Euler's name": (
        betas("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction"),
        "scheduler.timestep_type of {} is continuous: an EDM model",
    ),
    "EDM by its data": (betas("DDIMScheduler", sigma_data=0.5), "scheduler.sigma_data of {} is 0.5"),
    "consistency": (schedule("CMStochasticIterativeScheduler", sigma_data=0.5), "a consistency model"),
    "an unknown one": (schedule("IPNDMScheduler", num_train_timesteps=1000), "is IPNDMScheduler, which does not state"),
    "no class": (both(edit(SCHEDULE, "_class_name"), edit(INDEX, "scheduler")), "scheduler._class_name of {} is"),
    "no betas": (
        schedule("EulerDiscreteScheduler", num_train_timesteps=1000),
        "does not state beta_schedule, beta_start, beta_end, and the model may not have been",
    ),
    "no schedule": (edit(SCHEDULE, "beta_schedule"), "does not state beta_schedule,"),
    "no end": (edit(SCHEDULE, beta_end=None), "does not state beta_end,"),
    "no length": (edit(SCHEDULE, "num_train_timesteps"), "does not state num_train_timesteps,"),
    "betas of another kind": (edit(SCHEDULE, beta_schedule="laplace"), "scheduler.beta_schedule of {} is laplace"),
    "betas that fall": (edit(SCHEDULE, beta_start=0.02), "scheduler.beta_start and beta_end of {} are 0.02 and 0.012"),
    "betas as words": (edit(SCHEDULE, beta_end="0.012"), "scheduler.beta_start and beta_end of {}"),
    "trained betas of another length": (
        edit(SCHEDULE, trained_betas=[0.01] * 50), "trained_betas of {} are 50 values, not num_train_timesteps = 1000",
    ),
    "trained betas that fall": (
        edit(SCHEDULE, trained_betas=[0.02] + [0.01] * 999), "trained_betas of {} decrease somewhere",
    ),
    "zero SNR as a word": (edit(SCHEDULE, rescale_betas_zero_snr="true"), "_zero_snr of {} is 'true', not true or fal"),
    "x0": (edit(SCHEDULE, prediction_type="sample"), "scheduler.prediction_type of {} is sample; training supports"),
    "LCM's scheduler": (betas("LCMScheduler"), "distilled to a few steps: its scheduler is LCMScheduler"),
    "TCD's scheduler": (betas("TCDScheduler"), "distilled to a few steps: its scheduler is TCDScheduler"),
    "Turbo by its file": (
        betas("EulerAncestralDiscreteScheduler", timestep_spacing="trailing", prediction_type="epsilon"),
        "distilled to a few steps: scheduler.timestep_spacing is trailing with prediction_type epsilon",
    ),
    "Lightning by its name": (edit(UNET, _name_or_path="me/RealVisXL_V4.0_Lightning"), "it is called RealVisXL_V4.0"),
    "Turbo by its cache": (
        edit(INDEX, _name_or_path="/hub/models--stabilityai--sdxl-turbo/snapshots/71153311"), "it is called sdxl-turbo",
    ),
    "zero SNR without velocity": (
        edit(SCHEDULE, rescale_betas_zero_snr=True),
        "scheduler.rescale_betas_zero_snr of {} is true, but prediction_type is epsilon",
    ),
}  # fmt: skip

ON_THE_USERS_WORD = (
    "x0", "LCM's scheduler", "TCD's scheduler", "Turbo by its file", "Lightning by its name", "Turbo by its cache",
    "zero SNR without velocity",
)  # fmt: skip
"""What `train.prediction_type` lets pass: the betas are there, and the user knows what the model predicts."""


@pytest.mark.parametrize("what", REFUSED)
def test_a_base_of_another_kind_is_one_error_that_names_part_key_and_value(what: str, model: Path) -> None:
    change, message = REFUSED[what]
    change(model)
    error = refused(model)
    assert re.search(message.replace("{}", re.escape(str(model))), error.message), error.message
    if what in ON_THE_USERS_WORD:
        assert "train.prediction_type" in str(error.hint)
        for predicted in ("epsilon", "v_prediction"):
            assert check_base(ModelSource(str(model)), prediction_type=predicted).prediction_type == predicted
    else:
        assert "train.prediction_type" not in str(error.hint)
        assert refused(model, prediction_type="epsilon").message == error.message


SD_REFUSED: dict[str, tuple[Change, str]] = {
    "SDXL's conditioning": (edit(UNET, addition_embed_type="text_time"), "addition_embed_type of {} is text_time"),
    "statistics that its pipeline ignores": (
        edit(VAE, latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "latents_mean and .* StableDiffusionPipeline ignores",
    ),
    "another text width": (edit(UNET, cross_attention_dim=[32, 32, 24]), "unet.cross_attention_dim of {} is 24, but"),
    "no text encoder": (edit(INDEX, text_encoder=[None, None]), "the text_encoder of {} is None, not CLIPTextModel$"),
}  # fmt: skip


@pytest.mark.parametrize("what", SD_REFUSED)
def test_of_stable_diffusion_too(what: str, sd_model: Path) -> None:
    change, message = SD_REFUSED[what]
    change(sd_model)
    assert re.search(message.replace("{}", re.escape(str(sd_model))), refused(sd_model).message)


ACCEPTED: dict[str, tuple[Change, str]] = {
    "as it is": (lambda model: None, "epsilon"),
    "a file of 2022": (edit(SCHEDULE, "prediction_type", "timestep_spacing", "rescale_betas_zero_snr"), "epsilon"),
    "zero SNR": (
        edit(SCHEDULE, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        "v_prediction",
    ),
    "a cosine": (
        both(edit(SCHEDULE, "beta_start", "beta_end"), edit(SCHEDULE, beta_schedule="squaredcos_cap_v2")), "epsilon",
    ),
    "trained betas": (
        both(edit(SCHEDULE, "beta_start", "beta_end", "beta_schedule"), edit(SCHEDULE, trained_betas=[0.01] * 1000)),
        "epsilon",
    ),
    "DPM++": (betas("DPMSolverMultistepScheduler", use_karras_sigmas=True, use_flow_sigmas=False), "epsilon"),
    "a list of widths": (edit(UNET, cross_attention_dim=[40, 40, 40]), "epsilon"),
    "a name that only sounds so": (edit(UNET, _name_or_path="me/hyperrealism-flashlight"), "epsilon"),
}  # fmt: skip


@pytest.mark.parametrize("what", ACCEPTED)
def test_what_training_knows_is_accepted(what: str, model: Path) -> None:
    change, predicted = ACCEPTED[what]
    change(model)
    facts = check_base(ModelSource(str(model)))
    assert (facts.prediction_type, facts.latents.channels, facts.latents.factor) == (predicted, 4, 4)
    assert facts.notes == ()


def test_latents_of_16_channels_are_trained_on_where_all_parts_have_them(model: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    pipeline = new_pipeline()
    vae, unet = (
        {key: value for key, value in part.config.items() if not key.startswith("_")}
        for part in (pipeline.vae, pipeline.unet)
    )
    AutoencoderKL(**vae | {"latent_channels": 16}).save_pretrained(model / "vae")
    UNet2DConditionModel(**unet | {"in_channels": 16, "out_channels": 16}).save_pretrained(model / "unet")
    source = ModelSource(str(model))
    assert check_base(source).latents.channels == 16
    base = load_base(source)
    latents = LatentEncoder(source, device=torch.device("cpu"))(torch.zeros(2, 64, 64, 3, dtype=torch.uint8).numpy())
    batch = pair_batch(latents[:1].repeat(3, 1, 1, 1))
    found = errors_of(base, batch, torch.zeros(3, 16, 16, 16), torch.tensor([1, 500, 999]))
    assert found.shape == (3,)
    assert found.isfinite().all()


def test_diffusers_own_betas_are_a_word(model: Path) -> None:
    schedule("DDPMScheduler", beta_schedule="linear", beta_start=0.0001, beta_end=0.02, num_train_timesteps=1000)(model)
    (note,) = check_base(ModelSource(str(model))).notes
    assert "diffusers' default betas" in note


def test_a_resolution_that_is_not_the_bases_own_is_a_word(tiny_pipeline: Path) -> None:
    facts = check_base(ModelSource(str(tiny_pipeline)))
    assert facts.resolution_note(64) is None
    assert "encode.resolution is 512, but the base was trained at 64 x 64 pixels" in str(facts.resolution_note(512))


def test_another_vae_must_mean_the_same_by_its_latents(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model / "vae", tmp_path / "vae")
    check_base(ModelSource(str(model), vae=str(other)))
    edit("config.json", scaling_factor=0.18215)(other)
    with pytest.raises(ModelError, match=r"encode.vae .* scaling_factor is 0.18215, not 0.13025"):
        check_base(ModelSource(str(model), vae=str(other)))


@pytest.mark.parametrize(
    "name",
    ["sdxl-turbo", "SDXL-Lightning", "Hyper-SD", "lcm-sdxl", "TurboVisionXL", "dmd2", "flash-sdxl", "Hyper_SDXL"],
)
def test_the_names_of_distilled_models_are_known(name: str) -> None:
    assert is_distilled_name(name)


@pytest.mark.parametrize(
    "name", ["stable-diffusion-xl-base-1.0", "HyperRealism-XL", "pixelcmyk", "Illustrious-XL", "flash-photography"]
)
def test_other_names_are_no_hint(name: str) -> None:
    assert not is_distilled_name(name)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("stabilityai/sdxl-turbo", "sdxl-turbo"), ("s3://bucket/turbo-runs/base/", "base"), ("C:\\models\\x", "x"),
        ("/hub/models--a--b-lcm/snapshots/0123", "b-lcm"), ("../sdxl-turbo/unet", "sdxl-turbo"), ("unet", "unet"),
    ],
)  # fmt: skip
def test_of_a_path_only_the_models_own_name_counts(name: str, short: str) -> None:
    assert short_name(name) == short


def test_weights_that_lack_a_tensor_are_an_error_and_never_random(model: Path) -> None:
    lost = "mid_block.resnets.0.conv1.weight"
    weights(UNET_WEIGHTS, lambda found: found.pop(lost))(model)
    with pytest.raises(ModelError, match=f"1 tensors are missing .* such as {lost}"):
        load_base(ModelSource(str(model)))


# The numbers


def pair_batch(latents_BCHW: torch.Tensor, generator: torch.Generator | None = None) -> Batch:
    generator = generator or torch.Generator().manual_seed(3)
    pairs, size = len(latents_BCHW), 4.0 * latents_BCHW.shape[-1]
    return Batch(
        records=[],
        chosen_BCHW=latents_BCHW,
        rejected_BCHW=latents_BCHW.flip(0) - 0.5,
        chosen_time_ids_B6=torch.tensor([[size, size, 0, 0, size, size]]).repeat(pairs, 1),
        rejected_time_ids_B6=torch.tensor([[size, size, 0, 8, size, size]]).repeat(pairs, 1),
        prompt_embeds_BSD=torch.randn(pairs, 77, 40, generator=generator),
        pooled_BP=torch.randn(pairs, 24, generator=generator),
        preference_B=torch.ones(pairs),
    )


def errors_of(base: Any, batch: Batch, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    base.unet.eval()
    config = TrainConfig(precision="fp32", channels_last=False, learning_rate=1e-4)
    denoiser = Denoiser(base.unet, None, base, config, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        return denoiser.errors(batch, noise, timesteps).chosen


NUMBERS: dict[str, tuple[Change, str | None]] = {
    "epsilon": (lambda model: None, None),
    "statistics": (edit(VAE, latents_mean=[-1.6, 1.1, 3.0, -2.6], latents_std=[8.4, 6.0, 5.3, 4.3]), None),
    "zero SNR": (
        edit(SCHEDULE, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"), None,
    ),
    "velocity on the user's word": (edit(SCHEDULE, rescale_betas_zero_snr=True), "v_prediction"),
    "epsilon on the user's word": (edit(SCHEDULE, prediction_type="v_prediction"), "epsilon"),
}  # fmt: skip


@pytest.mark.parametrize("what", NUMBERS)
def test_errors_are_those_of_the_formulas_in_float64(what: str, model: Path) -> None:
    change, override = NUMBERS[what]
    change(model)
    base = load_base(ModelSource(str(model)), prediction_type=override)
    generator = torch.Generator().manual_seed(11)
    latents = 5 * torch.randn(4, 4, 16, 16, generator=generator)
    noise = torch.randn(4, 4, 16, 16, generator=generator)
    timesteps = torch.tensor([0, 333, 998, 999])
    batch = pair_batch(latents, generator)
    found = errors_of(base, batch, noise, timesteps)

    written, vae = (json.loads((model / name).read_text()) for name in (SCHEDULE, VAE))
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - roots**2, 0).sqrt()  # square root of alpha-bar
    if written["rescale_betas_zero_snr"]:
        kept = (kept - kept[-1]) * kept[0] / (kept[0] - kept[-1])  # 2305.08891, algorithm 1
        assert kept[-1] == 0
    alpha = kept[timesteps].view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    mean, std = (torch.tensor(vae[key] or [default] * 4, dtype=torch.float64).view(1, 4, 1, 1)
                 for key, default in (("latents_mean", 0.0), ("latents_std", 1.0)))  # fmt: skip
    clean = (latents.double() - mean) * vae["scaling_factor"] / std
    noisy = alpha * clean + sigma * noise.double()
    unet = base.unet.double()
    with torch.no_grad():
        predicted = unet(
            noisy, timesteps, batch.prompt_embeds_BSD.double(),
            added_cond_kwargs={"text_embeds": batch.pooled_BP.double(), "time_ids": batch.chosen_time_ids_B6.double()},
        ).sample  # fmt: skip
    is_velocity = (override or written["prediction_type"]) == "v_prediction"
    target = alpha * noise.double() - sigma * clean if is_velocity else noise.double()
    expected = (predicted - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-7)


# As a user meets it


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the field cases."""
    if not CASES.is_dir():
        pytest.skip("the field cases are not there")
    spec = importlib.util.spec_from_file_location("make_models", CASES / "make_models.py")
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    folder = tmp_path_factory.mktemp("cases")
    made.main(folder)
    return folder


def test_the_field_cases_are_refused_or_understood(cases: Path) -> None:
    assert check_base(ModelSource(str(cases / "base"))).prediction_type == "epsilon"
    assert check_base(ModelSource(str(cases / "vpred_zsnr"))).prediction_type == "v_prediction"
    assert float(load_base(ModelSource(str(cases / "vpred_zsnr"))).scheduler.alphas_cumprod[-1]) == 0
    assert "unet.in_channels" in refused(cases / "inpaint9").message
    assert "FlowMatchEulerDiscreteScheduler" in refused(cases / "flow").message
    with pytest.raises(ModelError, match="flow-matching"):
        check_denoiser(ModelSource(str(cases / "flow")))


@pytest.fixture
def work(tmp_path: Path, model: Path) -> Path:
    """A folder with a configuration whose base is a flow-matching one."""
    schedule("FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=3.0)(model)
    folder = tmp_path / "work"
    write_parquet(folder / "pairs.parquet", photo_pairs(4))
    settings = {
        "name": "small", "storage": "store",
        "ingest": {"sources": [{"format": "pickapic", "path": "pairs.parquet"}]},
        "encode": {"model": str(model), "resolution": 96},
        "train": {"global_batch_size": 2, "micro_batch_size": 2, "max_steps": 2, "learning_rate": 1e-4},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def mapo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [str(MAPO), arguments[0], "run.yaml", *arguments[1:]]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=400, check=False
    )


def test_a_run_is_refused_before_anything_is_written(work: Path) -> None:
    before = sorted(work.rglob("*"))
    for command in ("run", "ingest", "encode"):
        result = mapo(work, command)
        assert result.returncode == 1
        assert result.stderr.count("a flow-matching model") == 1
        assert result.stderr.count("hint: ") == 1
        assert not result.stdout
    assert sorted(work.rglob("*")) == before


def test_a_dry_run_shows_the_stage_as_blocked_with_the_way_out_and_fails(work: Path) -> None:
    before = sorted(work.rglob("*"))
    result = mapo(work, "run", "--dry-run")
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    (blocked,) = [number for number, line in enumerate(lines) if line.split()[:2] == ["encode", "blocked"]]
    assert "a flow-matching model" in lines[blocked]
    assert lines[blocked + 1].strip().startswith("hint: ")
    planned = json.loads(mapo(work, "run", "--dry-run", "--json").stdout)["stages"]
    assert [stage["state"] for stage in planned[:3]] == ["to do", "blocked", "waits"]
    betas("EulerDiscreteScheduler", timestep_spacing="leading")(work.parent / "model")
    result = mapo(work, "run", "--dry-run")
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("encode.resolution is 96, but the base was trained at 64 x 64 pixels") == 1
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_checkpoint_in_one_file_says_how_it_becomes_a_folder(name: str, work: Path) -> None:
    (work / name).write_bytes(b"weights")
    result = mapo(work, "encode", "-o", f"encode.model={name}")
    assert result.returncode == 1
    assert f"{name} is a single-file checkpoint" in result.stderr
    assert f'from_single_file("{work / name}").save_pretrained("model")' in result.stderr
    with pytest.raises(ModelError, match="there is no file"):
        ModelSource(str(work / "none.safetensors")).folder()
    with pytest.raises(ModelError) as caught:
        ModelSource(str(work.parent / "model"), vae=str(work / name)).vae_folder()
    assert "AutoencoderKL.from_single_file" in str(caught.value.hint)
