"""Draws samples with one model: each text embedded once, one pipeline call a batch, noise from each sample's own seed.

Letters: B samples, H rows, W columns, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.encode.encoders import usable_device
from pipelines.samples.drawing import DrawnModel, Sampling
from pipelines.samples.loading import load_pipeline
from pipelines.units.actor import is_out_of_memory


@dataclass(frozen=True)
class Embedding:
    """A text for the pipeline: arguments of its call by name, each a batch of one on the device."""

    arguments: dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Samples of one pipeline call, on the CPU."""

    pixels_BHWC: NDArray[np.uint8]
    is_finite_B: NDArray[np.bool_]
    """False where a latent or a pixel is not a finite number; the pixels mean nothing there."""


class Sampler:
    """Sampler of one model; a sample's noise and text do not depend on the batch that it is drawn in.

    Args:
        model: The model.
        sampling: The settings of the sampler.
        device: The device; by default the GPU if there is one.

    Raises:
        ModelError: The model cannot be loaded.
    """

    def __init__(self, model: DrawnModel, sampling: Sampling, device: torch.device | None = None) -> None:
        self._device = device or usable_device()
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32
        torch.backends.cudnn.deterministic = True  # the same bytes when a unit is drawn again
        self._pipeline: Any = load_pipeline(model, sampling.dtype, self._device)
        self._sampling = sampling
        self._negative: dict[str, Tensor] | None = None
        self._is_finite: list[Tensor] = []
        self._decode = self._pipeline.vae.decode
        self._pipeline.vae.decode = self._decode_in_memory
        self._pipeline.vae.decoder.register_forward_hook(self._look)

    def _look(self, _: torch.nn.Module, __: Any, decoded_BCHW: Tensor) -> None:
        """Note which images are finite; afterwards the pipeline clamps infinity to white, and NaN becomes black."""
        self._is_finite.append(torch.isfinite(decoded_BCHW).flatten(1).all(1))

    def _decode_in_memory(self, latents_BCHW: Tensor, **options: Any) -> Any:
        """Decode a batch as `vae.decode` does; one sample after the other once there is no memory for a whole batch.

        It needs far more memory than denoising: drawing smaller batches for it would only be slow.
        """
        vae = self._pipeline.vae
        if not vae.use_slicing and len(latents_BCHW) > 1:
            try:
                return self._decode(latents_BCHW, **options)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._is_finite.clear()
            vae.enable_slicing()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return self._decode(latents_BCHW, **options)

    @torch.no_grad()
    def embed(self, text: str) -> Embedding:
        """Embed one text, alone, so that its numbers do not depend on others; the negative prompt is embedded once."""
        arguments = self._encode(text, is_guided=False)
        if self._sampling.guidance_scale > 1:
            if self._negative is None:
                found = self._encode("", is_guided=True)
                self._negative = {name: tensor for name, tensor in found.items() if name.startswith("negative")}
            arguments |= self._negative
        return Embedding(arguments)

    def _encode(self, text: str, *, is_guided: bool) -> dict[str, Tensor]:
        """Call `encode_prompt` of the pipeline; return what it gives by the names of the pipeline's arguments."""
        found = self._pipeline.encode_prompt(
            text, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=is_guided,
            negative_prompt=self._sampling.negative_prompt if is_guided else None,
        )  # fmt: skip
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return {name: tensor for name, tensor in zip(names, found, strict=False) if tensor is not None}

    @torch.no_grad()
    def draw(self, embeddings: Sequence[Embedding], seeds: Sequence[int]) -> Batch:
        """Draw one sample for each text and its seed, in one pipeline call.

        Args:
            embeddings: From `embed`.
            seeds: Seeds of the samples' noise, which is always drawn on the CPU.
        """
        names = embeddings[0].arguments
        self._is_finite.clear()
        images_BCHW = self._pipeline(
            **{name: torch.cat([each.arguments[name] for each in embeddings]) for name in names},
            height=self._sampling.height,
            width=self._sampling.width,
            num_inference_steps=self._sampling.num_inference_steps,
            guidance_scale=self._sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
        # As diffusers makes PIL images: in float32, rounded half to even.
        bytes_BHWC = (images_BCHW.float() * 255).round().nan_to_num(0).to(torch.uint8).permute(0, 2, 3, 1)
        return Batch(bytes_BHWC.contiguous().cpu().numpy(), torch.cat(self._is_finite).cpu().numpy())
