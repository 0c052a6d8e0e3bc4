"""The plan's notes on a training, in addition to its amount of work: chosen settings, reasons, and warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.methods import Rate, default_rate
from training.optimizers.registry import OPTIMIZERS
from training.schedule import MIN_SHARE, average_share
from training.spec import RATE_BEFORE

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.spec import TrainSpec

LEAST_RATE_OF_ADAPTERS = 1e-6
"""Below this rate, adapters learn next to nothing in a few thousand steps, because they start from zero."""


def training_notes(config: TrainConfig, begun: TrainConfig | None = None) -> list[str]:
    """Return the plan's lines on a training, each one self-contained.

    Args:
        config: The section `train`.
        begun: The settings that an existing training continues with, if there is one.
    """
    rate = learning_rate(config, begun)
    notes = [f"learning rate {rate['value']:.4g} ({rate['source']})"]
    if (own := OPTIMIZERS[config.optimizer].rate) is not None:
        notes += _factor_notes(config, rate["value"], own)
    elif config.lora is not None and rate["value"] < LEAST_RATE_OF_ADAPTERS:
        published = default_rate(config.method, with_adapters=True)
        notes.append(
            f"warning: adapters learn next to nothing at a learning rate of {rate['value']:.4g}; "
            f"the default is {published.value:.4g}"
        )
    return [*notes, *average_notes(config, begun)]


def _factor_notes(config: TrainConfig, value: float, own: Rate) -> list[str]:
    """Return a warning if the rate of an optimizer that estimates its step size is not the one that it is made for."""
    if value == own.value:
        return []
    return [
        f"warning: {config.optimizer} estimates its own step size, and a learning rate of {value:.4g} multiplies it; "
        f"leave `train.learning_rate` out ({own.value:g}), and use `train.prodigy.d_coef` for smaller or larger steps"
    ]


def average_notes(config: TrainConfig, begun: TrainConfig | None = None) -> list[str]:
    """Return how much of the training a moving average will contain, and a warning if it is mostly the base."""
    ema = (begun or config).ema
    if ema is None or config.ema is None:
        return []
    share = average_share(begun or config)
    notes = [f"the moving average will contain about {share:.0%} of the training"]
    if share < MIN_SHARE:
        others = "" if config.ema.warmup else "`train.ema.warmup: true` or a smaller `decay`, or "
        notes.append(
            f"warning: an export of that average is mostly the base (decay {ema.decay} over {config.max_steps:,} "
            f"steps); set {others}`export.weights: raw`"
        )
    return notes


def version_notes(spec: TrainSpec) -> list[str]:
    """Return how a training that an earlier version began differs, and what training again would cost.

    Args:
        spec: The training, unfinished or up to date.
    """
    if spec.masters != "rounded":
        return []
    config, differences = spec.config, []
    if spec.is_whole_in_16_bits:
        differences.append(f"its float32 weights started from the base's weights rounded to {config.precision}")
    if config.ema is not None and not config.ema.warmup:
        differences.append("its moving average has no warm-up")
    published = default_rate(config.method, with_adapters=config.lora is not None).value
    if config.learning_rate == RATE_BEFORE != published:
        differences.append(f"its learning rate is the {RATE_BEFORE:g} that every method had (now {published:.4g})")
    if not differences:
        return []
    return [
        f"an earlier version started this training: {' and '.join(differences)}; it continues that way",
        f"to train with today's arithmetic, run it under another `name`: {config.max_steps:,} steps of "
        f"{config.global_batch_size:,} pairs (the data set is shared, nothing is encoded again)",
    ]


def training_settings(config: TrainConfig, begun: TrainConfig | None = None) -> dict[str, Any]:
    """Return the notes as plain data."""
    settings: dict[str, Any] = {"learning_rate": learning_rate(config, begun)}
    if config.ema is not None:
        settings["average_share"] = round(average_share(begun or config), 4)
    return settings


def learning_rate(config: TrainConfig, begun: TrainConfig | None = None) -> dict[str, Any]:
    """Return the learning rate's `value`, its `source` in words, and whether the configuration sets it (`is_set`)."""
    value = config.learning_rate if begun is None else begun.learning_rate
    is_set = "learning_rate" in config.model_fields_set
    if is_set:
        source = "set"
    elif value != config.learning_rate:
        source = "as this training began"
    elif (own := OPTIMIZERS[config.optimizer].rate) is not None:
        source = f"{config.optimizer}: {own.source}"
    else:
        trained = "all weights" if config.lora is None else "adapters"
        source = (
            f"{trained}, {config.method}: {default_rate(config.method, with_adapters=config.lora is not None).source}"
        )
    return {"value": value, "source": source, "is_set": is_set}
