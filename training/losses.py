"""MaPO and its baselines as pure tensors: one value a pair in, one value a pair out.

Inputs and results are float32; the arithmetic between is float64, which costs nothing at one value
a pair. In float32 the margin T * (phi(a) - phi(b)) would be off by about 1e-4 at T = 1000.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.methods import check_parameters

Number = float | int  # the tests' run-time checks (beartype) do not take 8 for a float
PairLoss = Callable[[Tensor, Tensor], Tensor]
"""(mse_chosen, mse_rejected) -> loss, each one value a pair."""


def mapo_loss(
    mse_chosen: Float[Tensor, " pair"],
    mse_rejected: Float[Tensor, " pair"],
    *,
    beta: Number,
    snr: Number,
    num_train_timesteps: int,
) -> Float[Tensor, " pair"]:
    """Per-pair MaPO loss as in the released code; the caller averages over the global batch.

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
    _check_pairs(mse_chosen=mse_chosen, mse_rejected=mse_rejected)
    chosen, rejected = mse_chosen.double(), mse_rejected.double()
    margin = num_train_timesteps * (log_phi(snr * chosen).exp() - log_phi(snr * rejected).exp())
    return (chosen - beta * logsigmoid(margin)).float()


def mapo_paper_loss(
    mse_chosen: Float[Tensor, " pair"], mse_rejected: Float[Tensor, " pair"], *, beta: Number
) -> Float[Tensor, " pair"]:
    """Per-pair MaPO loss as in the paper; not a reparametrisation of `mapo_loss`.

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
    _check_pairs(mse_chosen=mse_chosen, mse_rejected=mse_rejected)
    if not beta > 0:
        raise ValueError(f"mapo_paper_loss divides by beta, which is {beta}. Use beta > 0, or sft_loss.")
    chosen, rejected = mse_chosen.double(), mse_rejected.double()
    margin = (beta * log_phi(chosen)).exp() - (beta * log_phi(rejected)).exp()
    return (chosen - logsigmoid(margin) / beta).float()


def sft_loss(mse_chosen: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """Plain fine-tuning on the chosen image: the denoising error itself.

    Raises:
        ValueError: The input is not 1-D or not float32.
    """
    _check_pairs(mse_chosen=mse_chosen)
    return mse_chosen


def dpo_loss(
    mse_chosen: Float[Tensor, " pair"],
    mse_rejected: Float[Tensor, " pair"],
    ref_mse_chosen: Float[Tensor, " pair"],
    ref_mse_rejected: Float[Tensor, " pair"],
    *,
    beta: Number,
) -> Float[Tensor, " pair"]:
    """Per-pair Diffusion-DPO loss, the baseline that needs a frozen reference model.

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
    _check_pairs(
        mse_chosen=mse_chosen,
        mse_rejected=mse_rejected,
        ref_mse_chosen=ref_mse_chosen,
        ref_mse_rejected=ref_mse_rejected,
    )
    policy = mse_chosen.double() - mse_rejected.double()
    reference = ref_mse_chosen.double() - ref_mse_rejected.double()
    return (-logsigmoid(-0.5 * beta * (policy - reference))).float()


def log_phi(x: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """log(x / (e^x - 1)) for float64 x >= 0; its derivatives of every order are autograd's own.

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


def _mapo(parameters: Mapping[str, float], num_train_timesteps: int) -> PairLoss:
    beta, snr = parameters["beta"], parameters["snr"]
    return lambda mse_chosen, mse_rejected: mapo_loss(
        mse_chosen, mse_rejected, beta=beta, snr=snr, num_train_timesteps=num_train_timesteps
    )


def _mapo_paper(parameters: Mapping[str, float], num_train_timesteps: int) -> PairLoss:
    beta = parameters["beta"]
    return lambda mse_chosen, mse_rejected: mapo_paper_loss(mse_chosen, mse_rejected, beta=beta)


def _sft(parameters: Mapping[str, float], num_train_timesteps: int) -> PairLoss:
    return lambda mse_chosen, mse_rejected: sft_loss(mse_chosen)


LOSSES: Mapping[str, Callable[[Mapping[str, float], int], PairLoss]] = {
    "mapo": _mapo,
    "mapo_paper": _mapo_paper,
    "sft": _sft,
}
"""Method name -> (all its parameters, T) -> the loss of a pair; the same names as METHODS."""


def pair_loss(method: str, parameters: Mapping[str, Number], *, num_train_timesteps: int) -> PairLoss:
    """The loss a run asks for, as a function of the two errors alone.

    Raises:
        ConfigError: The method or a parameter is unknown, or a value is out of range.
    """
    complete = check_parameters(method, parameters)  # first, so that an unknown method has its message
    return LOSSES[method](complete, num_train_timesteps)


def _check_pairs(**errors: Tensor) -> None:
    """One float32 value a pair, as many of each; broadcasting would average over pairs that do not exist."""
    for name, error in errors.items():
        if error.dtype != torch.float32:
            raise ValueError(
                f"{name} is {error.dtype}, not torch.float32. Compute the error in float32: "
                "`(prediction.float() - target.float()).pow(2).mean(dim=(1, 2, 3))`."
            )
        if error.ndim != 1:
            raise ValueError(
                f"{name} has shape {tuple(error.shape)}, not one value a pair. Take the mean over "
                "C, H, W only: `.mean(dim=(1, 2, 3))`."
            )
    shapes = {name: error.shape[0] for name, error in errors.items()}
    if len(set(shapes.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in shapes.items())
        raise ValueError(
            f"The number of pairs differs: {counts}. Give both images of each pair; "
            "`chunk(2)` splits a batch of chosen then rejected images."
        )
