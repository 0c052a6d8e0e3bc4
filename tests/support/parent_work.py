"""What the ranks of the parent's tests do: start an engine from a parent's weights, and step."""

from typing import Any

import torch
from engine_work import PAIRS, make, train_step

from pipelines.dataset.errors import MapoError
from training.spec import TrainSpec
from training.state.ema import ShardedEma
from training.state.parent import start_from_parent
from training.state.zero import KINDS, ZeroState


def started(specs: list[TrainSpec], num_steps: int) -> list[dict[str, Any]]:
    """For each spec this rank's fragments after the start, and then the curve; or the error's text."""
    found = []
    for spec in specs:
        config = spec.config
        ranks = config.worker_range[0]
        engine, denoiser, _ = make(config, spec.base.model, PAIRS // config.micro_batch_size // ranks)
        state = ZeroState(engine.unet)
        ema = ShardedEma(state, config.ema) if config.ema else None
        try:
            if spec.parent is not None:
                start_from_parent(spec, engine.unet.module, state, ema)
        except MapoError as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
            continue
        kinds = KINDS if spec.parent is not None else ()  # AdamW has no moments yet where nothing was loaded
        parts = {kind: [(part, view.detach().clone()) for part, view in state.views(kind)] for kind in kinds}
        average = [] if ema is None else [(part, view.clone()) for part, view in ema.fragments().items()]
        computing = {}
        if config.zero_stage < 3:
            computing = {name: weight.detach().clone() for name, weight in engine.unet.module.named_parameters()}
        curve = [train_step(engine, denoiser, config, step) for step in range(num_steps)]
        found.append(
            {"parts": parts, "ema": average, "computing": computing, "curve": curve, "steps": state.num_steps()}
        )
    return found


def tiles(fragments: list[Any]) -> dict[str, torch.Tensor]:
    """Whole parameters, flat, of the fragments of all ranks."""
    whole: dict[str, torch.Tensor] = {}
    for part, view in fragments:
        size = int(torch.tensor(part.shape).prod()) if part.shape else 1
        whole.setdefault(part.name, torch.full((size,), float("nan")))[part.start : part.start + part.numel] = view
    return whole
