"""The sharded state of a DeepSpeed ZeRO engine, as named fragments of parameters.

With the names of `training.optimizers.partition.Fragment`, any set of ranks can read what another set wrote: the
fragments of all ranks tile every parameter. DeepSpeed's own checkpoints cannot change the world size, and its
Universal Checkpoint is an offline conversion that does not go between stages 2 and 3
(docs/decisions/0013-checkpoints-of-fragments.md).
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from training.optimizers.adafactor import Adafactor
from training.optimizers.partition import Fragment, Partition
from training.optimizers.prodigy import Prodigy
from training.state import eight_bit

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""Kinds of AdamW; `ZeroState.kinds` has those of the engine's optimizer."""
SCALE = "{}_scale"
"""Kind of the magnitudes of an 8-bit moment, by blocks of a rank's flat partition: only usable by as many ranks."""
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The state of DeepSpeed's dynamic loss scaler."""


Tensors = Mapping[str, Mapping[str, Tensor]]
"""Kind -> name of the parameter -> this rank's fragment."""


class ZeroState:
    """This rank's fragments of float32 weights and of the optimizer's states.

    Args:
        engine: DeepSpeed's engine, around the UNet.
    """

    def __init__(self, engine: Any) -> None:
        self._partition, self._zero = Partition(engine), engine.optimizer
        self.stage = self._partition.stage
        optimizer = self._zero.optimizer
        self._is_eight_bit = eight_bit.is_eight_bit(optimizer)
        self._over_ranks = optimizer if isinstance(optimizer, Prodigy | Adafactor) else None
        self._owned = self._partition.owned()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of values of each weight: the weight itself, and the optimizer's states."""
        return KINDS if self._over_ranks is None else (WEIGHT, *self._over_ranks.kinds)

    @property
    def fragments(self) -> list[Fragment]:
        """The fragments that this rank owns, in the order of the parameters."""
        return [fragment for fragment, _ in self._owned]

    def views(self, kind: str) -> Iterator[tuple[Fragment, Tensor]]:
        """Yield the fragments of one of `kinds`: float32 vectors, the engine's memory unless on NVMe or of 8 bits."""
        if kind != WEIGHT and not self.num_steps():
            self._create_states(0)  # an optimizer makes them at its first step; fp16 may have left out all so far
        flats = self._unpacked(kind) if self._is_eight_bit and kind in MOMENTS else None
        for group, owned in self._by_partition():
            with self._in_memory(group) as is_lent:
                found = []
                for fragment, weight in owned:
                    view = self._view(weight, kind) if flats is None else self._cut(flats, weight)
                    view = view.detach()[: fragment.numel]
                    found.append((fragment, view.clone() if is_lent else view))
            yield from found

    def model_views(self) -> Iterator[tuple[Fragment, Tensor]]:
        """Yield the weights of the forward pass by fragment: vectors in the engine's type, in its own memory."""
        for fragment, weight in self._owned:
            flat = weight.ds_tensor if self.stage == 3 else weight.detach().flatten()[fragment.start :]
            yield fragment, flat[: fragment.numel]

    def extras(self) -> Iterator[tuple[str, Fragment, Tensor]]:
        """Yield the optimizer's states that are not of single weights, by kind; nothing for AdamW."""
        if self._over_ranks is not None:
            yield from self._over_ranks.factors()
        yield from self._scales()

    def wanted_extras(self, *, of_same_ranks: bool) -> list[tuple[str, Fragment]]:
        """Return the kinds and fragments of `extras` that `load` uses, before there are any states.

        Args:
            of_same_ranks: Whether as many ranks, with the same stage, wrote the checkpoint.
        """
        if self._over_ranks is not None:
            return self._over_ranks.wanted_factors()
        if not (of_same_ranks and self._is_eight_bit):
            return []
        self._create_states(0)
        return [(kind, fragment) for kind, fragment, _ in self._scales()]

    def scalars(self) -> dict[str, float]:
        """Return the optimizer's states that are numbers, beside the number of steps; nothing for AdamW."""
        return {} if self._over_ranks is None else self._over_ranks.scalars()

    def _scales(self) -> Iterator[tuple[str, Fragment, Tensor]]:
        """Yield the magnitudes of 8-bit moments by kind; nothing for other moments."""
        for kind in MOMENTS if self._is_eight_bit else ():
            for i, flat in enumerate(self._partition.flats()):
                found = eight_bit.magnitudes(self._zero.optimizer.state[flat], kind)
                if found is not None:
                    yield SCALE.format(kind), self._scale_fragment(i, found.numel()), found

    def num_steps(self) -> int:
        """Return the number of steps that the optimizer counts for its bias correction, without skipped ones."""
        states = [state for state in self._zero.optimizer.state.values() if "step" in state]
        return int(states[0]["step"]) if states else 0

    def loss_scale(self) -> dict[str, float]:
        """Return the state of the dynamic loss scale; only `cur_scale` if it is fixed."""
        scaler = getattr(self._zero, "loss_scaler", None)
        return {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)}

    def load(
        self,
        tensors: Tensors,
        *,
        num_steps: int,
        loss_scale: Mapping[str, float],
        scalars: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Load this rank's fragments and update the weights of every rank; collective.

        Args:
            tensors: For each of `kinds`, the fragments of `fragments`; those of `wanted_extras` too.
            num_steps: From `num_steps`.
            loss_scale: From `loss_scale`.
            scalars: From `scalars`.
        """
        self._create_states(num_steps)
        by_bits = MOMENTS if self._is_eight_bit else ()
        for kind in by_bits:
            self._pack(kind, tensors)
        self._write(tensors, [kind for kind in self.kinds if kind not in by_bits])
        if self._over_ranks is not None:
            self._over_ranks.load_factors(tensors)
            self._over_ranks.load_scalars(scalars)
        for name, value in loss_scale.items():
            setattr(self._zero.loss_scaler, name, value)
        self._publish_weights()

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Load this rank's fragments of the weights alone, before the first step; collective.

        Args:
            weights: The fragments, by the names of `fragments`.
        """
        if self._over_ranks is None:  # the others make theirs at the first step: Prodigy's contain these weights
            self._create_states(0)
        self._write({WEIGHT: weights}, [WEIGHT])
        self._publish_weights()

    def exchange_weights(self, others: Mapping[Fragment, Tensor]) -> None:
        """Swap the weights with `others`, and update the weights of every rank; collective.

        The swap is exact to the bit: a second call restores everything.

        Args:
            others: A float32 vector for each of `fragments`; overwritten with the weights.
        """
        with torch.no_grad():
            for group, owned in self._by_partition():
                with self._in_memory(group, is_written=True):
                    for fragment, weight in owned:
                        kept = self._view(weight, WEIGHT).detach()[: fragment.numel].to(others[fragment], copy=True)
                        self._set(weight, WEIGHT, others[fragment])
                        others[fragment].copy_(kept)
        self._publish_weights()

    # 8-bit states

    def _scale_fragment(self, group: int, numel: int) -> Fragment:
        return Fragment(
            f"partition {group}", self._partition.rank * numel, numel, (self._partition.world_size * numel,)
        )

    def _unpacked(self, kind: str) -> list[Tensor]:
        return [eight_bit.unpack(self._zero.optimizer.state[flat], kind) for flat in self._partition.flats()]

    def _cut(self, flats: list[Tensor], weight: Any) -> Tensor:
        place = self._partition.place(weight)
        return flats[place.group].narrow(0, place.start, place.numel)

    def _pack(self, kind: str, tensors: Tensors) -> None:
        partitions = self._partition.flats()
        moments = [torch.zeros(flat.numel()) for flat in partitions]
        for fragment, weight in self._owned:
            self._cut(moments, weight)[: fragment.numel].copy_(tensors[kind][fragment.name])
        for i, (flat, moment) in enumerate(zip(partitions, moments, strict=True)):
            scales = tensors.get(SCALE.format(kind), {}).get(f"partition {i}")
            eight_bit.pack(self._zero.optimizer.state[flat], kind, moment, scales)

    # Below here is what the stages do differently.

    def _view(self, weight: Any, kind: str) -> Tensor:
        if self.stage < 3 and kind == WEIGHT:
            fragment: Tensor = weight._hp_mapping.hp_fragment
            return fragment
        place = self._partition.place(weight)
        flat: Tensor = self._partition.flats()[place.group]
        values: Tensor = flat if kind == WEIGHT else self._zero.optimizer.state[flat][kind]
        return values.narrow(0, place.start, place.numel)

    def _write(self, tensors: Tensors, kinds: list[str]) -> None:
        for group, owned in self._by_partition():
            with self._in_memory(group, is_written=True):
                for kind, (fragment, weight) in itertools.product(kinds, owned):
                    self._set(weight, kind, tensors[kind][fragment.name])

    def _set(self, weight: Any, kind: str, value: Tensor) -> None:
        view = self._view(weight, kind).detach()
        view[: value.numel()].copy_(value)
        view[value.numel() :].zero_()  # the padding of stage 3's last rank

    def _by_partition(self) -> Iterator[tuple[int, list[tuple[Fragment, Any]]]]:
        """Group this rank's fragments by stage 3's flat partition; one group in stages 1 and 2."""
        groups = itertools.groupby(
            self._owned, lambda each: self._partition.place(each[1]).group if self.stage == 3 else 0
        )
        return ((group, list(owned)) for group, owned in groups)

    @contextlib.contextmanager
    def _in_memory(self, group: int, *, is_written: bool = False) -> Iterator[bool]:
        """Bring a flat partition and its states into memory from NVMe, if they lie there; yield whether they do."""
        from deepspeed.accelerator import get_accelerator  # here: `mapo status` reads checkpoints without DeepSpeed

        zero = self._zero
        if self.stage == 3 and not get_accelerator().resolves_data_dependency():
            zero.reduce_and_partition_stream.synchronize()
        if self.stage < 3 or not zero._swappable_optimizer_subgroup(group):
            yield False
            return
        zero._optimizer_states_and_gradient_swap_in(group)
        yield True
        if is_written:
            zero._optimizer_states_and_gradient_swap_out(group)
        else:
            zero._release_swap_buffers(group)

    def _create_states(self, num_steps: int) -> None:
        """Create the states that an optimizer makes at its first step; existing ones stay, except for the count."""
        optimizer = self._zero.optimizer
        if self.stage == 3:  # which lets the optimizer see one partition at a time, and here none
            self._zero._set_fp32_optimizer_param_groups()
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for group, flat in enumerate(self._partition.flats()):
            if self._is_eight_bit:
                eight_bit.create(optimizer, flat, num_steps)
                continue
            if self._over_ranks is not None:
                self._over_ranks.create(flat, num_steps)
                continue
            with self._in_memory(group, is_written=True):
                state = optimizer.state[flat]
                for kind in MOMENTS:
                    if kind not in state and flat.numel():
                        state[kind] = torch.zeros_like(flat)
                state["step"] = torch.tensor(float(num_steps), device=flat.device if on_device else "cpu")
        if self.stage == 3:
            self._zero._clear_fp32_optimizer_param_groups()

    def _publish_weights(self) -> None:
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            with self._in_memory(group):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero._post_step([])
