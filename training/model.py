"""The trained UNet, the reference that it may need, and the denoising errors that losses are computed from.

Letters: B pairs, C channels, H and W of latents, S tokens, D and P embedding sizes.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from pipelines.dataset.base_config import OTHER_CONFIG
from pipelines.dataset.base_latents import LatentSpace
from pipelines.dataset.base_model import check_denoiser
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.model_files import ModelSource
from training.config import LoraConfig, TrainConfig
from training.data.loader import Batch
from training.image_losses import ImageErrors
from training.losses import PairErrors

ADAPTER = "default"
START = "start"
"""The adapters that training starts from, frozen, if a reference needs them."""
ATTENTION = {
    "flash": torch.backends.cuda.enable_flash_sdp,  # for every device, in spite of the module's name
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}
Context = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Base:
    """The parts of the base model that training needs: the UNet, its noise schedule, the latents' scale."""

    unet: Any
    scheduler: Any
    scaling_factor: float
    latents_mean: tuple[float, ...] | None = None
    """One value per channel, for VAEs that have such statistics; None for most."""
    latents_std: tuple[float, ...] | None = None

    def scaled(self, latents_BCHW: Tensor) -> Tensor:
        """Scale latents from the VAE for the UNet, as diffusers' SDXL pipelines do."""
        if self.latents_mean is None:
            return latents_BCHW * self.scaling_factor
        mean_C11, std_C11 = self._statistics(latents_BCHW)
        return (latents_BCHW - mean_C11) * self.scaling_factor / std_C11

    def unscaled(self, latents_BCHW: Tensor) -> Tensor:
        """Scale latents from the UNet back for the VAE to decode."""
        if self.latents_mean is None:
            return latents_BCHW / self.scaling_factor
        mean_C11, std_C11 = self._statistics(latents_BCHW)
        return latents_BCHW * std_C11 / self.scaling_factor + mean_C11

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (latents.new_tensor(each).view(-1, 1, 1) for each in (self.latents_mean, self.latents_std))
        return mean, std

    @property
    def has_time_ids(self) -> bool:
        """Whether the UNet is conditioned on sizes and pooled embeddings, as in SDXL but not in SD 1.5."""
        return str(self.unet.config.addition_embed_type) == "text_time"

    @property
    def num_train_timesteps(self) -> int:
        """T, the length of the noise schedule."""
        return int(self.scheduler.config.num_train_timesteps)


def load_base(source: ModelSource, *, dtype: torch.dtype = torch.float32, prediction_type: str | None = None) -> Base:
    """Load the UNet and the constants of a diffusers pipeline.

    Args:
        source: The pipeline.
        dtype: Type of the loaded weights; each rank holds all of them once, 5.1 GB for SDXL in 16 bits.
        prediction_type: `train.prediction_type`, which overrides the scheduler file.

    Raises:
        ModelError: A part is missing, or of a kind that training does not support.
    """
    folder = source.folder()
    facts = check_denoiser(source, prediction_type=prediction_type)
    try:
        unet, info = UNet2DConditionModel.from_pretrained(
            folder,
            subfolder="unet",
            use_safetensors=True,
            variant=source.variant,
            dtype=dtype,
            output_loading_info=True,
        )
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", prediction_type=facts.prediction_type)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load the UNet of {source.model}: {error}", "is it a complete pipeline?") from error
    _check_complete(info, source)
    space: LatentSpace = facts.latents
    return Base(unet, scheduler, space.scaling_factor, space.mean, space.std)


def _check_complete(loading_info: dict[str, Any], source: ModelSource) -> None:
    """Reject weights that the configuration does not describe: diffusers would invent or drop some silently."""
    lacking = [*loading_info.get("missing_keys", ()), *loading_info.get("mismatched_keys", ())]
    if not lacking and (unused := sorted(loading_info.get("unexpected_keys", ()))):
        raise ModelError(
            f"the weights of the unet of {source.model} contain {len(unused)} tensors that the model of its "
            f"config.json does not have, such as {unused[0]}",
            OTHER_CONFIG,
        )
    if lacking:
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in lacking)
        raise ModelError(
            f"{len(names)} tensors are missing from the weights of the unet of {source.model} or have another shape, "
            f"such as {names[0]}",
            "unet/config.json and the weights belong to different models; fetch the model again",
        )


def add_lora(unet: Any, config: LoraConfig, *, seed: int, name: str = ADAPTER) -> None:
    """Freeze the UNet and add trainable adapters that change nothing yet; the same ones on every rank.

    Of several adapters the last one is trained, and the others are frozen and off.

    Raises:
        ConfigError: No layer has one of the targets' names.
    """
    from peft import LoraConfig as PeftConfig

    unet.requires_grad_(False)
    alpha: Any = config.rank if config.alpha is None else config.alpha
    wanted = PeftConfig(
        r=config.rank, lora_alpha=alpha, target_modules=list(config.targets), init_lora_weights="gaussian"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            unet.add_adapter(wanted, adapter_name=name)
        except ValueError as error:
            raise ConfigError(
                f"train.lora.targets: {str(error).splitlines()[0]}",
                "leave `targets` out for the attention projections: to_q, to_k, to_v, to_out.0",
            ) from error


@dataclass(frozen=True)
class Reference:
    """The model that a method compares with: the base without adapters, those of the start, or a frozen copy."""

    unet: Any
    context: Context

    @staticmethod
    def of_adapters(unet: Any) -> "Reference":
        """Return the UNet under the adapters; costs no memory."""

        @contextlib.contextmanager
        def without_adapters() -> Iterator[None]:
            unet.module.disable_adapters()
            try:
                yield
            finally:
                unet.module.enable_adapters()

        return Reference(unet, without_adapters)

    @staticmethod
    def of_starting_adapters(unet: Any) -> "Reference":
        """Return the UNet with the adapters that training starts from; costs the memory of these alone."""

        @contextlib.contextmanager
        def with_start() -> Iterator[None]:
            unet.module.set_adapter(START)
            try:
                yield
            finally:
                unet.module.set_adapter(ADAPTER)

        return Reference(unet, with_start)

    @staticmethod
    def copy_of(unet: Any, device: torch.device, dtype: torch.dtype) -> "Reference":
        """Copy the current weights; call this before the UNet is wrapped."""
        copied = copy.deepcopy(unet).requires_grad_(False).eval()
        copied.disable_gradient_checkpointing()
        return Reference(copied.to(device, dtype), contextlib.nullcontext)


def set_attention(name: str) -> None:
    """Restrict scaled dot product attention to one backend in this process; `auto` leaves the choice to torch.

    A context around the forward pass is not enough: gradient checkpointing runs attention again in the backward pass.
    """
    for backend, switch in ATTENTION.items():
        switch(name in ("auto", backend))


class Denoiser:
    """Computes the errors of images: of both images of each pair with the same noise and timestep, or of one.

    Args:
        unet: The engine around the UNet.
        reference: The reference, for methods that need one.
        base: Noise schedule and latents' scale.
        config: Attention backend and memory layout.
        device: The UNet's device.
        dtype: The type that the UNet computes in; autocast is off under DeepSpeed.
    """

    def __init__(
        self,
        unet: Any,
        reference: Reference | None,
        base: Base,
        config: TrainConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.base = base
        self._unet, self._reference = unet, reference
        self._device, self._dtype = device, dtype
        set_attention(config.attention)
        self._layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def errors(
        self,
        batch: Batch,
        noise_BCHW: Tensor,
        timesteps_B: Tensor,
        *,
        with_alignment: bool = False,
        known: PairErrors | None = None,
    ) -> PairErrors:
        """Compute the errors of the UNet and, without a gradient, of the reference on both images of each pair.

        Args:
            batch: Pairs of one shape, on the CPU.
            noise_BCHW: Standard normal, float32; shared by the two images of a pair.
            timesteps_B: int64 in [0, T); shared by the two images of a pair.
            with_alignment: Whether `alignment` is computed as well, for `train.safeguard`.
            known: Errors of the same draws, whose reference is taken instead of computing it again.

        Returns:
            Mean over C, H, W of (prediction - target)^2; float32, one value per pair.
        """
        assert batch.rejected_BCHW is not None
        latents = [batch.chosen_BCHW, batch.rejected_BCHW]
        time_ids = [batch.chosen_time_ids_B6, batch.rejected_time_ids_B6]
        inputs, target = self._inputs(batch, latents, time_ids, noise_BCHW, timesteps_B)
        ref_chosen, ref_rejected = (None, None) if known is None else (known.ref_chosen, known.ref_rejected)
        if known is None and self._reference is not None:
            ref_chosen, ref_rejected = _error(self._without_gradient(self._reference, inputs, target)).chunk(2)
        residual = self._residual(self._unet, inputs, target)
        alignment = None
        if with_alignment:
            of_chosen, of_rejected = residual.detach().chunk(2)
            alignment = (of_chosen * of_rejected).mean(dim=(1, 2, 3))
        chosen, rejected = _error(residual).chunk(2)
        return PairErrors(chosen, rejected, ref_chosen, ref_rejected, alignment)

    def image_errors(
        self, batch: Batch, noise_BCHW: Tensor, timesteps_B: Tensor, *, known: ImageErrors | None = None
    ) -> ImageErrors:
        """Compute the errors of the UNet and, without a gradient, of the reference on one image of each record.

        Args:
            batch: Single images, or pairs, of which only the chosen image is read; of one shape, on the CPU.
            noise_BCHW: Standard normal, float32.
            timesteps_B: int64 in [0, T).
            known: Errors of the same draws, whose reference is taken instead of computing it again.

        Returns:
            Mean over C, H, W of (prediction - target)^2; float32, one value per image.
        """
        latents, time_ids = [batch.chosen_BCHW], [batch.chosen_time_ids_B6]
        inputs, target = self._inputs(batch, latents, time_ids, noise_BCHW, timesteps_B)
        reference = None if known is None else known.reference
        if known is None and self._reference is not None:
            reference = _error(self._without_gradient(self._reference, inputs, target))
        return ImageErrors(_error(self._residual(self._unet, inputs, target)), reference)

    def _inputs(
        self,
        batch: Batch,
        latents: list[Tensor],
        time_ids: Sequence[Tensor | None],
        noise_BCHW: Tensor,
        timesteps_B: Tensor,
    ) -> tuple[dict[str, Any], Tensor]:
        """Return what the UNet is given for one or both images of each record, and what it should predict."""
        device, dtype, scheduler, times = self._device, self._dtype, self.base.scheduler, len(latents)
        clean = self.base.scaled(torch.cat(latents).to(device, torch.float32, non_blocking=True))
        noise = noise_BCHW.to(device, non_blocking=True).repeat(times, 1, 1, 1)
        timesteps = timesteps_B.to(device, non_blocking=True).repeat(times)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        is_epsilon = scheduler.config.prediction_type == "epsilon"
        target = noise if is_epsilon else scheduler.get_velocity(clean, noise, timesteps)
        inputs = {
            "sample": noisy.to(dtype, memory_format=self._layout),
            "timestep": timesteps,
            "encoder_hidden_states": batch.prompt_embeds_BSD.to(device, dtype, non_blocking=True).repeat(times, 1, 1),
        }
        if self.base.has_time_ids:
            assert batch.pooled_BP is not None
            ids = torch.cat([each for each in time_ids if each is not None])
            inputs["added_cond_kwargs"] = {
                "text_embeds": batch.pooled_BP.to(device, dtype, non_blocking=True).repeat(times, 1),
                "time_ids": ids.to(device, non_blocking=True),  # float32: bf16 cannot tell 1023 from 1024
            }
        return inputs, target

    def _without_gradient(self, reference: Reference, inputs: dict[str, Any], target: Tensor) -> Tensor:
        """Return the residual of the reference."""
        # In another mode other kernels may run, and beta multiplies their rounding.
        if reference.unet.training != self._unet.training:
            reference.unet.train(self._unet.training)
        with torch.no_grad(), reference.context():
            return self._residual(reference.unet, inputs, target)

    def _residual(self, unet: Any, inputs: dict[str, Any], target: Tensor) -> Tensor:
        prediction: Tensor = unet(**inputs, return_dict=False)[0]
        return prediction.float() - target


def _error(residual: Tensor) -> Tensor:
    return residual.square().mean(dim=(1, 2, 3))
