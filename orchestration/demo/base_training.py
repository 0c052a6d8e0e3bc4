"""Training of the demo's base model: first the VAE on crops in many colours, then the UNet on the plain ones.

Letters in names: B batch, C channels, H height, W width; latents are (B, 4, 16, 16), images (B, 3, 64, 64) in -1..1.
"""

import copy
import logging
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional

from orchestration.demo.scenes import RESOLUTION, crop, cyanotype, draw_shift, scenes
from orchestration.stages.contact_sheet import psnr

Figures = dict[str, float | list[float]]
"""Figures of a training, for `recipe.json`."""
log = logging.getLogger(__name__)

NUM_CROPS_PER_SCENE = 16
VAE_STEPS, VAE_BATCH_SIZE, VAE_LEARNING_RATE = 1600, 16, 2.5e-3
UNET_STEPS, UNET_BATCH_SIZE, UNET_LEARNING_RATE = 1500, 32, 1.5e-3
KL_WEIGHT = 1e-4
PROMPT_DROPOUT = 0.1
EMA_DECAY = 0.995
SEED = 20240610


def pixels(images: list[Image.Image]) -> Tensor:
    """Stack images into one float tensor (B, C, H, W), -1..1."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def plain_and_styled(seed: int, *, per_scene: int) -> tuple[Tensor, Tensor]:
    """Return `per_scene` crops of every scene, in the order of `scenes()`, and the same crops in the style."""
    rng = np.random.default_rng(seed)
    plain = [crop(scene, draw_shift(rng)) for scene in scenes() for _ in range(per_scene)]
    return pixels(plain), pixels([cyanotype(image) for image in plain])


def round_trip_psnr(vae: AutoencoderKL, images_BCHW: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio of images after a round trip through the VAE, in dB."""
    values: list[float] = []
    with torch.no_grad():
        for batch in images_BCHW.split(40):
            restored = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
            values += [psnr(*pair, peak=2) for pair in zip(batch.numpy(), restored.numpy(), strict=True)]
    return float(np.mean(values))


def fit(
    parameters: list[torch.nn.Parameter],
    loss_of_batch: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    name: str,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train with AdamW, 50 warm-up steps and a cosine to zero.

    Returns:
        The mean loss of each hundred steps.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    losses: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        after_step()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            mean = float(np.mean(losses[-100:]))
            log.info("%s step %d loss %.4f after %.0f s", name, step + 1, mean, time.monotonic() - started)
    return [round(float(np.mean(losses[at : at + 100])), 5) for at in range(0, steps, 100)]


def train_vae(vae: AutoencoderKL) -> Figures:
    """Train the VAE in place and set its scaling factor so that latents have a standard deviation of one.

    In every batch about 40 % are plain crops, 35 % are in the style and 25 % in random colours: a VAE that had seen
    only one of the two sides would decide the demo by itself.

    Returns:
        The figures for `recipe.json`; PSNR is measured on crops that were not trained on.
    """
    plain, styled = plain_and_styled(SEED, per_scene=NUM_CROPS_PER_SCENE)
    generator = torch.Generator().manual_seed(SEED)
    vae.to(memory_format=torch.channels_last)

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(plain), (VAE_BATCH_SIZE,), generator=generator)
        mix = torch.eye(3) + 0.35 * torch.randn(VAE_BATCH_SIZE, 3, 3, generator=generator)
        tint = 0.15 * torch.randn(VAE_BATCH_SIZE, 3, 1, 1, generator=generator)
        tinted = (torch.einsum("bij,bjhw->bihw", mix, plain[chosen]) + tint).clamp(-1, 1)
        draw = torch.rand(VAE_BATCH_SIZE, 1, 1, 1, generator=generator)
        images = torch.where(draw < 0.4, plain[chosen], torch.where(draw < 0.75, styled[chosen], tinted))
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        kl: Tensor = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        error: Tensor = functional.mse_loss(restored, images) + 0.1 * functional.l1_loss(restored, images)
        return error + KL_WEIGHT * kl

    losses = fit(list(vae.parameters()), loss_of_batch, steps=VAE_STEPS, learning_rate=VAE_LEARNING_RATE, name="vae")
    vae.to(memory_format=torch.contiguous_format)
    both = encode(vae, torch.cat([plain, styled]))
    vae.register_to_config(scaling_factor=round(1 / float(both.std()), 5))
    plain, styled = plain_and_styled(SEED + 1, per_scene=2)
    return {
        "psnr_plain_db": round_trip_psnr(vae, plain),
        "psnr_styled_db": round_trip_psnr(vae, styled),
        "losses": losses,
    }


def encode(vae: AutoencoderKL, images_BCHW: Tensor) -> Tensor:
    """Return posterior means, not scaled: (B, 4, H/4, W/4)."""
    with torch.no_grad():
        return torch.cat([vae.encode(batch).latent_dist.mean for batch in images_BCHW.split(40)])


def embed(pipeline: StableDiffusionXLPipeline, token_ids: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return prompt and pooled embeddings as SDXL's pipeline takes them, but with gradients."""
    first = pipeline.text_encoder(token_ids[0], output_hidden_states=True)
    second = pipeline.text_encoder_2(token_ids[1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def train_unet(pipeline: StableDiffusionXLPipeline) -> Figures:
    """Train UNet and text encoders together on plain crops, and leave their moving averages in the pipeline.

    Returns:
        The figures for `recipe.json`.
    """
    plain, _ = plain_and_styled(SEED + 2, per_scene=NUM_CROPS_PER_SCENE)
    latents = encode(pipeline.vae, plain) * pipeline.vae.config.scaling_factor
    captions = [scene.caption for scene in scenes()]
    token_ids = tuple(
        tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    time_ids = torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]] * UNET_BATCH_SIZE)
    generator = torch.Generator().manual_seed(SEED)
    pipeline.unet.to(memory_format=torch.channels_last)
    models = torch.nn.ModuleList([pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2])
    average = copy.deepcopy(models)

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(latents), (UNET_BATCH_SIZE,), generator=generator)
        scene = chosen // NUM_CROPS_PER_SCENE
        prompt, pooled = embed(pipeline, (token_ids[0][scene], token_ids[1][scene]))
        kept = (torch.rand(UNET_BATCH_SIZE, generator=generator) >= PROMPT_DROPOUT).float()
        conditions = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids}
        noise = torch.randn(latents[chosen].shape, generator=generator)
        timesteps = torch.randint(1000, (UNET_BATCH_SIZE,), generator=generator)
        noisy = noise_schedule.add_noise(latents[chosen], noise, timesteps)
        prompt = prompt * kept[:, None, None]
        prediction = pipeline.unet(noisy, timesteps, prompt, added_cond_kwargs=conditions).sample
        return functional.mse_loss(prediction, noise)

    def follow() -> None:
        with torch.no_grad():
            for mean, value in zip(average.parameters(), models.parameters(), strict=True):
                mean.lerp_(value, 1 - EMA_DECAY)

    parameters = [parameter for parameter in models.parameters() if parameter.requires_grad]
    losses = fit(
        parameters, loss_of_batch, steps=UNET_STEPS, learning_rate=UNET_LEARNING_RATE, name="unet", after_step=follow
    )
    models.load_state_dict(average.state_dict())
    pipeline.unet.to(memory_format=torch.contiguous_format)
    return {"losses": losses}
