"""The optimizers that `train.optimizer` can name; imports no torch. docs/decisions/0023 has the choice."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pipelines.dataset.errors import ConfigError
from training.methods import Rate


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimizer that `train.optimizer` can name.

    Args:
        summary: One line for the docs.
        state_bytes: Bytes of its states for each trained weight, beside the float32 weight; divided by the ranks.
        offloads: The values of `train.offload` that it works with.
        not_offloaded: Why it does not work with the others.
        is_over_ranks: Whether its step is of all weights of all ranks together (`training.optimizers`).
        rate: Its own default learning rate; None if the rate is the method's.
        package: The package that it needs beyond mapo's own dependencies.
        extra: The extra of mapo that brings this package.
    """

    summary: str
    state_bytes: float
    offloads: tuple[str, ...] = ("none", "cpu", "nvme")
    not_offloaded: str = ""
    is_over_ranks: bool = False
    rate: Rate | None = None
    package: str | None = None
    extra: str | None = None


OPTIMIZERS: Mapping[str, OptimizerInfo] = MappingProxyType(
    {
        "adamw": OptimizerInfo("AdamW, fused on GPUs", state_bytes=8),
        "adamw_8bit": OptimizerInfo(
            "AdamW with 8-bit states",
            state_bytes=2,
            offloads=("none",),
            not_offloaded="bitsandbytes updates its states on the GPU",
            package="bitsandbytes",
            extra="gpu",
        ),
        "adafactor": OptimizerInfo(
            "Adafactor at the given rate, without momentum, as in Diffusion-DPO's script",
            state_bytes=0.4,
            offloads=("none", "cpu"),
            is_over_ranks=True,
            not_offloaded="its states are of whole weight matrices and do not lie in the parts that DeepSpeed swaps",
        ),
        "prodigy": OptimizerInfo(
            "Prodigy, which estimates its own step size",
            state_bytes=16,
            offloads=("none", "cpu"),
            not_offloaded="it estimates its step size from all weights, of which DeepSpeed swaps in a part at a time",
            is_over_ranks=True,
            rate=Rate(1.0, "konstmish/prodigy, README.md: lr=1 for all networks"),
        ),
    }
)
"""`train.optimizer` -> the facts about it; the only list of optimizers."""


def check_offload(name: str, offload: str) -> None:
    """Check that an optimizer works with a value of `train.offload`.

    Raises:
        ConfigError: It does not; the message says why.
    """
    found = OPTIMIZERS[name]
    if offload not in found.offloads:
        others = [f"`offload: {each}`" for each in found.offloads if each != "none"]
        raise ConfigError(
            f"offload {offload} does not work with optimizer {name}: {found.not_offloaded}",
            f"use {' or '.join([*others, '`optimizer: adamw`'])}",
        )
