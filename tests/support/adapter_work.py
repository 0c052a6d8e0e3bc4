"""What the ranks of the starting adapters' tests do: build the real worker's engine, start from the file, and step."""

from dataclasses import replace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from engine_work import PAIRS, part_of, train_step

from training.adapter_start import start_from_adapter
from training.model import load_base
from training.spec import TrainSpec
from training.state.ema import ShardedEma
from training.state.zero import WEIGHT, ZeroState
from training.worker import build


def started_from_file(specs: list[TrainSpec], num_steps: int) -> list[dict[str, Any]]:
    """For each spec this rank's fragments after the start, the errors of its first pairs before and after steps."""
    found = []
    for spec in specs:
        if torch.distributed.is_initialized():
            AcceleratorState._reset_state(reset_partial_state=False)
        config = spec.config
        base = load_base(spec.base)
        steps = PAIRS // config.micro_batch_size // config.worker_range[0]
        engine, denoiser = build(base, spec, accumulation_steps=steps, on_gpu=False)
        state = ZeroState(engine.unet)
        ema = ShardedEma(state, config.ema) if config.ema else None
        start_from_adapter(spec, engine.unet.module, state, ema)
        parts = [(part, view.detach().clone()) for part, view in state.views(WEIGHT)]
        average = [] if ema is None else [(part, view.clone()) for part, view in ema.fragments().items()]
        before = errors(denoiser)
        curve = [train_step(engine, denoiser, config, step) for step in range(num_steps)]
        found.append({"parts": parts, "ema": average, "before": before, "curve": curve, "after": errors(denoiser)})
    return found


def errors(denoiser: Any) -> dict[str, torch.Tensor]:
    """The errors of the first two pairs: of the model, and of its reference."""
    batch, noise, timesteps = part_of(0, 0, 2)
    with torch.no_grad():
        found = denoiser.errors(replace(batch), noise, timesteps)
    return {name: value for name, value in vars(found).items() if isinstance(value, torch.Tensor)}
