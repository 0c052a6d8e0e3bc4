"""The UNet that learns, and the denoising errors that its loss is made of.

Letters: B pairs, C channels, H and W of latents, S tokens, D and P embedding sizes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import ModelSource, read_config
from training.loader import Batch


@dataclass(frozen=True)
class Base:
    """The base model's parts that training needs: the UNet in float32, its noise schedule, the latents' scale."""

    unet: Any
    scheduler: Any
    scaling_factor: float


def load_base(source: ModelSource) -> Base:
    """Load the UNet and the constants of a diffusers SDXL pipeline.

    Raises:
        ModelError: A part is missing, or it predicts neither noise nor velocity.
    """
    folder = source.folder()
    try:
        unet = UNet2DConditionModel.from_pretrained(
            folder, subfolder="unet", use_safetensors=True, variant=source.variant, dtype=torch.float32
        )
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        scaling_factor = float(read_config(source.vae_folder() / "config.json")["scaling_factor"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the UNet of {source.model}: {error}", "is it a whole SDXL pipeline?") from error
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"{source.model} predicts {scheduler.config.prediction_type}; training knows epsilon and v_prediction",
            "choose a base of the SDXL family",
        )
    return Base(unet, scheduler, scaling_factor)


def denoising_errors(
    unet: Any, base: Base, batch: Batch, noise_BCHW: Tensor, timesteps_B: Tensor, *, device: torch.device, dtype: Any
) -> tuple[Tensor, Tensor]:
    """The error of the UNet's prediction for both images of each pair, with the same noise and timestep.

    Args:
        unet: The UNet, or the engine around it.
        base: Noise schedule and latents' scale.
        batch: Pairs of one shape, on the CPU.
        noise_BCHW: Standard normal, float32; shared by the two images of a pair.
        timesteps_B: int64 in [0, T); shared by the two images of a pair.
        device: Where the UNet is.
        dtype: What the UNet computes in.

    Returns:
        mse_chosen, mse_rejected: mean over C, H, W of (prediction - target)^2; float32, one value a pair.
    """
    latents = torch.cat([batch.chosen_BCHW, batch.rejected_BCHW]).to(device, torch.float32) * base.scaling_factor
    noise = torch.cat([noise_BCHW, noise_BCHW]).to(device)
    timesteps = torch.cat([timesteps_B, timesteps_B]).to(device)
    noisy = base.scheduler.add_noise(latents, noise, timesteps)
    if base.scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = base.scheduler.get_velocity(latents, noise, timesteps)
    time_ids = torch.cat([batch.chosen_time_ids_B6, batch.rejected_time_ids_B6])
    prediction = unet(
        noisy.to(dtype),
        timesteps,
        encoder_hidden_states=torch.cat([batch.prompt_embeds_BSD] * 2).to(device, dtype),
        added_cond_kwargs={
            "text_embeds": torch.cat([batch.pooled_BP] * 2).to(device, dtype),
            "time_ids": time_ids.to(device),  # float32: bf16 cannot tell 1023 from 1024
        },
        return_dict=False,
    )[0]
    errors = (prediction.float() - target).square().mean(dim=(1, 2, 3))
    chosen, rejected = errors.chunk(2)
    return chosen, rejected
