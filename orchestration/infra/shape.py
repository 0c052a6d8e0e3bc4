"""The node groups that a run needs, from its configuration, and a name that Kubernetes accepts.

The numbers are pod requests, and choose virtual machines. All are for SDXL at full size.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestration.config import RunConfig
from orchestration.jobs.paths import NODE_LOCAL, is_relative, local_paths
from pipelines.dataset.errors import ConfigError

GIB = 1 << 30
OBJECT_STORE_GIB = 4  # Ray Data moves units, not pixels
NCCL_GIB = 4  # shared memory of NCCL's transport between the GPUs of a node, and of torch's
HEAD_CPUS, HEAD_GIB = 4, 32  # export of SDXL needs up to 21 GB (docs/guides/cluster.md)
CPUS_A_NODE = 8
CPUS_A_GPU = 8  # decoding ahead of one encoder, or reading ahead of one training worker
GIB_A_GPU = 24  # the base model in float32 (10 GB) while it loads, batches read ahead, Python and CUDA
GIB_AN_INGEST_TASK = 0.5  # Python and Arrow, beside two shards: the one that is written and the one uploaded
CPUS_AN_INGEST_TASK = 0.66
STATE_GIB = 39  # a checkpoint of full SDXL with EMA: 16 bytes for each of 2.57e9 weights
MODEL_GIB = 30  # on disk: SDXL's weights twice, for two runs or variants
MAX_NAME = 40  # KubeRay appends up to 22 characters to a RayJob's name, and a label's value has 63
SECTIONS = ("ingest", "encode", "train")


@dataclass(frozen=True)
class Group:
    """Nodes of one kind.

    Args:
        name: head, cpu or gpu.
        min_nodes: The number of nodes that are always there.
        max_nodes: The most that the autoscaler adds.
        num_cpus: CPUs of each node.
        num_gpus: GPUs of each node.
        memory_gib: Memory of each node, /dev/shm included.
        shm_gib: Size of /dev/shm.
        scratch_gib: Disk for spilled objects, models, and checkpoints before upload.
        resources: Custom resources of Ray on each node.
    """

    name: str
    min_nodes: int
    max_nodes: int
    num_cpus: int
    memory_gib: int
    shm_gib: int
    scratch_gib: int
    num_gpus: int = 0
    resources: Mapping[str, int] = field(default_factory=dict)


def dns_name(name: str) -> str:
    """Return a run's name for Kubernetes: a-z, 0-9 and '-', at most 40; if changed, it ends with a digest."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if slug == name and len(name) <= MAX_NAME and name[0].isalpha():
        return name
    if not slug[:1].isalpha():
        slug = f"run-{slug}"
    end = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{slug[: MAX_NAME - 9].rstrip('-')}-{end}"


def check_config(config: RunConfig) -> None:
    """Check that a cluster's nodes can do this run: every stage is configured, and they see every path.

    Raises:
        ConfigError: A section is missing, or a path is local or relative.
    """
    missing = [section for section in SECTIONS if getattr(config, section) is None]
    if missing:
        raise ConfigError(
            f"the configuration has no `{'`, `'.join(missing)}`, by which the cluster is sized",
            "docs/reference/configuration.md has every section with its keys",
        )
    paths = local_paths(config)
    unseen = [f"{key} {path}" for key, path in paths.items() if key not in NODE_LOCAL]
    if unseen:
        raise ConfigError(
            f"{', '.join(unseen)}: on this machine, where the cluster's nodes cannot see it",
            "give data by URL, such as s3://bucket/mapo, and a model by URL or hub id",
        )
    relative = [f"{key} {path}" for key, path in paths.items() if is_relative(path)]
    if relative:
        raise ConfigError(f"{', '.join(relative)}: not an absolute path", "for example /cache")


def storage_kind(config: RunConfig) -> str:
    """Return the kind of the storage, s3, gcs or other, which decides how pods get its credentials."""
    scheme = config.storage.partition("://")[0]
    return {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}.get(scheme, "other")


def on_gpus(config: RunConfig) -> list[str]:
    """Return overrides that make stages wait for the autoscaler's GPU nodes; `auto` takes what is there now."""
    sections = ("encode", "train")
    return [f"{name}.device=gpu" for name in sections if getattr(config, name).device == "auto"]


def groups(config: RunConfig, *, gpus_per_node: int, cpu_nodes: int, warm: bool) -> list[Group]:
    """Return the groups of head, CPU nodes and, unless everything is configured for CPUs, GPU nodes.

    Args:
        config: A checked configuration.
        gpus_per_node: GPUs of each GPU node.
        cpu_nodes: The maximum number of CPU nodes.
        warm: Whether to keep enough GPU nodes for the minimum number of workers from the start.
    """
    head = Group("head", 1, 1, HEAD_CPUS, HEAD_GIB, OBJECT_STORE_GIB, MODEL_GIB + STATE_GIB)
    made = [head, _cpu_group(config, cpu_nodes)]
    if (most := _gpus(config)[1]) > 0:
        made.append(_gpu_group(config, gpus_per_node, least=_gpus(config)[0] if warm else 0, most=most))
    return made


def _gpus(config: RunConfig) -> tuple[int, int]:
    """Return the fewest and the most GPUs that any stage uses at a time."""
    assert config.train
    assert config.encode
    used = [section.worker_range for section in (config.train, config.encode) if section.device != "cpu"]
    if not used:
        return 0, 0
    used.append(config.evaluate.worker_range)  # samplers take a GPU where the cluster has any
    return max(low for low, _ in used), max(high for _, high in used)


def _cpu_group(config: RunConfig, max_nodes: int) -> Group:
    assert config.ingest
    assert config.train
    assert config.encode
    at_once = math.ceil(CPUS_A_NODE / CPUS_AN_INGEST_TASK)
    memory = at_once * (2 * config.ingest.max_shard_bytes / GIB + GIB_AN_INGEST_TASK) + OBJECT_STORE_GIB
    on_cpus = [s.worker_range[1] + 1 for s in (config.train, config.encode) if s.device == "cpu"]
    nodes = max(max_nodes, math.ceil(max(on_cpus, default=0) / CPUS_A_NODE))
    resources = {name: math.ceil(amount * at_once) for name, amount in config.ingest.resources.items()}
    return Group("cpu", 0, nodes, CPUS_A_NODE, _up(memory, 8), OBJECT_STORE_GIB, 60, resources=resources)


def _gpu_group(config: RunConfig, gpus: int, *, least: int, most: int) -> Group:
    assert config.train
    assert config.encode
    share = min(1.0, gpus / config.train.worker_range[0])  # of the training's state on one node, at the most
    states = 1 + (config.train.offload == "cpu")
    shm = OBJECT_STORE_GIB + NCCL_GIB
    memory = gpus * GIB_A_GPU + states * share * STATE_GIB + shm
    scratch = MODEL_GIB + 2 * share * STATE_GIB + gpus * 4  # a checkpoint that is uploaded and the next one; spilling
    resources = {name: math.ceil(amount * gpus) for name, amount in config.encode.resources.items()}
    return Group(
        "gpu", math.ceil(least / gpus), math.ceil(most / gpus), CPUS_A_GPU * gpus, _up(memory, 8), shm,
        _up(scratch, 10), gpus, resources,
    )  # fmt: skip


def _up(amount: float, step: int) -> int:
    return math.ceil(amount / step) * step
