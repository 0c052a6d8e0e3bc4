"""Where the parameters lie in the flat partitions that DeepSpeed's ZeRO gives a rank, and sums over all ranks.

Whatever the stage and the world size, a rank owns contiguous parts of flattened parameters: a *fragment* is
`[start, start + numel)` of one. The fragments of all ranks tile every parameter.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """A part of one trained parameter: `numel` elements from `start`, of a parameter of this shape."""

    name: str
    start: int
    numel: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a fragment lies: which flat partition of this rank, from where, how many elements with padding."""

    group: int
    start: int
    numel: int


class Partition:
    """The trained parameters of an engine, and this rank's part of each.

    Args:
        engine: DeepSpeed's engine, around the UNet.
    """

    def __init__(self, engine: Any) -> None:
        self.zero = engine.optimizer
        self.stage = int(engine.zero_optimization_stage())
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.trained = [(name, weight) for name, weight in engine.module.named_parameters() if weight.requires_grad]

    def owned(self) -> list[tuple[Fragment, Any]]:
        """Return this rank's fragments with their parameters, in the order of the parameters; none is empty."""
        found = [(self.fragment(name, weight), weight) for name, weight in self.trained]
        return [(fragment, weight) for fragment, weight in found if fragment.numel]

    def fragment(self, name: str, weight: Any) -> Fragment:
        """Return this rank's part of a parameter; it may be empty."""
        if self.stage == 3:
            shape, share = tuple(weight.ds_shape), weight.ds_tensor.numel()  # the last rank's share has padding
            start = min(share * self.rank, weight.ds_numel)
            return Fragment(name, start, min(share, weight.ds_numel - start), shape)
        shape = tuple(weight.shape)
        if weight._hp_mapping is None:
            return Fragment(name, 0, 0, shape)
        address = weight._hp_mapping.lp_fragment_address
        return Fragment(name, int(address.start), int(address.numel), shape)

    def place(self, weight: Any) -> Place:
        """Return where this rank's part of a parameter lies."""
        if self.stage == 3:
            group, start, numel = self.zero.grad_position[self.zero.get_param_id(weight)]
            return Place(int(group), int(start), int(numel))
        address = weight._hp_mapping.get_hp_fragment_address()
        return Place(int(weight._hp_mapping.param_group_index), int(address.start), int(address.numel))

    def flats(self) -> list[Any]:
        """Return the flat partitions of float32 weights that the optimizer steps on."""
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        if hasattr(self.zero, "fp32_groups_flat_partition"):  # BF16_Optimizer: stage 1 that adds up in float32
            return list(self.zero.fp32_groups_flat_partition)
        return list(self.zero.single_partition_of_fp32_groups)


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Return the sum over ranks, on the device of `values`; collective.

    Args:
        values: Of one shape on all ranks.
        device: What the ranks communicate on: of NCCL the GPU, even if the optimizer works on the CPU.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    summed = values.to(device, copy=True)
    torch.distributed.all_reduce(summed)
    return summed.to(values.device)
