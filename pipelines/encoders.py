"""VAE and text encoders, number for number as diffusers runs them, in float32.

Letters: B images or prompts, H rows, W columns, C channels (then h, w of latents), S tokens, D and P embedding sizes.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import read_model_index, resolve_model, resolve_vae

__all__ = ["Embedded", "LatentEncoder", "TextEncoder", "quiet_diffusers", "resolve_model", "usable_device"]

WAY_OUT = "is it a whole SDXL pipeline? load it once with diffusers and `save_pretrained` it again"


@dataclass(frozen=True)
class Embedded:
    """One prompt as `encode_prompt` gives it, on the CPU."""

    prompt_embeds: Tensor
    """S, D."""
    pooled_prompt_embeds: Tensor
    """P."""
    num_tokens: int
    """Of the longer tokenizer, with both end marks, before truncation."""


def usable_device() -> torch.device:
    """The GPU that Ray gave to this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quiet_diffusers() -> None:
    """Only errors of diffusers and transformers are shown, and no progress bars; before their parts are imported."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextlib.contextmanager
def _loading(part: str, folder: Path) -> Iterator[None]:
    """Whatever a library raises on a bad part becomes an error that names the part."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors have no common tree
        text = str(error).strip() or type(error).__name__
        raise ModelError(f"cannot load the {part} of {folder}: {text.splitlines()[0]}", WAY_OUT) from error


def _check_complete(part: str, folder: Path, loading_info: dict[str, Any]) -> None:
    """Weights that a file lacks would otherwise be random, without a word."""
    lacking = sorted(loading_info.get("missing_keys") or ())
    lacking += sorted(str(key) for key in loading_info.get("mismatched_keys") or ())
    if lacking:
        raise ModelError(
            f"the weights of the {part} of {folder} lack {len(lacking)} tensors, such as {lacking[0]}", WAY_OUT
        )


class LatentEncoder:
    """Images to latents: the mean of the posterior, unscaled.

    Args:
        model: Path, URL or hub id of an SDXL pipeline.
        vae: Another VAE than its own.
        device: Where it runs; by default the GPU if there is one.

    Raises:
        ModelError: The VAE cannot be loaded.
    """

    def __init__(self, model: str, vae: str | None = None, device: torch.device | None = None) -> None:
        quiet_diffusers()
        from diffusers import AutoencoderKL

        folder = resolve_vae(model, vae)
        with _loading("VAE", folder):
            loaded, info = AutoencoderKL.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        _check_complete("VAE", folder, info)
        self.device = device or usable_device()
        self._vae = loaded.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """Encode images of one shape.

        Args:
            images: B, H, W, C; 0..255.

        Returns:
            B, C, h, w; float32, on the CPU.
        """
        pixels_BCHW = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        scaled = 2.0 * (pixels_BCHW.to(torch.float32) / 255.0) - 1.0  # in VaeImageProcessor's order of operations
        mean: Tensor = self._vae.encode(scaled.contiguous()).latent_dist.mean
        return mean.cpu()


class TextEncoder:
    """Prompts to embeddings, by `StableDiffusionXLPipeline.encode_prompt` itself.

    Args:
        model: Path, URL or hub id of an SDXL pipeline.
        device: Where it runs; by default the GPU if there is one.

    Raises:
        ModelError: A text encoder or tokenizer cannot be loaded.
    """

    def __init__(self, model: str, device: torch.device | None = None) -> None:
        quiet_diffusers()
        from diffusers import StableDiffusionXLPipeline
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        folder = resolve_model(model)
        read_model_index(folder)
        parts: dict[str, Any] = {"unet": None, "vae": None, "scheduler": None}
        for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            with _loading(name, folder):
                parts[name], info = kind.from_pretrained(
                    folder / name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
                )
            _check_complete(name, folder, info)
        with _loading("tokenizers", folder):
            pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32, **parts)
        self.device = device or usable_device()
        self._pipeline = pipeline.to(self.device)
        for name in ("text_encoder", "text_encoder_2"):
            getattr(self._pipeline, name).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> list[Embedded]:
        """Embed prompts in one pass, in their order."""
        embeds_BSD, _, pooled_BP, _ = self._pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        counts = self._num_tokens(prompts)
        return [Embedded(*found) for found in zip(embeds_BSD.cpu(), pooled_BP.cpu(), counts, strict=True)]

    def null(self) -> Embedded:
        """What a dropped prompt becomes: zeros or the embedding of "", as the pipeline's configuration says."""
        (empty,) = self([""])
        if not self._pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return Embedded(torch.zeros_like(empty.prompt_embeds), torch.zeros_like(empty.pooled_prompt_embeds), 0)

    def _num_tokens(self, prompts: list[str]) -> list[int]:
        tokenizers = (self._pipeline.tokenizer, self._pipeline.tokenizer_2)
        lengths = [[len(ids) for ids in tokenizer(prompts).input_ids] for tokenizer in tokenizers]
        return [max(both) for both in zip(*lengths, strict=True)]
