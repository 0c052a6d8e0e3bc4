"""The base class of every configuration section: frozen, typed, and strict about its keys."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveFloat

RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Config(BaseModel):
    """A configuration section. Unknown keys are errors; a default lives on its field and nowhere else."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def _workers(value: object) -> object:
    """Check that the value is a number, or a range such as `2..8`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    match = RANGE.fullmatch(value.replace(" ", "")) if isinstance(value, str) else None
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError("write a number of workers, such as 4, or a range, such as 2..8")
    return match[0]


WorkerCount = Annotated[int | str, BeforeValidator(_workers)]
"""A number of workers, or a range such as `2..8` for as many of these as fit."""


Device = Literal["auto", "cpu", "gpu"]
"""What workers run on: `auto` takes GPUs if the cluster has any at that moment; `gpu` may wait for an autoscaler."""

Resources = dict[str, PositiveFloat]
"""Custom Ray resources by name: work that requests them runs only on nodes that have them."""


def worker_range(workers: int | str) -> tuple[int, int]:
    """Return the smallest and the largest number of workers of a `WorkerCount`."""
    if isinstance(workers, int):
        return workers, workers
    low, high = workers.split("..")
    return int(low), int(high)
