"""Functions of the step alone: the learning rate, and the decay of the moving average.

Imports no torch: the plan and the model card use them too.
"""

import math
from collections.abc import Mapping, Sequence

from training.config import EmaConfig, TrainConfig

AVERAGE = "average_"
"""Prefix of a validation metric that was measured on the moving average of the weights, not on the weights."""
MIN_SHARE = 0.5
"""Below this share, an average contains more of the base than of the training."""


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of an optimizer step, counted from 0: linear warm-up, then the schedule down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.lr_schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - done)
    return config.learning_rate


def decay_at(step: int, ema: EmaConfig) -> float:
    """Return the share of the old average that an optimizer step keeps; steps are counted from 0.

    min(decay, (1 + step) / (10 + step)), and 0 at the first step. Source: diffusers, training_utils.py
    (EMAModel.get_decay with its defaults).
    """
    if not ema.warmup:
        return ema.decay
    return min(ema.decay, (1 + step) / (10 + step)) if step else 0.0


def average_share(config: TrainConfig, num_steps: int | None = None) -> float:
    """Return how far the average has followed a steady training, from 0 (its start) to 1 (its end).

    Steady: each step moves the weights in one direction by its learning rate, as AdamW roughly does.

    Args:
        config: The section `train`; 1 without `ema`, where the weights themselves are exported.
        num_steps: Finished steps; `max_steps` by default.
    """
    if config.ema is None:
        return 1.0
    moved = average = 0.0
    for step in range(config.max_steps if num_steps is None else num_steps):
        moved += learning_rate_at(step, config)
        decay = decay_at(step, config.ema)
        average = decay * average + (1 - decay) * moved
    return average / moved if moved else 1.0


def of_average(validations: Sequence[Mapping[str, float]]) -> list[dict[str, float]] | None:
    """Return the validation metrics of the average under their plain names; None if it was not measured.

    A training that an earlier version began has no such metrics of its first validations.
    """
    measured = [each for each in validations if f"{AVERAGE}loss" in each]
    return [
        {name: each.get(f"{AVERAGE}{name}", value) for name, value in each.items() if not name.startswith(AVERAGE)}
        for each in measured
    ] or None
