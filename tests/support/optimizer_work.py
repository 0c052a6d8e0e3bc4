"""What the ranks of the optimizers' tests do, and the same by hand with the optimizers of others."""

import functools
from typing import Any

import numpy as np
from engine_work import losses_of_configs, plain_adamw, train_and_save

from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.state.checkpoint_format import Reader, list_checkpoints, read_parameters

Job = tuple[TrainConfig, str, list[int]]
"""A training, its storage, and the steps after which its engine is built anew from a checkpoint."""


def train_all(jobs: list[Job], configs: list[TrainConfig], base_folder: str, num_steps: int) -> dict[str, Any]:
    """All jobs and the curves of all configurations, in the same processes."""
    turns = [[train_and_save(config, base_folder, url, step) for step in steps] for config, url, steps in jobs]
    return {"jobs": turns, "curves": losses_of_configs(configs, base_folder, num_steps)}


def newest_checkpoint(url: str) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Every kind and parameter of the newest checkpoint, and its state."""
    storage = Storage(url)
    reader = Reader(storage, list_checkpoints(storage, "checkpoints")[-1])
    return {kind: dict(read_parameters(reader, kind)) for kind in sorted(reader.kinds())}, reader.state


def by_hand(config: TrainConfig, base_folder: str, num_steps: int) -> list[float]:
    """The curve with the optimizer of transformers or of prodigyopt, which see whole parameters in one process."""
    return plain_adamw(config, base_folder, num_steps, optimizer_of(config))[0]


def optimizer_of(config: TrainConfig) -> Any:
    """The other implementation of a configuration's optimizer."""
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return functools.partial(Adafactor, scale_parameter=False, relative_step=False)
    from prodigyopt import Prodigy

    settings = config.prodigy.model_dump(exclude_none=True)
    return functools.partial(Prodigy, use_bias_correction=True, safeguard_warmup=True, **settings)
