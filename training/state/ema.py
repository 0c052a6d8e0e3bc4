"""An exponential moving average of the weights: float32, each rank's own fragments, without communication."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from training.config import EmaConfig
from training.optimizers.partition import Fragment
from training.schedule import decay_at
from training.state.zero import WEIGHT, ZeroState

EMA = "ema"


class ShardedEma:
    """The average of this rank's fragments; it starts at the weights.

    average <- decay * average + (1 - decay) * weights, after each optimizer step, with the decay of that step.

    Args:
        state: This rank's fragments.
        config: The section `train.ema`.
    """

    def __init__(self, state: ZeroState, config: EmaConfig) -> None:
        self._state, self._config = state, config
        self._average = {fragment: view.clone() for fragment, view in state.views(WEIGHT)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights of a step that just finished.

        Args:
            step: The step's number, from 0.
        """
        averages, weights = [], []
        for fragment, view in self._state.views(WEIGHT):
            averages.append(self._average[fragment])
            weights.append(view)
        torch._foreach_lerp_(averages, weights, 1.0 - decay_at(step, self._config))

    @contextlib.contextmanager
    def in_place_of_the_weights(self) -> Iterator[None]:
        """Let the model compute with the average inside the block, and with its exact weights after it; collective.

        Needs memory for one fragment only: average and weights are swapped, twice. After an error they stay swapped,
        because this rank is ending and must not wait for the others.
        """
        self._state.exchange_weights(self._average)
        yield
        self._state.exchange_weights(self._average)

    def fragments(self) -> dict[Fragment, Tensor]:
        """Return the average by fragment; float32 vectors."""
        return self._average

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the output of `fragments`, by parameter name."""
        for fragment, average in self._average.items():
            average.copy_(tensors[fragment.name])
