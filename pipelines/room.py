"""How much of the cluster a stage may use: what it runs on, and the nodes that its custom resources keep it to."""

from collections.abc import Mapping

from pipelines.dataset.config import Device


def total_of(resource: str, needed: Mapping[str, float]) -> float:
    """CPU or GPU of all living nodes that have every custom resource in `needed`."""
    import ray

    nodes = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return float(sum(node.get(resource, 0) for node in nodes if all(name in node for name in needed)))


def no_room(stage: str, resource: str, needed: Mapping[str, float]) -> str | None:
    """A line for the user where no living node has this: Ray waits, for an autoscaler's node or for one that is added.

    Args:
        stage: What asks for it.
        resource: `CPU` or `GPU`.
        needed: Custom resources that the same node must have.
    """
    if total_of(resource, needed):
        return None
    return f"{stage}: no node of the cluster has {' and '.join([resource, *needed])}; it waits for one"


def uses_gpu(device: Device) -> bool:
    """Whether workers ask for a GPU; `auto` looks at what the cluster has now."""
    return device == "gpu" or (device == "auto" and total_of("GPU", {}) >= 1)
