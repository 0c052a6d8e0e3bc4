"""The sharded state of a DeepSpeed ZeRO engine, as named fragments of parameters.

Whatever the stage and the world size, a rank owns contiguous parts of flattened parameters: a *fragment* is
`[start, start + numel)` of one. Named so, what one set of ranks wrote another set can read: fragments of all ranks
tile every parameter. DeepSpeed's own checkpoints cannot change the world size, and its Universal Checkpoint is an
offline conversion that does not go between stages 2 and 3 (docs/decisions/0013).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scaler remembers."""


@dataclass(frozen=True)
class Fragment:
    """A part of one trained parameter: `numel` elements from `start`, of a parameter of this shape."""

    name: str
    start: int
    numel: int
    shape: tuple[int, ...]


class ZeroState:
    """This rank's fragments of float32 weights and AdamW moments.

    Args:
        engine: DeepSpeed's engine, around the UNet.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        trained = [(name, weight) for name, weight in engine.module.named_parameters() if weight.requires_grad]
        self._owned = [(self._fragment(name, weight), weight) for name, weight in trained]
        self._owned = [(fragment, weight) for fragment, weight in self._owned if fragment.numel]

    @property
    def fragments(self) -> list[Fragment]:
        """What this rank owns, in the order of the parameters."""
        return [fragment for fragment, _ in self._owned]

    def views(self, kind: str) -> Iterator[tuple[Fragment, Tensor]]:
        """The fragments of one of KINDS: float32 vectors that share the engine's memory, unless it is offloaded."""
        for fragment, weight in self._owned:
            yield fragment, self._view(weight, kind).detach()[: fragment.numel]

    def num_steps(self) -> int:
        """Steps that AdamW has counted for its bias correction; skipped ones are not among them."""
        states = [state for state in self._zero.optimizer.state.values() if "step" in state]
        return int(states[0]["step"]) if states else 0

    def loss_scale(self) -> dict[str, float]:
        """The state of the dynamic loss scale; only `cur_scale` where it is fixed."""
        scaler = getattr(self._zero, "loss_scaler", None)
        return {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)}

    def load(self, tensors: dict[str, dict[str, Tensor]], *, num_steps: int, loss_scale: dict[str, float]) -> None:
        """Take this rank's fragments and give every rank the weights that they make; collective.

        Args:
            tensors: For each of KINDS, the fragments of `fragments` by name.
            num_steps: From `num_steps`.
            loss_scale: From `loss_scale`.
        """
        self._create_moments(num_steps)
        for kind in KINDS:
            for fragment, weight in self._owned:
                self._set(weight, kind, tensors[kind][fragment.name])
        for name, value in loss_scale.items():
            setattr(self._zero.loss_scaler, name, value)
        self._publish_weights()

    # Below here is what the stages do differently.

    def _fragment(self, name: str, weight: Any) -> Fragment:
        if self._stage == 3:
            shape, share = tuple(weight.ds_shape), weight.ds_tensor.numel()  # the last rank's share has padding
            start = min(share * torch.distributed.get_rank(), weight.ds_numel)
            return Fragment(name, start, min(share, weight.ds_numel - start), shape)
        shape = tuple(weight.shape)
        if weight._hp_mapping is None:
            return Fragment(name, 0, 0, shape)
        address = weight._hp_mapping.lp_fragment_address
        return Fragment(name, int(address.start), int(address.numel), shape)

    def _view(self, weight: Any, kind: str) -> Tensor:
        if self._stage == 3:
            view: Tensor = self._zero.get_local_fp32_param(weight, None if kind == WEIGHT else kind)
            return view
        mapping = weight._hp_mapping
        if kind == WEIGHT:
            weights: Tensor = mapping.hp_fragment
            return weights
        flat = self._flat_partitions()[mapping.param_group_index]
        address = mapping.get_hp_fragment_address()
        moments: Tensor = self._zero.optimizer.state[flat][kind]
        return moments.narrow(0, address.start, address.numel)

    def _set(self, weight: Any, kind: str, value: Tensor) -> None:
        if self._stage < 3:
            self._view(weight, kind).detach().copy_(value)
            return
        padded = torch.zeros(weight.ds_tensor.numel())
        padded[: value.numel()] = value
        self._zero.set_local_hp_param(padded, weight, None if kind == WEIGHT else kind)

    def _flat_partitions(self) -> list[Any]:
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        if hasattr(self._zero, "fp32_groups_flat_partition"):  # BF16_Optimizer: stage 1 that adds up in float32
            return list(self._zero.fp32_groups_flat_partition)
        return list(self._zero.single_partition_of_fp32_groups)

    def _create_moments(self, num_steps: int) -> None:
        """AdamW makes its states at its first step; a resumed one needs them before."""
        on_device = any(group.get("fused") or group.get("capturable") for group in self._zero.optimizer.param_groups)
        for flat in self._flat_partitions():
            state = self._zero.optimizer.state[flat]
            for kind in MOMENTS:
                if kind not in state and flat.numel():
                    state[kind] = torch.zeros_like(flat)
            state["step"] = torch.tensor(float(num_steps), device=flat.device if on_device else "cpu")

    def _publish_weights(self) -> None:
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero._post_step([])
