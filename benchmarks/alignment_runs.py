"""One run of `benchmarks.alignment`: train a copy of the base on pairs of one level, draw samples, score them.

The loss, the order of the pairs, their noise, the errors, the optimizer and its schedule, the sampler and the scores
are the product's own; in place of DeepSpeed there is a plain loop in one process.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.alignment_data import Data
from pipelines.dataset.pair import TRAIN
from training.config import TrainConfig
from training.engine import build_optimizer, learning_rate_at
from training.loop import draw_with
from training.losses import pair_loss
from training.methods import NEEDS_REFERENCE
from training.model import Base, Denoiser, Reference
from training.order import Plan, noise_seed

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """What the grid chooses for a method."""

    method: str
    learning_rate: float
    loss: Mapping[str, float] = field(default_factory=dict)

    def train_config(self, steps: int, batch_size: int) -> TrainConfig:
        """The run's configuration, but for what needs an engine."""
        return TrainConfig(
            method=self.method, loss=dict(self.loss), learning_rate=self.learning_rate, max_steps=steps,
            global_batch_size=batch_size, micro_batch_size=batch_size, warmup_steps=min(10, steps // 2),
            precision="fp32", prompt_dropout=0.15,
        )  # fmt: skip


def train(base: Base, data: Data, level: str, config: TrainConfig, *, seed: int) -> Any:
    """A copy of the base's UNet after `max_steps` steps; the same seed gives the same weights."""
    unet = copy.deepcopy(base.unet).train()
    reference = Reference.copy_of(unet, CPU, torch.float32) if config.method in NEEDS_REFERENCE else None
    denoiser = Denoiser(unet, reference, base, config, device=CPU, dtype=torch.float32)
    loss_of = pair_loss(config.method, config.loss, num_train_timesteps=base.num_train_timesteps)
    optimizer = build_optimizer(unet, config, on_gpu=False)
    pairs = data.pairs[level, TRAIN]
    plan = Plan([len(pairs.prompts)], config.micro_batch_size, config.global_batch_size, seed)
    for step in range(config.max_steps):
        batch = pairs.batch(plan.group(step, 0).elements.tolist())
        generator = torch.Generator().manual_seed(noise_seed(seed, step, 0))
        noise, timesteps, batch = draw_with(
            generator, batch, data, base.num_train_timesteps, config.prompt_dropout
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        loss_of(denoiser.errors(batch, noise, timesteps), batch.preference_B).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return unet.eval()
