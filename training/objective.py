"""What a run minimises: the loss of its method with the options of `train`, for micro-batches of pairs and of images.

Letters: B pairs or images.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipelines.dataset.errors import ConfigError
from pipelines.dataset.pair import PRIOR
from training.config import TrainConfig
from training.data.batch import Batch
from training.image_losses import IMAGE_LOSSES, ImageErrors, image_loss
from training.losses import PairErrors, pair_loss, weigh_orders
from training.methods import METHODS
from training.model import Base


@dataclass(frozen=True)
class StepFacts:
    """What the loss of a step depends on besides its micro-batch.

    Args:
        has_margin: Whether the step has the margin; see `train.margin_share`.
        kl: KTO's reference point; 0 for other methods.
    """

    has_margin: bool = True
    kl: float = 0.0


class Objective:
    """Losses of micro-batches, one value per pair or image.

    Args:
        config: The section `train`.
        base: Its noise schedule gives the weights of timesteps.
        seed: The run's seed, which decides which steps have a margin.

    Raises:
        ConfigError: The weights of timesteps do not suit the noise schedule.
    """

    def __init__(self, config: TrainConfig, base: Base, seed: int) -> None:
        self.method = METHODS[config.method]
        self._config, self._seed = config, seed
        self._weights_T = snr_weights(config, base)
        parameters = config.loss_parameters
        if config.method in IMAGE_LOSSES:
            self._of_image = image_loss(config.method, parameters)
        else:
            self._of_pair = pair_loss(
                config.method, parameters, num_train_timesteps=base.num_train_timesteps,
                sft_weight=config.sft_weight, adjust=adjustment(config),
            )  # fmt: skip

    @property
    def needs_kl(self) -> bool:
        """Whether the loss of a step depends on the mean gain over its whole global batch."""
        return self.method.needs_mean_gain

    @property
    def needs_alignment(self) -> bool:
        """Whether the errors of a pair must include the alignment of its residuals."""
        return self._config.safeguard is not None

    def has_margin(self, step: int) -> bool:
        """Return whether a step has the margin: drawn from (seed, step) alone."""
        if self._config.margin_share == 1:
            return True
        drawn = hashlib.blake2b(repr(("margin", self._seed, step)).encode(), digest_size=8).digest()
        return int.from_bytes(drawn, "big") < self._config.margin_share * 2.0**64

    def reads_rejected(self, batch: Batch, facts: StepFacts) -> bool:
        """Return whether the rejected images of a micro-batch of pairs need a forward pass."""
        if not facts.has_margin or (self.method.is_of_images and not self.needs_kl):
            return bool((batch.preference_B < 1).any())  # where labels are soft, either image may be the better one
        return True

    def of_pairs(self, errors: PairErrors, batch: Batch, timesteps_B: Tensor, facts: StepFacts) -> Tensor:
        """Return the losses of a micro-batch of pairs, times the pairs' weights."""
        weights_B = self.weights_of(timesteps_B, errors.chosen.device)
        if weights_B is not None:
            errors = scaled(errors, weights_B)
        if not facts.has_margin:
            share = self._fine_tuning_share
            losses = weigh_orders(lambda each: share * each.chosen, errors, batch.preference_B)
        elif self.method.is_of_images:
            losses = self._of_two_images(errors, batch.preference_B, facts)
        else:
            losses = self._of_pair(errors, batch.preference_B)
        return losses * batch.weight_B.to(losses.device)

    def of_images(self, errors: ImageErrors, batch: Batch, timesteps_B: Tensor, facts: StepFacts) -> Tensor:
        """Return the losses of a micro-batch of images: singles, or the chosen images of certain pairs alone."""
        weights_B = self.weights_of(timesteps_B, errors.error.device)
        if weights_B is not None:
            reference = None if errors.reference is None else errors.reference * weights_B
            errors = ImageErrors(errors.error * weights_B, reference)
        if self.method.is_of_images:
            losses = self._one_image(errors, batch.good_B, facts, is_prior=batch.kind == PRIOR)
        else:
            losses = self._fine_tuning_share * errors.error
        return losses * batch.weight_B.to(losses.device)

    def weights_of(self, timesteps_B: Tensor, device: torch.device) -> Tensor | None:
        """Return the weights of timesteps by their signal-to-noise ratio, float32; None if all weigh the same."""
        if self._weights_T is None:
            return None
        return self._weights_T[timesteps_B.to(self._weights_T.device)].to(device, non_blocking=True)

    @property
    def _fine_tuning_share(self) -> float:
        """The factor of the chosen error in a step without a margin."""
        return float(self.method.fine_tunes) + self._config.sft_weight

    def _of_two_images(self, errors: PairErrors, preference_B: Tensor, facts: StepFacts) -> Tensor:
        """Return the losses of pairs under a loss of images, in both orders.

        KTO sees a good and a bad image, of which the pair's loss is the mean; the others see the preferred image alone.
        """
        is_good = torch.ones(len(preference_B), dtype=torch.bool)

        def in_order(each: PairErrors) -> Tensor:
            chosen = self._one_image(ImageErrors(each.chosen, each.ref_chosen), is_good, facts)
            if not self.needs_kl:
                return chosen
            return (chosen + self._one_image(ImageErrors(each.rejected, each.ref_rejected), ~is_good, facts)) / 2

        return weigh_orders(in_order, errors, preference_B)

    def _one_image(self, errors: ImageErrors, is_good: Tensor, facts: StepFacts, *, is_prior: bool = False) -> Tensor:
        losses = self._of_image(errors, is_good, is_prior, facts.kl)
        if not self._config.sft_weight:
            return losses
        return losses + self._config.sft_weight * torch.where(is_good.to(losses.device), errors.error, 0.0)


def scaled(errors: PairErrors, weights_B: Tensor) -> PairErrors:
    """Return all errors of each pair times its weight; both images of a pair share it, as they share the timestep."""
    return PairErrors(*(None if each is None else each * weights_B for each in vars(errors).values()))  # type: ignore[arg-type]


def adjustment(config: TrainConfig) -> Callable[[PairErrors], PairErrors] | None:
    """Return what `rejected_weight` and `safeguard` do to the errors of an order; None if both are off."""
    share, safeguard = config.rejected_weight, config.safeguard
    has_reference = METHODS[config.method].needs_reference
    if share == 1 and safeguard is None:
        return None

    def adjust(errors: PairErrors) -> PairErrors:
        if share != 1:
            errors = replace(
                errors, rejected=with_share(errors.rejected, share, errors.ref_rejected if has_reference else None)
            )
        if safeguard is not None:
            errors = replace(errors, rejected=guarded(errors, safeguard))
        return errors

    return adjust


def with_share(rejected: Tensor, share: float, reference: Tensor | None) -> Tensor:
    """Return the rejected errors with a share of their pull: ref + share * (rejected - ref).

    In `dpo` this makes the gain over the reference z = (ref_c - m_c) - share * (ref_r - m_r). Without a reference the
    error itself, as a constant, stands in its place: the value stays, and the gradient is multiplied by the share.

    Args:
        rejected: Errors of the rejected images.
        share: `train.rejected_weight`.
        reference: The reference's errors; None for methods without one.
    """
    anchor = rejected.detach() if reference is None else reference
    return anchor + share * (rejected - anchor)


def guarded(errors: PairErrors, safeguard: float) -> Tensor:
    """Return the rejected errors with a gradient that, to first order, cannot raise the chosen error; values stay.

    With the residuals d = prediction - target, the gradient of each pair is multiplied by
    clip((1 - mu) * |d_chosen|^2 / <d_chosen, d_rejected>, 0, 1) where the product is positive, else by 1.
    The released code takes one factor for the whole micro-batch, which would depend on its size.

    Args:
        errors: With their alignment, the product divided by the number of elements.
        safeguard: mu, in [0, 1): the share of the chosen image's pull that must be left.

    Raises:
        ValueError: The errors have no alignment.

    Source: Diffusion-SDPO, arXiv 2511.03317; AIDC-AI/Diffusion-SDPO, train.py.
    """
    if errors.alignment is None:
        raise ValueError("the safeguard needs the alignment of the residuals. Pass `with_alignment=True` to `errors`.")
    alignment = errors.alignment.double()
    allowed = (1 - safeguard) * errors.chosen.detach().double()
    factor = torch.where(alignment > 0, allowed / torch.where(alignment > 0, alignment, 1.0), 1.0).clamp(0, 1)
    kept = errors.rejected.detach()
    return kept + factor.to(kept.dtype) * (errors.rejected - kept)


def snr_weights(config: TrainConfig, base: Base) -> Tensor | None:
    """Return the weight of each timestep, float32 (T,); None without `train.snr_weighting`.

    Raises:
        ConfigError: The schedule ends at pure noise, where a ratio of 0 would be divided by.

    Source: min-SNR, arXiv 2303.09556; debiased, arXiv 2310.08442.
    """
    weighting = config.snr_weighting
    if weighting is None:
        return None
    alphas: Tensor = base.scheduler.alphas_cumprod.double()
    ratio = alphas / (1 - alphas)
    is_epsilon = base.scheduler.config.prediction_type == "epsilon"
    if is_epsilon and not bool(ratio.min() > 0):
        raise ConfigError(
            f"train.snr_weighting {weighting.kind} divides by the signal-to-noise ratio, which is 0 at the end of this "
            "base's noise schedule (rescale_betas_zero_snr)",
            "leave it out; a base with such a schedule should predict the velocity (`prediction_type: v_prediction`)",
        )
    clipped = ratio.clamp(max=weighting.gamma)
    if weighting.kind == "min_snr":
        weights = clipped / ratio if is_epsilon else clipped / (ratio + 1)
    else:
        weights = ratio.rsqrt() if is_epsilon else 1 / (ratio + 1)
    return weights.float()
