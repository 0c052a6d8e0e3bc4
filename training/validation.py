"""Held-out validation with fixed noise and timesteps: two validations differ by the weights alone."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from training.engine import Engine
from training.index import PairIndex, PairRecord
from training.loader import PairLoader, PairReader
from training.metrics import PAIR_METRICS, pair_metrics
from training.model import Base, denoising_errors
from training.order import validation_seed

NUM_TIMESTEPS = 4  # the middle of each quarter of the schedule

PairLoss = Callable[[Tensor, Tensor], Tensor]
Groups = list[tuple[float, list[PairRecord]]]


def validation_groups(index: PairIndex, micro_batch_size: int, max_pairs: int, world_size: int) -> Groups:
    """The held-out pairs in micro-batches of one shape, each with its weight.

    Every rank runs the same number of micro-batches (ZeRO-3 gathers weights in each): the list is filled up to a
    multiple of `world_size` with repeats of weight 0. A short micro-batch weighs as many pairs as it has.
    """
    groups: Groups = []
    left = max_pairs
    for bucket, size in enumerate(index.bucket_sizes):
        elements = range(min(size, left))
        left -= len(elements)
        for start in range(0, len(elements), micro_batch_size):
            records = [index.pair(bucket, element) for element in elements[start : start + micro_batch_size]]
            groups.append((float(len(records)), records))
    while groups and len(groups) % world_size:
        groups.append((0.0, groups[-1][1]))
    return groups


def validate(
    engine: Engine, base: Base, reader: PairReader, groups: Groups, pair_loss: PairLoss, *, seed: int
) -> dict[str, float]:
    """Mean metrics over the held-out pairs and NUM_TIMESTEPS timesteps each; collective.

    Implicit accuracy is the share of (pair, timestep) draws whose chosen error is the smaller one.
    """
    mine = groups[engine.rank :: engine.world_size]
    sums = torch.zeros(len(PAIR_METRICS) + 1)
    engine.unet.eval()
    with torch.no_grad():
        for weight, batch in PairLoader(reader, mine):
            for noise, timesteps in _draws(batch.records, batch.chosen_BCHW.shape[1:], base, seed):
                chosen, rejected = denoising_errors(
                    engine.unet, base, batch, noise, timesteps, device=engine.device, dtype=engine.dtype
                )
                metrics = pair_metrics(pair_loss(chosen, rejected), chosen, rejected).cpu()
                sums += weight * torch.cat([metrics, torch.ones(1)])
    engine.unet.train()
    totals = engine.sum(sums)
    count = float(totals[-1])
    means = dict(zip(PAIR_METRICS, (totals[:-1] / max(count, 1.0)).tolist(), strict=True))
    return means | {"num_pairs": count / NUM_TIMESTEPS}


def _draws(records: list[PairRecord], shape: Any, base: Base, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """NUM_TIMESTEPS times the noise (B, C, H, W) and timesteps (B,) of a micro-batch, each pair's own."""
    generators = [torch.Generator().manual_seed(validation_seed(seed, record.pair_key)) for record in records]
    length = base.scheduler.config.num_train_timesteps
    for quarter in range(NUM_TIMESTEPS):
        noise = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
        yield noise, torch.full((len(records),), length * (2 * quarter + 1) // (2 * NUM_TIMESTEPS))
