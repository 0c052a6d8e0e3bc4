"""Validation on held-out pairs with fixed noise and timesteps: two validations differ by the weights alone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from training.data.index import PairIndex, PairRecord
from training.data.loader import Batch, PairLoader, PairReader
from training.data.order import validation_seed
from training.engine import Engine
from training.image_losses import kl_of
from training.measure import gain_sums, measure, measure_errors
from training.model import Denoiser
from training.objective import Objective, StepFacts
from training.schedule import AVERAGE
from training.spec import TrainSpec
from training.state.ema import ShardedEma
from training.tracking.metrics import NO_CURVE, NUM_SUMS, means_of

NUM_TIMESTEPS = 4  # the middle of each quarter of the schedule

Groups = list[tuple[float, list[PairRecord]]]


class Validation:
    """The held-out pairs of a run, which can be measured any number of times.

    Args:
        held_out: Pairs of the validation split; without any there are no metrics.
        reader: Reads the pairs.
        spec: The run; its seed fixes noise and timesteps.
        engine: The weights that are measured.
        denoiser: Computes their errors.
        ema: The average of the weights, which is measured too; None if the training keeps none.
    """

    def __init__(
        self,
        held_out: PairIndex,
        reader: PairReader,
        spec: TrainSpec,
        engine: Engine,
        denoiser: Denoiser,
        ema: ShardedEma | None = None,
    ) -> None:
        config = spec.config
        self._groups = validation_groups(
            held_out, config.micro_batch_size, config.max_validation_pairs, engine.world_size
        )
        self._reader, self._spec, self._engine, self._denoiser = reader, spec, engine, denoiser
        self._ema = ema

    def measure(self, objective: Objective) -> dict[str, float]:
        """Return mean metrics over the held-out pairs and NUM_TIMESTEPS timesteps each; collective.

        Implicit accuracy is the share of (pair, timestep) draws whose chosen error is the smaller one; `num_pairs`
        counts each pair once. Metrics with the prefix AVERAGE are of the moving average of the weights; those without
        are of the weights themselves.
        """
        if not self._groups:
            return {}
        metrics = self._measured(objective)
        if self._ema is not None:
            with self._ema.in_place_of_the_weights():
                of_average = self._measured(objective)
            metrics |= {f"{AVERAGE}{name}": value for name, value in of_average.items() if name not in NO_CURVE}
        return metrics

    def _measured(self, objective: Objective) -> dict[str, float]:
        engine = self._engine
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=engine.device)
        engine.unet.eval()
        with torch.no_grad():
            facts = StepFacts(kl=self._kl(objective)) if objective.needs_kl else StepFacts()
            for weight, batch, noise, timesteps in self._mine():
                sums += weight * measure(self._denoiser, objective, batch, noise, timesteps, facts).sums
        engine.unet.train()
        metrics = means_of(engine.sum(sums))
        counts = {name: metrics[name] / NUM_TIMESTEPS for name in ("num_pairs", "num_images") if name in metrics}
        return metrics | counts

    def _kl(self, objective: Objective) -> float:
        """Return KTO's reference point over all held-out draws; collective."""
        gains = torch.zeros(2, dtype=torch.float64, device=self._engine.device)
        for weight, batch, noise, timesteps in self._mine():
            errors = measure_errors(self._denoiser, objective, batch, noise, timesteps, StepFacts())
            gains += weight * gain_sums(errors, objective.weights_of(timesteps, self._engine.device))
        return kl_of(*self._engine.sum(gains).tolist())

    def _mine(self) -> Iterator[tuple[float, Batch, Tensor, Tensor]]:
        """Yield this rank's micro-batches, each with its weight and NUM_TIMESTEPS draws of noise and timesteps."""
        engine, length = self._engine, self._denoiser.base.num_train_timesteps
        for weight, batch in PairLoader(self._reader, self._groups[engine.rank :: engine.world_size]):
            for noise, timesteps in _draws(batch.records, batch.chosen_BCHW.shape[1:], length, self._spec.seed):
                yield weight, batch, noise, timesteps


def validation_groups(index: PairIndex, micro_batch_size: int, max_pairs: int, world_size: int) -> Groups:
    """Return the held-out pairs in micro-batches of one shape, each with weight 1.

    Every rank runs the same number of micro-batches (ZeRO-3 gathers weights in each): the list is filled up to a
    multiple of `world_size` with repeats of weight 0.
    """
    groups: Groups = []
    left = max_pairs
    for bucket, size in enumerate(index.bucket_sizes):
        elements = range(min(size, left))
        left -= len(elements)
        for start in range(0, len(elements), micro_batch_size):
            groups.append((1.0, [index.pair(bucket, each) for each in elements[start : start + micro_batch_size]]))
    while groups and len(groups) % world_size:
        groups.append((0.0, groups[-1][1]))
    return groups


def _draws(records: list[PairRecord], shape: Any, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield NUM_TIMESTEPS draws of noise (B, C, H, W) and timesteps (B,) for a micro-batch, each pair's own."""
    generators = [torch.Generator().manual_seed(validation_seed(seed, record.pair_key)) for record in records]
    for quarter in range(NUM_TIMESTEPS):
        noise = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
        yield noise, torch.full((len(records),), length * (2 * quarter + 1) // (2 * NUM_TIMESTEPS))
