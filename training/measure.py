"""Errors, losses and metrics of one micro-batch, of whatever kind its records are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.batch import Batch
from training.image_losses import ImageErrors, gain_of
from training.losses import PairErrors
from training.model import Denoiser
from training.objective import Objective, StepFacts
from training.tracking.metrics import image_sums, pair_sums

Errors = PairErrors | ImageErrors


@dataclass(frozen=True)
class Measured:
    """One micro-batch: losses, one value per record, and the sums of its metrics."""

    losses: Tensor
    sums: Tensor
    num_images: int
    """Images of each record that had a forward pass with a gradient: 1 or 2."""


def measure(
    denoiser: Denoiser,
    objective: Objective,
    batch: Batch,
    noise_BCHW: Tensor,
    timesteps_B: Tensor,
    facts: StepFacts,
    known: Errors | None = None,
) -> Measured:
    """Compute the losses of a micro-batch, and the sums of its metrics.

    Args:
        denoiser: Computes the errors.
        objective: Computes losses from them.
        batch: Pairs or single images, with dropped prompts replaced.
        noise_BCHW: Standard normal, float32.
        timesteps_B: int64 in [0, T).
        facts: What the step's loss depends on.
        known: Errors of the same draws, whose reference is taken instead of computing it again.
    """
    errors = measure_errors(denoiser, objective, batch, noise_BCHW, timesteps_B, facts, known)
    weights_B = objective.weights_of(timesteps_B, timesteps_B.device)
    if isinstance(errors, ImageErrors):
        losses = objective.of_images(errors, batch, timesteps_B, facts)
        sums = image_sums(losses.detach(), errors, batch.kind, batch.good_B, weights_B)
        return Measured(losses, sums, num_images=1)
    losses = objective.of_pairs(errors, batch, timesteps_B, facts)
    length = denoiser.base.num_train_timesteps
    sums = pair_sums(losses.detach(), errors, batch.preference_B, timesteps_B, length, weights_B)
    return Measured(losses, sums, num_images=2)


def measure_errors(
    denoiser: Denoiser,
    objective: Objective,
    batch: Batch,
    noise_BCHW: Tensor,
    timesteps_B: Tensor,
    facts: StepFacts,
    known: Errors | None = None,
) -> Errors:
    """Compute the errors that the loss of a micro-batch needs: of both images of each pair, or of one."""
    if batch.rejected_BCHW is None or not objective.reads_rejected(batch, facts):
        of_images = known if isinstance(known, ImageErrors) else None
        return denoiser.image_errors(batch, noise_BCHW, timesteps_B, known=of_images)
    of_pairs = known if isinstance(known, PairErrors) else None
    return denoiser.errors(batch, noise_BCHW, timesteps_B, with_alignment=objective.needs_alignment, known=of_pairs)


def gain_sums(errors: Errors, weights_B: Tensor | None) -> Tensor:
    """Return the sum of the gains over the reference of all images of a micro-batch, and their number; float64 (2,).

    Args:
        errors: With the reference's.
        weights_B: The weights of the timesteps, if they have any.
    """
    if isinstance(errors, PairErrors):
        sides = [(errors.chosen, errors.ref_chosen), (errors.rejected, errors.ref_rejected)]
    else:
        sides = [(errors.error, errors.reference)]
    gains = [gain_of(error, reference) for error, reference in sides if reference is not None]
    if weights_B is not None:
        gains = [gain * weights_B.double() for gain in gains]
    total = torch.cat(gains)
    return torch.stack([total.sum(), total.new_tensor(float(len(total)))])
