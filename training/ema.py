"""An exponential moving average of the weights: float32, each rank its own fragments, nothing sent."""

import torch
from torch import Tensor

from training.zero import WEIGHT, Fragment, ZeroState

EMA = "ema"


class ShardedEma:
    """The average of this rank's fragments; it starts as the weights.

    average <- decay * average + (1 - decay) * weights, after each optimizer step.
    """

    def __init__(self, state: ZeroState, decay: float) -> None:
        self._state, self._decay = state, decay
        self._average = {fragment: view.clone() for fragment, view in state.views(WEIGHT)}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of a finished step in."""
        averages, weights = [], []
        for fragment, view in self._state.views(WEIGHT):
            averages.append(self._average[fragment])
            weights.append(view)
        torch._foreach_lerp_(averages, weights, 1.0 - self._decay)

    def fragments(self) -> dict[Fragment, Tensor]:
        """The average by fragment; float32 vectors."""
        return self._average

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take what `fragments` gave, by the names of the parameters."""
        for fragment, average in self._average.items():
            average.copy_(tensors[fragment.name])
