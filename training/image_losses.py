"""Losses of single images, which need no pairs: Diffusion-KTO, DreamBooth and DCO, as pure tensor functions.

Like `training.losses`, they take float32 errors and compute in float64: one value per image in, one out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.loss_inputs import Number, check_errors
from training.methods import check_parameters


@dataclass(frozen=True)
class ImageErrors:
    """The denoising errors of a batch of images: float32, one value per image.

    Raises:
        ValueError: The shapes differ or are not 1-D, or a tensor is not float32.
    """

    error: Tensor
    """Error of the model, mean over C, H, W."""
    reference: Tensor | None = None
    """The frozen reference's error with the same noise and timestep; None for methods without a reference."""

    def __post_init__(self) -> None:
        check_errors(**{name: error for name, error in vars(self).items() if error is not None})


def kto_loss(
    mse: Float[Tensor, " image"],
    ref_mse: Float[Tensor, " image"],
    is_good: Bool[Tensor, " image"],
    kl: Float[Tensor, ""] | Number,
    *,
    beta: Number,
    desirable: Number,
    undesirable: Number,
) -> Float[Tensor, " image"]:
    """Compute the per-image Diffusion-KTO loss: images that people liked or disliked, without pairs.

    loss = w * (1 - sigmoid(s * beta * (g - kl))),  g = ref_mse - mse
    s = 1 and w = desirable for a good image, s = -1 and w = undesirable for a bad one.

    Args:
        mse: Denoising error, mean over C, H, W; float32, >= 0.
        ref_mse: Error of the reference model with the same noise and timestep; no gradient expected.
        is_good: Whether people liked the image.
        kl: max(0, mean of g over the global batch), from `kl_of`; a constant without a gradient.
        beta: Strength of the pull towards the reference, > 0 (1000).
        desirable: Weight of good images.
        undesirable: Weight of bad images.

    Raises:
        ValueError: The shapes differ or are not 1-D, or an error is not float32.

    Source: jacklishufan/diffusion-kto, train_kto_sd_v1.5.py (halo sigmoid, bce_offset none); arXiv 2404.04465. A model
    that equals its reference gives exactly w / 2.
    """
    gain = gain_of(mse, ref_mse)
    side = torch.where(is_good, 1.0, -1.0).double().to(gain.device)
    weight = torch.where(is_good, float(desirable), float(undesirable)).double().to(gain.device)
    # exp(log sigmoid) rather than sigmoid: autograd takes the slope of a sigmoid near 1 from 1 - y, which cancels.
    return (weight * logsigmoid(-side * beta * (gain - kl)).exp()).float()


def dreambooth_loss(
    mse: Float[Tensor, " image"], is_prior: Bool[Tensor, " image"], *, prior_weight: Number
) -> Float[Tensor, " image"]:
    """Compute the per-image DreamBooth loss: the error of the subject's images, and of its class's by a weight.

    loss = mse, times prior_weight for an image of the prior

    Args:
        mse: Denoising error, mean over C, H, W; float32, >= 0.
        is_prior: Whether the image shows the class, drawn by the base model, and not the subject.
        prior_weight: lambda, the weight of prior preservation; 0 ignores the images of the prior.

    Raises:
        ValueError: The shapes differ or are not 1-D, or an error is not float32.

    Source: arXiv 2208.12242, eq. 2; diffusers, train_dreambooth.py.
    """
    check_errors(mse=mse)
    weight = torch.where(is_prior, float(prior_weight), 1.0).double().to(mse.device)
    return (weight * mse.double()).float()


def dco_loss(
    mse: Float[Tensor, " image"], ref_mse: Float[Tensor, " image"], *, beta: Number
) -> Float[Tensor, " image"]:
    """Compute the per-image DCO loss: fine-tuning that stops once the model leads its reference.

    loss = -logsigmoid(-beta * (mse - ref_mse))
    The released code takes the mean error of the batch inside, so that its loss depends on the batch size.

    Args:
        mse: Denoising error, mean over C, H, W; float32, >= 0.
        ref_mse: Error of the reference model with the same noise and timestep; no gradient expected.
        beta: Strength of the pull towards the reference, > 0 (1000 to 2000).

    Raises:
        ValueError: The shapes differ or are not 1-D, or an error is not float32.

    Source: arXiv 2402.12004; kyungmnlee/dco, customize.py. A model that equals its reference gives exactly ln 2.
    """
    return (-logsigmoid(beta * gain_of(mse, ref_mse))).float()


def gain_of(mse: Float[Tensor, " image"], ref_mse: Float[Tensor, " image"]) -> Float[Tensor, " image"]:
    """Return g = ref_mse - mse in float64: how much better than its reference the model denoises an image."""
    check_errors(mse=mse, ref_mse=ref_mse)
    return ref_mse.double() - mse.double()


def kl_of(total_gain: Number, num_images: Number) -> float:
    """Return KTO's reference point, max(0, mean gain), from sums over the whole global batch."""
    return max(0.0, float(total_gain) / float(num_images)) if num_images else 0.0


ImageLoss = Callable[[ImageErrors, Tensor, bool, float], Tensor]
"""(errors, is_good, is_prior, kl) -> loss, one value per image; a micro-batch is wholly of the prior, or not at all."""


def image_loss(method: str, parameters: Mapping[str, Number]) -> ImageLoss:
    """Return the loss of single images that a run asks for.

    Args:
        method: `train.method`, a key of IMAGE_LOSSES.
        parameters: `train.loss`, any subset of the method's parameters.

    Raises:
        ConfigError: The method or a parameter is unknown, or a value is out of range.
    """
    complete = check_parameters(method, parameters)

    def of_images(errors: ImageErrors, is_good: Tensor, is_prior: bool, kl: float) -> Tensor:
        return IMAGE_LOSSES[method](errors, is_good.to(errors.error.device), is_prior, kl, **complete)

    return of_images


def _kto(errors: ImageErrors, is_good: Tensor, is_prior: bool, kl: float, **parameters: Number) -> Tensor:
    return kto_loss(errors.error, _reference("kto", errors), is_good, kl, **parameters)


def _dreambooth(errors: ImageErrors, is_good: Tensor, is_prior: bool, kl: float, **parameters: Number) -> Tensor:
    return dreambooth_loss(errors.error, torch.full_like(is_good, is_prior), **parameters)


def _dco(errors: ImageErrors, is_good: Tensor, is_prior: bool, kl: float, **parameters: Number) -> Tensor:
    return dco_loss(errors.error, _reference("dco", errors), **parameters)


def _reference(method: str, errors: ImageErrors) -> Tensor:
    if errors.reference is None:
        raise ValueError(
            f"{method} compares with a frozen reference model, but the reference's errors are None. "
            "Pass its errors with the same noise and timesteps."
        )
    return errors.reference


IMAGE_LOSSES: Mapping[str, Callable[..., Tensor]] = {"kto": _kto, "dreambooth": _dreambooth, "dco": _dco}
"""Method name -> (errors, is_good, is_prior, kl, **parameters) -> loss, one value per image."""
