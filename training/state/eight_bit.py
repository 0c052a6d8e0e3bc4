"""Conversion of bitsandbytes' 8-bit AdamW states to float32 and back, so that checkpoints contain float32 only.

A moment is stored as an 8-bit code times the largest magnitude of its block. As float32 it fits any number of ranks;
with the magnitudes stored next to it, the same number of ranks gets exactly the same codes back.
"""

from typing import Any

import torch
from torch import Tensor

States = dict[str, Any]
"""The optimizer's state of one flat partition, by bitsandbytes' names."""

STATES = {"exp_avg": ("state1", "qmap1", "absmax1"), "exp_avg_sq": ("state2", "qmap2", "absmax2")}


def is_eight_bit(optimizer: Any) -> bool:
    """Return whether this optimizer's states have 8 bits."""
    return type(optimizer).__module__.startswith("bitsandbytes")


def create(optimizer: Any, flat: Tensor, num_steps: int) -> States:
    """Create empty states for a flat partition, as the first step would make them."""
    group = next(each for each in optimizer.param_groups)
    if not optimizer.state[flat]:
        optimizer.init_state(group, flat, 0, 0)
    state: States = optimizer.state[flat]
    state["step"] = num_steps
    return state


def magnitudes(state: States, kind: str) -> Tensor | None:
    """Return the largest magnitude of each block, float32; None for a partition that is too small for 8 bits."""
    code, _, absmax = STATES[kind]
    return state[absmax] if state[code].dtype == torch.uint8 else None


def unpack(state: States, kind: str) -> Tensor:
    """Return a moment as a float32 vector."""
    code, values, _ = STATES[kind]
    scales = magnitudes(state, kind)
    if scales is None:
        return torch.as_tensor(state[code])
    relative: Tensor = state[values][state[code].long()]
    return relative * _each(scales, relative.numel())


def pack(state: States, kind: str, moment: Tensor, scales: Tensor | None) -> None:
    """Store a float32 moment.

    Args:
        state: From `create`.
        kind: A key of STATES.
        moment: From `unpack`.
        scales: From `magnitudes`; None if another number of ranks wrote them: then computed from the moment.
    """
    code, values, absmax = STATES[kind]
    moment = moment.to(state[code].device)
    if magnitudes(state, kind) is None:
        state[code].copy_(moment)
        return
    if scales is None:
        block = _block(state[absmax].numel(), moment.numel())
        padded = torch.nn.functional.pad(moment.abs(), (0, state[absmax].numel() * block - moment.numel()))
        scales = padded.view(-1, block).amax(dim=1)
    state[absmax].copy_(scales)
    relative = moment / _each(state[absmax], moment.numel()).clamp(min=torch.finfo(torch.float32).tiny)
    borders = (state[values][1:] + state[values][:-1]) / 2  # the codes' values are in order
    state[code].copy_(torch.bucketize(relative, borders).to(torch.uint8))


def _block(num_scales: int, numel: int) -> int:
    """Return the elements of a block: a power of two."""
    return 1 << (-(-numel // num_scales) - 1).bit_length()


def _each(scales: Tensor, numel: int) -> Tensor:
    return scales.repeat_interleave(_block(scales.numel(), numel))[:numel]
