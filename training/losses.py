"""MaPO and its baselines as pure tensor functions: one value per pair in, one value per pair out.

Inputs and results are float32; the arithmetic between is float64, which costs nothing at one value
per pair. In float32 the margin T * (phi(a) - phi(b)) would be off by about 1e-4 at T = 1000.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.image_losses import dco_loss as dco_loss
from training.image_losses import dreambooth_loss as dreambooth_loss
from training.image_losses import kto_loss as kto_loss
from training.loss_inputs import Number, check_errors
from training.methods import METHODS, NEEDS_REFERENCE, check_parameters


@dataclass(frozen=True)
class PairErrors:
    """The denoising errors of a batch of pairs: float32, one value per pair each.

    Raises:
        ValueError: The shapes differ or are not 1-D, or a tensor is not float32.
    """

    chosen: Tensor
    """Error on the preferred image, mean over C, H, W."""
    rejected: Tensor
    """Error on the other image, with the same noise and timestep."""
    ref_chosen: Tensor | None = None
    """The frozen reference's error on the preferred image; None for methods without a reference."""
    ref_rejected: Tensor | None = None
    """The frozen reference's error on the other image."""
    alignment: Tensor | None = None
    """Mean over C, H, W of the product of the two images' residuals (prediction - target), which `train.safeguard`
    looks at; None without it."""

    def __post_init__(self) -> None:
        check_errors(**{name: error for name, error in vars(self).items() if error is not None})

    def swapped(self) -> "PairErrors":
        """Return the same pairs with the other image preferred."""
        return PairErrors(self.rejected, self.chosen, self.ref_rejected, self.ref_chosen, self.alignment)

    def where(self, is_kept: Tensor, other: "PairErrors") -> "PairErrors":
        """Return these errors where `is_kept`, those of `other` elsewhere."""

        def choose(mine: Tensor | None, others: Tensor | None) -> Tensor | None:
            return None if mine is None or others is None else torch.where(is_kept, mine, others)

        return PairErrors(
            torch.where(is_kept, self.chosen, other.chosen),
            torch.where(is_kept, self.rejected, other.rejected),
            choose(self.ref_chosen, other.ref_chosen),
            choose(self.ref_rejected, other.ref_rejected),
            choose(self.alignment, other.alignment),
        )


PairLoss = Callable[[PairErrors, Tensor], Tensor]
"""(errors, preference) -> loss, one value per pair. preference: probability that `chosen` is preferred, float32
in [0.5, 1]."""


def mapo_loss(
    mse_chosen: Float[Tensor, " pair"],
    mse_rejected: Float[Tensor, " pair"],
    *,
    beta: Number,
    snr: Number,
    num_train_timesteps: int,
) -> Float[Tensor, " pair"]:
    """Compute the per-pair MaPO loss as in the released code; the caller averages over the global batch.

    loss = mse_chosen - beta * logsigmoid(T * (phi(snr * mse_chosen) - phi(snr * mse_rejected)))
    phi(x) = x / (e^x - 1): 1 for a perfect prediction, towards 0 as the error grows.

    Args:
        mse_chosen: Denoising error of the preferred image, mean over C, H, W; float32, >= 0.
        mse_rejected: The same for the other image, with the same noise and timestep.
        beta: Weight of the margin; 0 is plain fine-tuning on the chosen image.
        snr: Constant that scales both errors before phi.
        num_train_timesteps: T, the length of the noise schedule (1000 for SDXL).

    Raises:
        ValueError: The shapes differ or are not 1-D, or an input is not float32.

    Source: mapo-t2i/mapo, utils.py (compute_loss). Equal errors give exactly mse_chosen + beta * ln 2.
    """
    check_errors(mse_chosen=mse_chosen, mse_rejected=mse_rejected)
    chosen, rejected = mse_chosen.double(), mse_rejected.double()
    margin = num_train_timesteps * (log_phi(snr * chosen).exp() - log_phi(snr * rejected).exp())
    return (chosen - beta * logsigmoid(margin)).float()


def mapo_paper_loss(
    mse_chosen: Float[Tensor, " pair"], mse_rejected: Float[Tensor, " pair"], *, beta: Number
) -> Float[Tensor, " pair"]:
    """Compute the per-pair MaPO loss as in the paper; this is not a reparametrisation of `mapo_loss`.

    loss = mse_chosen - (1 / beta) * logsigmoid(phi(mse_chosen)^beta - phi(mse_rejected)^beta)
    phi(x)^beta is computed as e^(beta * log phi(x)), so that beta 1024 neither overflows nor loses digits.

    Args:
        mse_chosen: Denoising error of the preferred image, mean over C, H, W; float32, >= 0.
        mse_rejected: The same for the other image, with the same noise and timestep.
        beta: Sharpness of the margin, > 0; the larger, the closer to plain fine-tuning (8 .. 1024).

    Raises:
        ValueError: The shapes differ or are not 1-D, an input is not float32, or beta is not positive.

    Source: arXiv 2406.06424v2, eq. 9-11. Equal errors give exactly mse_chosen + ln 2 / beta.
    """
    check_errors(mse_chosen=mse_chosen, mse_rejected=mse_rejected)
    if not beta > 0:
        raise ValueError(f"mapo_paper_loss divides by beta, which is {beta}. Use beta > 0, or sft_loss.")
    chosen, rejected = mse_chosen.double(), mse_rejected.double()
    margin = (beta * log_phi(chosen)).exp() - (beta * log_phi(rejected)).exp()
    return (chosen - logsigmoid(margin) / beta).float()


def mapo_paper_linear_loss(
    mse_chosen: Float[Tensor, " pair"], mse_rejected: Float[Tensor, " pair"], *, beta: Number
) -> Float[Tensor, " pair"]:
    """Compute the per-pair MaPO loss in the paper's other reading, in which beta multiplies phi.

    loss = mse_chosen - (1 / beta) * logsigmoid(beta * (phi(mse_chosen) - phi(mse_rejected)))
    The paper writes phi with a subscript beta; that it is an exponent, as in `mapo_paper_loss`, follows from "bounded
    in (0, 1)" alone. Read this way, equal errors have the same gradient for every beta.

    Args:
        mse_chosen: Denoising error of the preferred image, mean over C, H, W; float32, >= 0.
        mse_rejected: The same for the other image, with the same noise and timestep.
        beta: Sharpness of the margin, > 0: the larger, the sooner a pair in the right order stops counting.

    Raises:
        ValueError: The shapes differ or are not 1-D, an input is not float32, or beta is not positive.

    Source: arXiv 2406.06424v2, eq. 9-11. Equal errors give exactly mse_chosen + ln 2 / beta.
    """
    check_errors(mse_chosen=mse_chosen, mse_rejected=mse_rejected)
    if not beta > 0:
        raise ValueError(f"mapo_paper_linear_loss divides by beta, which is {beta}. Use beta > 0, or sft_loss.")
    chosen, rejected = mse_chosen.double(), mse_rejected.double()
    margin = beta * (log_phi(chosen).exp() - log_phi(rejected).exp())
    return (chosen - logsigmoid(margin) / beta).float()


def sft_loss(mse_chosen: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """Return the denoising error itself: plain fine-tuning on the chosen image.

    Raises:
        ValueError: The input is not 1-D or not float32.
    """
    check_errors(mse_chosen=mse_chosen)
    return mse_chosen


def dpo_loss(
    mse_chosen: Float[Tensor, " pair"],
    mse_rejected: Float[Tensor, " pair"],
    ref_mse_chosen: Float[Tensor, " pair"],
    ref_mse_rejected: Float[Tensor, " pair"],
    *,
    beta: Number,
) -> Float[Tensor, " pair"]:
    """Compute the per-pair Diffusion-DPO loss, the baseline that needs a frozen reference model.

    loss = -logsigmoid(-beta / 2 * ((mse_chosen - mse_rejected) - (ref_mse_chosen - ref_mse_rejected)))

    Args:
        mse_chosen: Denoising error of the preferred image, mean over C, H, W; float32, >= 0.
        mse_rejected: The same for the other image, with the same noise and timestep.
        ref_mse_chosen: Error of the reference model on the preferred image; no gradient expected.
        ref_mse_rejected: The same for the other image.
        beta: Strength of the pull towards the reference (5000 SDXL, 2000 SD 1.5).

    Raises:
        ValueError: The shapes differ or are not 1-D, or an input is not float32.

    Source: DiffusionDPO, train.py. A model that equals its reference gives exactly ln 2.
    """
    gain = _gain(mse_chosen, mse_rejected, ref_mse_chosen, ref_mse_rejected)
    return (-logsigmoid(0.5 * beta * gain)).float()


def ipo_loss(
    mse_chosen: Float[Tensor, " pair"],
    mse_rejected: Float[Tensor, " pair"],
    ref_mse_chosen: Float[Tensor, " pair"],
    ref_mse_rejected: Float[Tensor, " pair"],
    *,
    beta: Number,
) -> Float[Tensor, " pair"]:
    """Compute the per-pair IPO loss: a regression that pulls the gain over the reference to a target, and no further.

    loss = (z - 1 / (2 * beta))^2
    z = (ref_mse_chosen - ref_mse_rejected) - (mse_chosen - mse_rejected)

    Args:
        mse_chosen: Denoising error of the preferred image, mean over C, H, W; float32, >= 0.
        mse_rejected: The same for the other image, with the same noise and timestep.
        ref_mse_chosen: Error of the reference model on the preferred image; no gradient expected.
        ref_mse_rejected: The same for the other image.
        beta: Strength of the pull towards the reference, > 0. The target is in units of the errors: 2e-4 for 2500.

    Raises:
        ValueError: The shapes differ or are not 1-D, an input is not float32, or beta is not positive.

    Source: arXiv 2310.12036, eq. 17, with diffusers' z (train_diffusion_dpo.py). A model that equals its
    reference gives exactly 1 / (4 * beta^2).
    """
    if not beta > 0:
        raise ValueError(f"ipo_loss divides by beta, which is {beta}. Use beta > 0.")
    gain = _gain(mse_chosen, mse_rejected, ref_mse_chosen, ref_mse_rejected)
    return (gain - 0.5 / beta).square().float()


def simpo_loss(
    mse_chosen: Float[Tensor, " pair"], mse_rejected: Float[Tensor, " pair"], *, beta: Number, gamma: Number
) -> Float[Tensor, " pair"]:
    """Compute the per-pair SimPO loss: the margin alone, with neither a reference nor a fine-tuning term.

    loss = -logsigmoid(beta * (mse_rejected - mse_chosen) - gamma)

    Args:
        mse_chosen: Denoising error of the preferred image, mean over C, H, W; float32, >= 0.
        mse_rejected: The same for the other image, with the same noise and timestep.
        beta: Scale of the margin: a pair counts less than half once mse_rejected leads by gamma / beta.
        gamma: Lead that the chosen image should have, in units of 1 / beta; 0 asks for any lead.

    Raises:
        ValueError: The shapes differ or are not 1-D, or an input is not float32.

    Source: arXiv 2405.14734, eq. 6, with -mse for the mean log-probability. Equal errors give exactly
    log(1 + e^gamma), a lead of gamma / beta gives ln 2.
    """
    check_errors(mse_chosen=mse_chosen, mse_rejected=mse_rejected)
    return (-logsigmoid(beta * (mse_rejected.double() - mse_chosen.double()) - gamma)).float()


def orpo_loss(
    mse_chosen: Float[Tensor, " pair"], mse_rejected: Float[Tensor, " pair"], *, beta: Number
) -> Float[Tensor, " pair"]:
    """Compute the per-pair ORPO loss: fine-tuning on the chosen image plus a margin of bare errors.

    loss = mse_chosen - beta * logsigmoid(mse_rejected - mse_chosen)
    diffusers' example has mse_chosen - mse_rejected inside, which rewards a larger error of the chosen image.

    Args:
        mse_chosen: Denoising error of the preferred image, mean over C, H, W; float32, >= 0.
        mse_rejected: The same for the other image, with the same noise and timestep.
        beta: Weight of the margin; 0 is plain fine-tuning on the chosen image.

    Raises:
        ValueError: The shapes differ or are not 1-D, or an input is not float32.

    Source: diffusers, train_diffusion_orpo_sdxl_lora.py, with the sign of arXiv 2403.07691. Equal errors give
    exactly mse_chosen + beta * ln 2.
    """
    check_errors(mse_chosen=mse_chosen, mse_rejected=mse_rejected)
    chosen, rejected = mse_chosen.double(), mse_rejected.double()
    return (chosen - beta * logsigmoid(rejected - chosen)).float()


def log_phi(x: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """Compute log(x / (e^x - 1)) for float64 x >= 0; its derivatives of every order are autograd's own.

    Below 0.1 the Taylor series, whose first dropped term is 2e-19; above it log x - x - log(1 - e^-x),
    which cannot overflow and whose derivative has lost one digit of 16 at most. Each branch sees only
    values it can take: torch.where multiplies the other's gradient by 0, and 0 * inf is NaN.
    """
    is_small = x < 0.1
    small = torch.where(is_small, x, 0.0)
    square = small * small
    tail = square * (1 / 24 - square * (1 / 2880 - square * (1 / 181440 - square / 9676800)))
    large = torch.where(is_small, 1.0, x)
    closed = large.log() - large - torch.log1p(-torch.exp(-large))
    return torch.where(is_small, -small / 2 - tail, closed)


LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "mapo": lambda e, t, beta, snr: mapo_loss(e.chosen, e.rejected, beta=beta, snr=snr, num_train_timesteps=t),
    "mapo_paper": lambda e, t, beta: mapo_paper_loss(e.chosen, e.rejected, beta=beta),
    "mapo_paper_linear": lambda e, t, beta: mapo_paper_linear_loss(e.chosen, e.rejected, beta=beta),
    "sft": lambda e, t: sft_loss(e.chosen),
    "dpo": lambda e, t, beta: dpo_loss(e.chosen, e.rejected, e.ref_chosen, e.ref_rejected, beta=beta),
    "ipo": lambda e, t, beta: ipo_loss(e.chosen, e.rejected, e.ref_chosen, e.ref_rejected, beta=beta),
    "simpo": lambda e, t, beta, gamma: simpo_loss(e.chosen, e.rejected, beta=beta, gamma=gamma),
    "orpo": lambda e, t, beta: orpo_loss(e.chosen, e.rejected, beta=beta),
}
"""Method name -> (errors e, T t, **parameters) -> the loss of that order; names and parameters are those of METHODS.

The methods that are not here have a loss of single images: see `training.image_losses`.
"""


def pair_loss(
    method: str,
    parameters: Mapping[str, Number],
    *,
    num_train_timesteps: int,
    sft_weight: Number = 0.0,
    adjust: Callable[[PairErrors], PairErrors] | None = None,
) -> PairLoss:
    """Return the loss a run asks for, with soft labels: both orders of a pair, weighed by their probability.

    loss = p * L(errors) + (1 - p) * L(errors.swapped());  p = 1 gives exactly L(errors), whatever the other term is.

    Args:
        method: `train.method`, a key of METHODS.
        parameters: `train.loss`, any subset of the method's parameters.
        num_train_timesteps: T, the length of the noise schedule (1000 for SDXL).
        sft_weight: Added to the loss of an order: this many times its chosen error.
        adjust: Changes the errors of an order before its loss is computed; None leaves them alone.

    Returns:
        (errors, preference) -> loss. `preference` may be on the CPU while the errors are on a GPU: its range is
        then checked on the CPU, without waiting for the GPU. The function raises ValueError if a method of
        NEEDS_REFERENCE gets no reference errors, or if preference is not one float32 in [0.5, 1] per pair.

    Raises:
        ConfigError: The method or a parameter is unknown, or a value is out of range.
        ValueError: The method's loss is of single images; `training.image_losses` has it.
    """
    complete = check_parameters(method, parameters)  # first, so that an unknown method has its message
    if method not in LOSSES:
        raise ValueError(f"{method} is a loss of images, not of pairs. Use training.image_losses.image_loss.")

    def in_order(errors: PairErrors) -> Tensor:
        loss = LOSSES[method](errors if adjust is None else adjust(errors), num_train_timesteps, **complete)
        return (loss.double() + sft_weight * errors.chosen.double()).float() if sft_weight else loss

    def weighed(errors: PairErrors, preference: Tensor) -> Tensor:
        if method in NEEDS_REFERENCE:
            _check_reference(method, errors)
        return weigh_orders(in_order, errors, preference)

    return weighed


def weigh_orders(in_order: Callable[[PairErrors], Tensor], errors: PairErrors, preference: Tensor) -> Tensor:
    """Return preference * L(errors) + (1 - preference) * L(swapped errors), one value per pair.

    Args:
        in_order: L, the loss of one order.
        errors: The errors of both images.
        preference: Probability that `chosen` is preferred; 1 gives exactly L(errors), whatever the other term is.

    Raises:
        ValueError: `preference` is not one float32 in [0.5, 1] per pair.
    """
    _check_preference(preference, errors.chosen.shape)
    weight = preference.to(errors.chosen.device).double()
    is_certain = weight == 1
    first = in_order(errors)
    second = in_order(errors.where(is_certain, errors.swapped()))  # 0 * (an infinite gradient) would be NaN
    both = weight * first.double() + (1 - weight) * second.double()
    return torch.where(is_certain, first, both.float())


def _gain(mse_chosen: Tensor, mse_rejected: Tensor, ref_mse_chosen: Tensor, ref_mse_rejected: Tensor) -> Tensor:
    """Compute z = (ref_mse_chosen - ref_mse_rejected) - (mse_chosen - mse_rejected) in float64.

    Subtracted image by image: near its reference, where training is, both differences are exact.
    """
    check_errors(
        mse_chosen=mse_chosen,
        mse_rejected=mse_rejected,
        ref_mse_chosen=ref_mse_chosen,
        ref_mse_rejected=ref_mse_rejected,
    )
    of_chosen = ref_mse_chosen.double() - mse_chosen.double()
    return of_chosen - (ref_mse_rejected.double() - mse_rejected.double())


def _check_reference(method: str, errors: PairErrors) -> None:
    """Check that there are reference errors: 0 would be a perfect model."""
    absent = [name for name in ("ref_chosen", "ref_rejected") if getattr(errors, name) is None]
    if absent:
        others = ", ".join(name for name in METHODS if name not in NEEDS_REFERENCE)
        raise ValueError(
            f"{method} compares with a frozen reference model, but {' and '.join(absent)} of the errors is None. "
            f"Pass its errors with the same noise and timesteps, or use a method without a reference: {others}."
        )


def _check_preference(preference: Tensor, shape: torch.Size) -> None:
    """Check that the larger share is the chosen image's: below 0.5 the two images are in the wrong order."""
    if preference.dtype != torch.float32 or preference.shape != shape:
        raise ValueError(
            f"preference is {preference.dtype} of shape {tuple(preference.shape)}, not torch.float32 of shape "
            f"{tuple(shape)}. Pass the probability of each pair's label; `torch.ones_like(errors.chosen)` if certain."
        )
    is_wrong = ~((preference >= 0.5) & (preference <= 1))  # NaN is wrong too
    if is_wrong.any():
        index = int(is_wrong.nonzero()[0])
        raise ValueError(
            f"preference of pair {index} is {preference[index].item():g}, not in [0.5, 1]: it is the probability that "
            "`chosen` is preferred. Swap the images: the one preferred with less than 0.5 is `rejected`."
        )
