"""One run of `benchmarks.alignment`: train a copy of the base on pairs of one level, draw samples, score them.

Losses, order of the pairs, noise, denoising errors, optimizer, schedule, sampler and scores are the product's own; in
place of DeepSpeed and Ray there is a plain loop in one process.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.alignment_data import SOURCE, Data, Pairs
from orchestration.demo.scores import ContentScore, StyleScore, palette
from pipelines.dataset.pair import TEST, TRAIN, VALIDATION
from pipelines.samples.drawing import DrawnModel, Sampling
from pipelines.samples.sampler import Sampler
from training.config import TrainConfig
from training.data.order import Plan, noise_seed
from training.engine import build_optimizer
from training.loop import draw_with
from training.measure import measure
from training.methods import NEEDS_REFERENCE
from training.model import Base, Denoiser, Reference
from training.objective import Objective, StepFacts
from training.schedule import learning_rate_at

CPU = torch.device("cpu")
METRICS = ("style", "content", "both", "distance")
"""Of a sample: `both` is style times content; `distance` is from the colours of the prompt's own preferred images.

Style says on which side of a line colours lie, and is as high for too much of them; distance is not.
"""

LOWER_IS_BETTER = ("distance",)

ERROR_PAIRS, ERROR_SEED = 64, 0
Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Setting:
    """What the grid chooses for a method; loss parameters that are left out have the method's defaults."""

    method: str
    learning_rate: float
    loss: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of `train`, such as `safeguard`."""

    def train_config(self, steps: int, batch_size: int) -> TrainConfig:
        """The run's configuration; its prompt dropout is the demo's, as samples are drawn with guidance."""
        return TrainConfig(
            method=self.method, loss=dict(self.loss), learning_rate=self.learning_rate, max_steps=steps,
            global_batch_size=batch_size, micro_batch_size=batch_size, warmup_steps=min(10, steps // 2),
            precision="fp32", prompt_dropout=0.15, **self.options,
        )  # fmt: skip


def train(
    base: Base,
    data: Data,
    level: str,
    config: TrainConfig,
    *,
    seed: int,
    watch: Callable[[int, Any], None] = lambda step, unet: None,
) -> Any:
    """A copy of the base's UNet after `max_steps` steps; the same seed gives the same weights.

    Args:
        base: The base model.
        data: Pairs of every level.
        level: The level to train on.
        config: The section `train`.
        seed: Decides order, noise and timesteps.
        watch: Called before each step, and after the last, with the number of finished steps and the UNet.
    """
    unet = copy.deepcopy(base.unet).train()
    reference = Reference.copy_of(unet, CPU, torch.float32) if config.method in NEEDS_REFERENCE else None
    denoiser = Denoiser(unet, reference, base, config, device=CPU, dtype=torch.float32)
    objective = Objective(config, base, seed)
    optimizer = build_optimizer(unet, config, on_gpu=False)
    pairs = data.pairs[level, TRAIN]
    plan = Plan([len(pairs.prompts)], config.micro_batch_size, config.global_batch_size, seed)
    for step in range(config.max_steps):
        watch(step, unet)
        batch = pairs.batch(plan.group(step, 0).elements.tolist())
        generator = torch.Generator().manual_seed(noise_seed(seed, step, 0))
        noise, timesteps, batch = draw_with(generator, batch, data, base.num_train_timesteps, config.prompt_dropout)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        facts = StepFacts(has_margin=objective.has_margin(step))
        measure(denoiser, objective, batch, noise, timesteps, facts).losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    watch(config.max_steps, unet)
    return unet.eval()


def denoising_errors(base: Base, unet: Any, pairs: Pairs) -> dict[str, float]:
    """Mean errors of a UNet on preferred and other images of held-out pairs, with the same noise for every UNet."""
    positions = np.linspace(0, len(pairs.prompts) - 1, min(ERROR_PAIRS, len(pairs.prompts))).astype(int).tolist()
    batch, generator = pairs.batch(positions), torch.Generator().manual_seed(ERROR_SEED)
    noise = torch.randn(batch.chosen_BCHW.shape, generator=generator)
    timesteps = torch.randint(0, base.num_train_timesteps, (len(positions),), generator=generator)
    with torch.no_grad():
        errors = Denoiser(unet, None, base, TrainConfig(), device=CPU, dtype=torch.float32).errors(
            batch, noise, timesteps
        )
    return {"mse_chosen": float(errors.chosen.mean()), "mse_rejected": float(errors.rejected.mean())}


class Judge:
    """The demo's two scores for one level, and the distance from what is preferred for the very prompt.

    The scores learn from all pairs of the level, so that validation and test have one judge; no sample is among them.
    """

    def __init__(self, data: Data, level: str) -> None:
        splits = [data.pairs[level, split] for split in (TRAIN, VALIDATION, TEST)]
        chosen, rejected, prompts = (
            [item for pairs in splits for item in getattr(pairs, name)] for name in ("chosen", "rejected", "prompts")
        )
        self._style, self._content = StyleScore(), ContentScore()
        self._style.shrinkage /= 10  # it is for few references, and these are many
        for scorer in (self._style, self._content):
            scorer.fit(chosen, rejected, prompts)
        palettes = np.stack([palette(image) for image in chosen])
        subject = np.asarray(prompts)
        self._targets = {prompt: palettes[subject == prompt].mean(axis=0) for prompt in set(prompts)}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Every metric of `METRICS`, one value a sample."""
        style, content = (np.asarray(scorer.score(images, prompts)) for scorer in (self._style, self._content))
        gaps = np.stack([palette(i) - self._targets[p] for i, p in zip(images, prompts, strict=True)])
        distance = np.sqrt(np.square(gaps).mean(axis=1))
        return {"style": style, "content": content, "both": style * content, "distance": distance}


@dataclass(frozen=True)
class Draws:
    """Samples of one split: the held-out prompts, each with several noises, the same for every model."""

    prompts: list[str]
    seeds: list[int]

    @staticmethod
    def of(pairs: Pairs, per_prompt: int, *, first_seed: int) -> "Draws":
        """`per_prompt` samples of every prompt, prompt after prompt."""
        prompts = [prompt for prompt in dict.fromkeys(pairs.prompts) for _ in range(per_prompt)]
        return Draws(prompts, list(range(first_seed, first_seed + len(prompts))))

    def images(self, unet: Any, sampling: Sampling) -> list[Image.Image]:
        """Draw them with a UNet in the base's pipeline."""
        with tempfile.TemporaryDirectory(prefix="mapo-alignment-") as folder:
            unet.save_pretrained(folder)
            sampler = Sampler(DrawnModel("trained", SOURCE, folder), sampling)
        batch = sampler.draw([sampler.embed(prompt) for prompt in self.prompts], self.seeds)
        return [Image.fromarray(pixels_HWC) for pixels_HWC in batch.pixels_BHWC]
