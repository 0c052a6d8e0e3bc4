"""Prodigy, whose step size is estimated from the weights of all ranks together.

The package `prodigyopt` would estimate from this rank's partition alone, or on CUDA devices only
(docs/decisions/0023-optimizers-over-ranks.md has the measurements).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from training.optimizers.partition import Fragment, Partition, sum_over_ranks

BETA1, BETA2 = 0.9, 0.999
BETA3 = math.sqrt(BETA2)
EPS = 1e-8
SCALARS = ("d", "d_max", "d_numerator")
CHUNK = 1 << 24
"""Elements to work on at a time, so that intermediate values take little memory."""


class Prodigy(torch.optim.Optimizer):
    """Adam in units of d, an estimate of the distance from the first weights p0 to good ones.

        n <- beta3 n + (d / d0) d rate <g, p0 - p>          s <- beta3 s + (d / d0) d g
        m <- beta1 m + (1 - beta1) d g                      v <- beta2 v + (1 - beta2) d^2 g^2
        d' = min(growth_rate d, the largest d_coef n / |s|_1 so far)
        p <- p - d rate (m / (sqrt(v) + d' eps) + weight_decay p)

    `rate` is `lr` with Adam's bias correction, and d' is the next step's d. <g, p0 - p> and |s|_1 are sums over the
    weights of all ranks, so every rank has the same d. Source: Mishchenko and Defazio, arXiv 2306.06101, with what
    prodigyopt's README recommends for diffusion models (`use_bias_correction`, `safeguard_warmup`, decoupled decay).

    Args:
        parameters: The weights. Under ZeRO, this rank's one flat partition takes their place.
        lr: Factor of d; 1 takes the estimate as it is.
        weight_decay: Decoupled weight decay.
        d_coef: Factor of the estimate: above 1 for larger steps.
        d0: The first d.
        growth_rate: The largest factor by which d grows in a step; None for any.
        device: What the ranks communicate on.
    """

    kinds = ("exp_avg", "exp_avg_sq", "s", "p0")
    """States of each weight."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float = 0.0,
        d_coef: float = 1.0,
        d0: float = 1e-6,
        growth_rate: float | None = None,
        device: torch.device,
    ) -> None:
        scalars = {"d": d0, "d_max": d0, "d_numerator": 0.0}
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, **scalars})
        self._d_coef, self._d0, self._growth_rate, self._device = d_coef, d0, growth_rate or math.inf, device

    def bind(self, partition: Partition) -> None:
        """Check that DeepSpeed steps on all weights at once."""
        assert len(partition.flats()) == 1, "d would be estimated from a part of the weights at a time"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights; collective."""
        (group,) = self.param_groups
        flats = [flat for flat in group["params"] if flat.grad is not None]
        for flat in flats:
            if not self.state[flat]:
                self.create(flat, num_steps=0)
        if not flats:
            return
        d, num_steps = group["d"], self.state[flats[0]]["step"]
        rate = d * group["lr"] * math.sqrt(1 - BETA2 ** (num_steps + 1)) / (1 - BETA1 ** (num_steps + 1))
        along, norm = self._accumulate(flats, d)
        if norm == 0:
            return  # all gradients so far were zero
        group["d_numerator"] = BETA3 * group["d_numerator"] + d / self._d0 * rate * along
        self._estimate(group, norm)
        for flat in flats:
            self.state[flat]["step"] += 1
            for weight, _, state in self._chunks(flat):
                root = state["exp_avg_sq"].sqrt().add_(group["d"] * EPS)
                weight.add_(weight, alpha=-group["weight_decay"] * rate)  # a factor near 1 would be rounded more
                weight.addcdiv_(state["exp_avg"], root, value=-rate)

    def _accumulate(self, flats: list[Tensor], d: float) -> tuple[float, float]:
        """Update the states; return <g, p0 - p> and |s|_1 over all ranks."""
        sums = torch.zeros(2, dtype=torch.float64, device=flats[0].device)
        for flat in flats:
            for weight, grad, state in self._chunks(flat):
                sums[0] += (state["p0"] - weight).mul_(grad).sum(dtype=torch.float64)
                state["exp_avg"].mul_(BETA1).add_(grad, alpha=d * (1 - BETA1))
                state["exp_avg_sq"].mul_(BETA2).addcmul_(grad, grad, value=d * d * (1 - BETA2))
                state["s"].mul_(BETA3).add_(grad, alpha=d / self._d0 * d)
                sums[1] += state["s"].abs().sum(dtype=torch.float64)
        along, norm = sum_over_ranks(sums, self._device).tolist()
        return along, norm

    def _estimate(self, group: dict[str, Any], norm: float) -> None:
        estimate = self._d_coef * group["d_numerator"] / norm
        d = max(group["d"], estimate) if group["d"] == self._d0 else group["d"]
        group["d_max"] = max(group["d_max"], estimate)
        group["d"] = min(group["d_max"], d * self._growth_rate)

    def _chunks(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Yield parts of the weights with their gradients and states, all of them views."""
        assert flat.grad is not None
        cut = [values.view(-1).split(CHUNK) for values in (flat, flat.grad, *(self.state[flat][k] for k in self.kinds))]
        for weight, grad, *states in zip(*cut, strict=True):
            yield weight, grad, dict(zip(self.kinds, states, strict=True))

    # The state, as checkpoints know it.

    def create(self, flat: Tensor, num_steps: int) -> None:
        """Create the states of a flat partition, as its first step would; existing ones stay, except for the count."""
        state = self.state[flat]
        for kind in self.kinds:
            if kind not in state:
                state[kind] = flat.detach().clone() if kind == "p0" else torch.zeros_like(flat)
        state["step"] = num_steps

    def scalars(self) -> dict[str, float]:
        """Return the states that are no tensors."""
        return {name: self.param_groups[0][name] for name in SCALARS}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Load the output of `scalars`."""
        self.param_groups[0].update({name: scalars[name] for name in SCALARS})

    def factors(self) -> Iterator[tuple[str, Fragment, Tensor]]:
        """Yield the states that are not of single weights: none."""
        yield from ()

    def wanted_factors(self) -> list[tuple[str, Fragment]]:
        """Return what `load_factors` needs: nothing."""
        return []

    def load_factors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load the output of `factors`."""
