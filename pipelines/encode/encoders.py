"""The VAE and the text encoders, with exactly the numbers that diffusers computes.

Letters: B images or prompts, H rows, W columns, C channels (then h, w of latents), S tokens, D and P embedding sizes.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import ModelSource, read_family, resolve_model
from pipelines.encode.prompt_chunks import ChunkEncoder

__all__ = [
    "Embedded", "LatentEncoder", "TextEncoder", "check_complete", "loading", "quiet_diffusers", "resolve_model",
    "usable_device",
]  # fmt: skip

WAY_OUT = "is the pipeline complete? load it with diffusers and save it again with `save_pretrained`"


@dataclass(frozen=True)
class Embedded:
    """The embedding of one prompt from `encode_prompt`, on the CPU."""

    prompt_embeds: Tensor
    """S, D; S of every chunk one after the other."""
    pooled_prompt_embeds: Tensor | None
    """P; None for a family whose UNet takes none."""
    num_tokens: int
    """Number of tokens of the longer tokenizer, with both end marks, before truncation."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The existing tensors, by the names under which they are stored."""
        found = {"prompt_embeds": self.prompt_embeds, "pooled_prompt_embeds": self.pooled_prompt_embeds}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Embedded":
        """Return the same prompt with every tensor changed."""
        pooled = None if self.pooled_prompt_embeds is None else change(self.pooled_prompt_embeds)
        return Embedded(change(self.prompt_embeds), pooled, self.num_tokens)


def usable_device() -> torch.device:
    """Return the GPU that Ray assigned to this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quiet_diffusers() -> None:
    """Show only errors of diffusers and transformers, and no progress bars; call this before importing their parts."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextlib.contextmanager
def loading(part: str, folder: Path) -> Iterator[None]:
    """Turn any error of a library on a bad part into an error that names the part."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors have no common tree
        text = str(error).strip() or type(error).__name__
        raise ModelError(f"cannot load the {part} of {folder}: {text.splitlines()[0]}", WAY_OUT) from error


def check_complete(part: str, folder: Path, loading_info: dict[str, Any]) -> None:
    """Check that the file has all weights: missing ones would silently be random."""
    lacking = sorted(loading_info.get("missing_keys") or ())
    lacking += sorted(str(key) for key in loading_info.get("mismatched_keys") or ())
    if lacking:
        raise ModelError(
            f"{len(lacking)} tensors are missing from the weights of the {part} of {folder}, such as {lacking[0]}",
            WAY_OUT,
        )


def load_vae(source: ModelSource) -> Any:
    """Load the VAE as diffusers' `AutoencoderKL`, in float32, on the CPU.

    Raises:
        ModelError: The VAE cannot be loaded.
    """
    quiet_diffusers()
    from diffusers import AutoencoderKL

    folder = source.vae_folder()
    with loading("VAE", folder):
        loaded, info = AutoencoderKL.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, variant=source.vae_variant, output_loading_info=True
        )
    check_complete("VAE", folder, info)
    return loaded.eval().requires_grad_(False)


@dataclass(frozen=True)
class Launched:
    """A running pass, perhaps still on the GPU."""

    _latents: Tensor
    _seconds: Callable[[], float]

    def wait(self) -> tuple[Tensor, float]:
        """Return the latents (B, C, h, w; float32, on the CPU), and the seconds that the device spent on them."""
        seconds = self._seconds()
        return self._latents, seconds


class LatentEncoder:
    """Encoder of images to latents: the mean of the posterior, unscaled.

    In float32 every number equals diffusers'. tf32, bfloat16 and float16 use the channels-last layout of tensor cores;
    tf32 means that a GPU rounds the inputs of products to 10 bits, and changes nothing else.

    Args:
        source: The pipeline, with its own VAE or the one that replaces it.
        dtype: Type that the VAE computes in: float32, tf32, bfloat16 or float16.
        device: The device; by default the GPU if there is one.

    Raises:
        ModelError: The VAE cannot be loaded.
    """

    def __init__(self, source: ModelSource, dtype: str = "float32", device: torch.device | None = None) -> None:
        loaded = load_vae(source)
        self.device = device or usable_device()
        self._dtype: torch.dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        self._layout = torch.contiguous_format if dtype == "float32" else torch.channels_last
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        torch.backends.cudnn.deterministic = True  # the same bytes when a unit is encoded again
        del loaded.decoder  # nothing of it is needed, and the GPU has better use for its memory
        self._vae = loaded.to(self.device, self._dtype, memory_format=self._layout)

    @torch.no_grad()
    def launch(self, images: NDArray[np.uint8]) -> Launched:
        """Start a pass over images of one shape; on a GPU it runs while the caller does something else.

        Args:
            images: B, H, W, C; values in 0..255.
        """
        on_gpu = self.device.type == "cuda"
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if on_gpu else (None, None)
        started = time.perf_counter()
        if begin is not None:
            begin.record()
        bytes_BHWC = torch.from_numpy(images)
        if on_gpu:
            bytes_BHWC = bytes_BHWC.pin_memory().to(self.device, non_blocking=True)
        pixels = bytes_BHWC.permute(0, 3, 1, 2).to(torch.float32)
        scaled = 2.0 * (pixels / 255.0) - 1.0  # in VaeImageProcessor's order of operations
        mean = self._vae.encode(scaled.to(self._dtype).contiguous(memory_format=self._layout)).latent_dist.mean
        mean = mean.to(torch.float32).contiguous()
        if end is None:
            seconds = time.perf_counter() - started
            return Launched(mean, lambda: seconds)
        latents = torch.empty(mean.shape, dtype=torch.float32, pin_memory=True)
        latents.copy_(mean, non_blocking=True)
        end.record()

        def busy_s() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000  # type: ignore[union-attr]

        return Launched(latents, busy_s)

    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """Encode images of one shape (B, H, W, C; 0..255) to B, C, h, w; float32, on the CPU."""
        latents, _ = self.launch(images).wait()
        return latents


class TextEncoder:
    """Encoder of prompts to embeddings, with `encode_prompt` of the pipeline's own class.

    In float32: all prompts of Pick-a-Pic take one GPU minutes, whatever the type.

    Args:
        source: The pipeline.
        device: The device; by default the GPU if there is one.
        prompt_chunks: Chunks that every prompt is embedded in; 1 cuts off what the pipeline cuts off.

    Raises:
        ModelError: A text encoder or tokenizer cannot be loaded.
    """

    def __init__(self, source: ModelSource, device: torch.device | None = None, prompt_chunks: int = 1) -> None:
        quiet_diffusers()
        import diffusers
        import transformers

        folder = source.folder()
        family = read_family(folder)
        parts: dict[str, Any] = dict.fromkeys(family.not_for_text)
        for name, kind in family.text_encoders.items():
            with loading(name, folder):
                parts[name], info = getattr(transformers, kind).from_pretrained(
                    folder / name, dtype=torch.float32, use_safetensors=True, variant=source.variant,
                    output_loading_info=True,
                )  # fmt: skip
            check_complete(name, folder, info)
        with loading("tokenizers", folder):
            pipeline_class = getattr(diffusers, family.pipeline_class)
            pipeline = pipeline_class.from_pretrained(folder, dtype=torch.float32, **parts)
        self.device = device or usable_device()
        self._pipeline, self._family = pipeline.to(self.device), family
        for name in family.text_encoders:
            getattr(self._pipeline, name).eval().requires_grad_(False)
        self._chunks = ChunkEncoder(self._pipeline, family, prompt_chunks) if prompt_chunks > 1 else None

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> list[Embedded]:
        """Embed prompts in one pass, in their order; chunks after the first in passes of their own."""
        embeds_BSD, _, *pooled = self._pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self._chunks is not None:
            embeds_BSD = torch.cat([embeds_BSD, self._chunks.after_first(prompts)], dim=1)
        pooled_BP = pooled[0].cpu() if self._family.has_pooled else [None] * len(prompts)
        counts = self._num_tokens(prompts)
        return [Embedded(*found) for found in zip(embeds_BSD.cpu(), pooled_BP, counts, strict=True)]

    def null(self) -> Embedded:
        """Return the replacement of a dropped prompt: the embedding of "", or zeros if the pipeline uses them."""
        (empty,) = self([""])
        if not self._pipeline.config.get("force_zeros_for_empty_prompt", False):
            return empty
        return replace(empty.map(torch.zeros_like), num_tokens=0)

    def _num_tokens(self, prompts: list[str]) -> list[int]:
        tokenizers = [getattr(self._pipeline, name) for name in self._family.tokenizers]
        lengths = [[len(ids) for ids in tokenizer(prompts).input_ids] for tokenizer in tokenizers]
        return [max(each) for each in zip(*lengths, strict=True)]
