"""The part of the cluster that a stage may use: devices, and the nodes that have its custom resources."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.dataset.config import Device

RayOptions = dict[str, Any]
"""Keyword arguments of `ray.remote` and `map_batches` for the resources of a worker."""


def total_of(resource: str, needed: Mapping[str, float]) -> float:
    """Return the CPUs or GPUs of all live nodes that have every custom resource in `needed`."""
    return float(sum(node.get(resource, 0) for node in nodes() if all(name in node for name in needed)))


@dataclass(frozen=True)
class Demand:
    """The resources that one worker requests from Ray.

    Args:
        resource: The resource it computes on (CPU or GPU).
        also: Further resources on the same node: custom ones, `CPU`, or `memory` in bytes.
        amount: How much of `resource` it requests: 1, or a part of a GPU.
    """

    resource: Literal["CPU", "GPU"]
    also: Mapping[str, float] = field(default_factory=dict)
    amount: float = 1.0

    def __str__(self) -> str:
        return " and ".join([f"a {self.resource}", *(name for name in self.also if name not in ("CPU", "memory"))])

    @property
    def needed(self) -> dict[str, float]:
        """All resources by Ray's names."""
        return {self.resource: self.amount, **self.also}

    def has_node(self) -> bool:
        """Return whether a live node has all the resources, free or not."""
        return self.places(nodes()) > 0

    def is_free(self) -> bool:
        """Return whether a live node has all the resources free now, as far as the driver knows."""
        from ray._private.state import available_resources_per_node

        return self.places(available_resources_per_node().values()) > 0

    def places(self, having: Iterable[Mapping[str, float]]) -> int:
        """Return how many such workers fit on nodes with these resources."""
        return sum(
            min(math.floor(node.get(name, 0.0) / amount) for name, amount in self.needed.items()) for node in having
        )

    def options(self) -> RayOptions:
        """Return the demand as options of `ray.remote`."""
        names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        found: RayOptions = {"num_cpus": 0, "num_gpus": 0}
        found |= {names[name]: amount for name, amount in self.needed.items() if name in names}
        return found | {"resources": {name: amount for name, amount in self.also.items() if name not in names}}


def nodes() -> list[dict[str, float]]:
    """Return the total resources of each live node."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def uses_gpu(device: Device) -> bool:
    """Return whether workers request a GPU; `auto` depends on what the cluster has now."""
    return device == "gpu" or (device == "auto" and total_of("GPU", {}) >= 1)
