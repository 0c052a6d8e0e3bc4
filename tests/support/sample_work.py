"""What the ranks of the samples' test do: real steps of a real engine, with and without grids between them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from engine_work import PAIRS, make, train_step

from training import samples
from training.config import TrainConfig
from training.data.index import load_index, load_texts
from training.data.loader import PairReader
from training.spec import TrainSpec
from training.state.ema import ShardedEma
from training.state.zero import KINDS, ZeroState

Trained = dict[str, Any]
FEW_STEPS = 4  # of a sample: the ranks' steps are what is tested


def train_and_draw(spec: TrainSpec, *, draws: bool) -> Trained:
    """Two steps, with a grid before each if wanted: grids, weights and moments, and whether all else stayed."""
    config = spec.config
    engine, denoiser, base = make(config, spec.base.model, PAIRS // config.micro_batch_size // config.worker_range[0])
    reader = PairReader(spec.storage, load_texts(spec.storage, spec.snapshot))
    samples.NUM_STEPS = FEW_STEPS
    grid = samples.SampleGrid(load_index(spec.storage, spec.snapshot, "validation"), reader, spec, engine, base)
    grids, is_still = [], True
    for step in range(2):
        torch.manual_seed(step)
        before = torch.get_rng_state()
        if draws:
            image = grid.draw(step)
            grids.append(None if image is None else np.asarray(image))
        is_still &= torch.equal(before, torch.get_rng_state()) and engine.unet.training
        train_step(engine, denoiser, config, step)
    state = ZeroState(engine.unet)
    weights = {(kind, part.name): view.clone() for kind in KINDS for part, view in state.views(kind)}
    return {"grids": grids, "weights": weights, "is_still": is_still}


def draw_average(spec: TrainSpec) -> list[Any]:
    """A grid before three steps; after them one of an average that has stayed, and one of the weights."""
    config = spec.config
    engine, denoiser, base = make(config, spec.base.model, PAIRS // config.micro_batch_size // config.worker_range[0])
    reader = PairReader(spec.storage, load_texts(spec.storage, spec.snapshot))
    samples.NUM_STEPS = FEW_STEPS
    assert config.ema is not None
    ema = ShardedEma(ZeroState(engine.unet), config.ema)
    held_out = load_index(spec.storage, spec.snapshot, "validation")
    of_average, of_weights = (samples.SampleGrid(held_out, reader, spec, engine, base, each) for each in (ema, None))
    grids = [of_weights.draw(0)]
    for step in range(3):
        train_step(engine, denoiser, config, step)
    grids += [of_average.draw(3), of_weights.draw(3)]
    return [np.asarray(grid) for grid in grids]


def with_and_without(spec: TrainSpec, configs: list[TrainConfig]) -> list[tuple[Trained, Trained]]:
    """With grids and without, for each configuration, in the same processes."""
    specs = [replace(spec, config=config) for config in configs]
    return [(train_and_draw(each, draws=True), train_and_draw(each, draws=False)) for each in specs]
