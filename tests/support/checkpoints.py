"""Checkpoints without training: what two ranks write, of weights that a test has made up."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipelines.dataset.storage import Storage
from training.config import LoraConfig
from training.state.checkpoint import Checkpointer
from training.state.checkpoint_format import list_checkpoints
from training.state.zero import Fragment

NUM_RANKS = 2


def write_checkpoint(
    storage: Storage,
    folder: str,
    step: int,
    weights: Mapping[str, Tensor],
    *,
    average: Mapping[str, Tensor] | None = None,
    validation_loss: float | None = None,
) -> str:
    """A checkpoint below `folder`, each rank with half of every parameter; gives its own folder."""
    options: dict[str, Any] = {"zero_stage": 2, "attempt": "0001-0123abcd", "keep": 9, "keep_best": True}
    ranks = [
        Checkpointer(storage, folder, rank=rank, world_size=NUM_RANKS, timeout_s=20, **options)
        for rank in range(NUM_RANKS)
    ]
    kinds = {"weight": weights} if average is None else {"weight": weights, "ema": average}
    for rank, checkpointer in enumerate(ranks):
        parts: dict[tuple[str, Fragment], Tensor] = {}
        for kind, named in kinds.items():
            for name, weight in named.items():
                start, end = (weight.numel() * each // NUM_RANKS for each in (rank, rank + 1))
                if start < end:
                    fragment = Fragment(name, start, end - start, tuple(weight.shape))
                    parts[kind, fragment] = weight.detach().float().flatten()[start:end]
        state = {"step": step, "validation_loss": validation_loss}
        checkpointer.save(step, parts, account={"rank": rank}, state=state)
    for checkpointer in ranks:
        checkpointer.wait()
    return next(each.folder for each in list_checkpoints(storage, folder) if each.step == step)


def trained_weights(pipeline: Any) -> dict[str, Tensor]:
    """All parameters of a pipeline's UNet: of another seed than the base's, they are what training made."""
    return {name: weight.detach().clone() for name, weight in pipeline.unet.named_parameters()}


def trained_adapters(pipeline: Any, lora: LoraConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Adapters that change what the UNet predicts; the pipeline's UNet keeps them."""
    from training.model import add_lora

    add_lora(pipeline.unet, lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    named = {name: weight for name, weight in pipeline.unet.named_parameters() if weight.requires_grad}
    return {name: 0.3 * torch.randn(weight.shape, generator=generator) for name, weight in named.items()}
