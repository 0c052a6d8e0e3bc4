"""A training step as the released `mapo` script is described to do it, by itself and in plain torch.

Written from its documented settings, not from its code: fp16 autocast over float32 weights with a loss scale, gradient
checkpointing, 8-bit AdamW, 8 pairs in two accumulated micro-batches; the VAE stays in float32 and both text encoders
run in every step; what the step prints makes it wait for the GPU. Images are read in the same process, as without
loader workers, or given as tensors, which leaves only the GPU's work.

Letters: B pairs, C channels, H and W of pixels.
"""

import importlib.util
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import gpu_peak
from benchmarks.train_gpu_trial import TOKENS, new_base
from training.losses import mapo_loss

ACCUMULATION_STEPS = 2
IMAGES_A_PASS = 8  # of the VAE
SMALL_TEXT_ENCODERS = {
    name: {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
           "hidden_act": "gelu", "projection_dim": 16}
    for name in ("text_encoder", "text_encoder_2")
}  # fmt: skip


class Released:
    """The script's models and its step.

    Args:
        unet_config: Of diffusers' UNet2DConditionModel.
        device: Where.
        pairs: Of a micro-batch.
        side: Of the images in pixels.
        small: A narrow VAE and tiny text encoders.
    """

    jpegs: list[bytes] | None = None
    """Decoded within the step, chosen and rejected ones; None takes images that lie on the device."""

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        device: torch.device,
        *,
        pairs: int,
        side: int,
        small: bool,
    ) -> None:
        from diffusers import AutoencoderKL
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        self.pairs, self._side, self._device = pairs, side, device
        self._half = torch.float16 if device.type == "cuda" else torch.bfloat16
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True  # torch's defaults
        torch.backends.cudnn.benchmark = False
        self._base = new_base(unet_config, device)
        self._unet = self._base.unet.train()
        self._unet.enable_gradient_checkpointing()
        sizes = SMALL_TEXT_ENCODERS if small else gpu_peak.TEXT_ENCODERS
        with device:
            self._vae = AutoencoderKL(**(gpu_peak.SMALL_VAE_CONFIG if small else gpu_peak.VAE_CONFIG))
            kinds = (CLIPTextModel, CLIPTextModelWithProjection)
            self._encoders = [
                kind(CLIPTextConfig(vocab_size=49_408, **size)).to(self._half)
                for kind, size in zip(kinds, sizes.values(), strict=True)
            ]
        for model in (self._vae, *self._encoders):
            model.eval().requires_grad_(False)
        self._optimizer, self.optimizer_name = self._make_optimizer()
        self._scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        draw = torch.Generator(device).manual_seed(0)
        self._pixels_BCHW = torch.rand(2 * pairs, 3, side, side, generator=draw, device=device) * 2 - 1
        self._tokens = torch.randint(0, 49_000, (pairs, TOKENS), generator=draw, device=device)

    @property
    def pairs_a_step(self) -> int:
        """Of an optimizer step."""
        return ACCUMULATION_STEPS * self.pairs

    def _make_optimizer(self) -> tuple[Any, str]:
        settings = {"lr": 1e-5, "weight_decay": 1e-2}
        if self._device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None:
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(self._unet.parameters(), **settings), "AdamW8bit"
        return torch.optim.AdamW(self._unet.parameters(), **settings), "AdamW"

    def step(self) -> float:
        """One optimizer step of two micro-batches; the last one's loss."""
        for number in range(ACCUMULATION_STEPS):
            loss = self._loss()
            self._scaler.scale(loss / ACCUMULATION_STEPS).backward()
            if number == ACCUMULATION_STEPS - 1:
                self._scaler.unscale_(self._optimizer)
                torch.nn.utils.clip_grad_norm_(self._unet.parameters(), 1.0)
                self._scaler.step(self._optimizer)
                self._scaler.update()
                self._optimizer.zero_grad()
            shown = float(loss.detach())  # the progress bar waits for it
        return shown

    def _images(self) -> Tensor:
        """Chosen images, then rejected ones, in -1 .. 1."""
        if self.jpegs is None:
            return self._pixels_BCHW
        found = []
        for number in range(2 * self.pairs):
            image = Image.open(io.BytesIO(self.jpegs[number % len(self.jpegs)])).convert("RGB")
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
            found.append((pixels - 0.5) / 0.5)
        return torch.stack(found).to(self._device)

    @torch.no_grad()
    def _encode(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents in float32, prompts' embeddings and their pooled ones."""
        images_BCHW = self._images()
        latents = torch.cat([self._vae.encode(part).latent_dist.sample() for part in images_BCHW.split(IMAGES_A_PASS)])
        found = [encoder(self._tokens, output_hidden_states=True) for encoder in self._encoders]
        embeds = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
        return latents * self._base.scaling_factor, embeds.repeat(2, 1, 1), found[-1].text_embeds.repeat(2, 1)

    def _loss(self) -> Tensor:
        latents, embeds, pooled = self._encode()
        noise = torch.randn_like(latents[: self.pairs]).repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, 1000, (self.pairs,), device=self._device).repeat(2)
        noisy = self._base.scheduler.add_noise(latents, noise, timesteps)
        sizes = torch.tensor([[self._side, self._side, 0, 0, self._side, self._side]], device=self._device)
        added = {"text_embeds": pooled, "time_ids": sizes.repeat(2 * self.pairs, 1).to(self._half)}
        with torch.autocast(self._device.type, dtype=self._half):
            prediction = self._unet(noisy, timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0]
        errors = (prediction.float() - noise).square().mean(dim=(1, 2, 3))
        losses = mapo_loss(*errors.chunk(2), beta=0.1, snr=0.5, num_train_timesteps=1000)
        return losses.mean()
