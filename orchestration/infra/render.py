"""Render a target's files from a configuration and the templates next to this file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2
import yaml

from orchestration import __version__
from orchestration.config import RunConfig, parse_config, read_text
from orchestration.infra import machines
from orchestration.infra.shape import GIB, OBJECT_STORE_GIB, check_config, dns_name, groups, on_gpus, storage_kind
from orchestration.jobs.submit import STOP_WAIT_S, STOP_WAIT_VARIABLE
from pipelines.dataset.errors import ConfigError
from training.tracking.backends import extras_of

TEMPLATES = Path(__file__).parent
RAY_VERSION = "2.60.0"
"""The version in the image, the manifests and constraints.txt; a test keeps them equal."""
CONFIG_FILE = "/etc/mapo/run.yaml"
TOKEN_KEY = "auth_token"  # noqa: S105 (a key of a Secret, as KubeRay has it)
OFFLOAD_GIB = 100
EXTRAS = {"s3": "s3", "gcs": "gcs", "other": None}
COMMON = ("accounts.yaml", "config.yaml", "network.yaml", "disruption.yaml")

FILES: dict[str, tuple[str, ...]] = {
    "kuberay": tuple(f"base/{name}" for name in ("kustomization.yaml", *COMMON, "rayjob.yaml"))
    + tuple(f"overlays/{kind}/{name}" for kind in ("s3", "gcs") for name in ("kustomization.yaml", "credentials.yaml")),
    "kuberay-cluster": ("cluster.yaml",),
    "kuberay-cron": ("cron.yaml",),
    "aws": ("cluster.yaml",),
    "gcp": ("cluster.yaml",),
    "skypilot": ("task.yaml",),
    "docker": ("Dockerfile", "Dockerfile.dockerignore"),
}
"""The files of each target's folder."""
STREAMS: dict[str, tuple[str, ...]] = {
    "kuberay": (*(f"kuberay/base/{name}" for name in COMMON), "kuberay/base/rayjob.yaml"),
    "kuberay-cluster": (*(f"kuberay/base/{name}" for name in COMMON), "kuberay/raycluster.yaml"),
    "kuberay-cron": (*(f"kuberay/base/{name}" for name in COMMON), "kuberay/cron.yaml"),
    "aws": ("aws/cluster.yaml",),
    "gcp": ("gcp/cluster.yaml",),
    "skypilot": ("skypilot/task.yaml",),
    "docker": ("docker/Dockerfile",),
}
"""The templates that make up the stream to stdout of each target."""


@dataclass(frozen=True)
class Settings:
    """The options of the command: facts about the cluster that the configuration does not contain.

    Args:
        image: The container image, built from infra/docker.
        namespace: The Kubernetes namespace; it must exist.
        operator_namespace: The namespace of KubeRay's operator.
        gpus_per_node: GPUs of each GPU node.
        cpu_nodes: The maximum number of CPU nodes.
        accelerator: The kind of GPU, in GKE's spelling.
        node_selector: Labels that GPU nodes must have.
        secret: A Secret whose keys become the environment of all Ray pods.
        identity: The cloud's identity for pods or machines; without one, keys from a Secret.
        queue: A Kueue queue.
        redis: host:port for the head's state.
        schedule: When a new round starts, as a cron expression.
        region: The AWS or GCP region.
        project: The GCP project.
        spot: Whether CPU nodes are spot machines.
        warm: Whether to keep GPU nodes from the start.
    """

    image: str = f"mapo:{__version__}"
    namespace: str = "mapo"
    operator_namespace: str = "kuberay-system"
    gpus_per_node: int = 8
    cpu_nodes: int = 8
    accelerator: str = "nvidia-h100-80gb"
    node_selector: Mapping[str, str] | None = None
    secret: str | None = None
    identity: str | None = None
    queue: str | None = None
    redis: str | None = None
    schedule: str = "0 3 * * 1"
    region: str | None = None
    project: str | None = None
    spot: bool = False
    warm: bool = False


@dataclass(frozen=True)
class Volume:
    """A folder on each node's own disk.

    Args:
        name: The volume's name.
        path: Where it is mounted.
        gib: Its size.
    """

    name: str
    path: str
    gib: int


def render_files(file: str | Path, overrides: Sequence[str], target: str, settings: Settings) -> dict[str, str]:
    """Render the files of a target's folder, by name.

    Raises:
        ConfigError: The configuration is wrong, or a cluster's nodes could not run it.
    """
    facts = _facts(file, overrides, target, settings)
    if target == "kuberay":
        return {name: _fill(f"kuberay/{name}", {**facts, "credentials": "none"}) for name in FILES[target]}
    if target == "docker":
        return {name: _fill(f"docker/{name}", facts) for name in FILES[target]}
    return {FILES[target][0]: render_stream(file, overrides, target, settings)}


def render_stream(file: str | Path, overrides: Sequence[str], target: str, settings: Settings) -> str:
    """Render a target as one text, for `kubectl apply -f -` or the target's own command.

    Raises:
        ConfigError: See `render_files`.
    """
    facts = _facts(file, overrides, target, settings)
    return "---\n".join(_fill(template, facts) for template in STREAMS[target])


def _facts(file: str | Path, overrides: Sequence[str], target: str, settings: Settings) -> dict[str, object]:
    """Return everything that the templates refer to."""
    text = read_text(file)
    config = parse_config(text, overrides, source=str(file))
    check_config(config)
    _check(config, target, settings)
    config = parse_config(text, [*overrides, *on_gpus(config)], source=str(file))
    made = groups(
        config,
        gpus_per_node=settings.gpus_per_node,
        cpu_nodes=settings.cpu_nodes,
        warm=settings.warm or settings.queue is not None,
    )
    kind = storage_kind(config)
    region = settings.region or {"aws": "us-east-1", "gcp": "us-central1"}.get(target)
    name = dns_name(config.name)
    return {
        "name": name,
        "run": config,
        "settings": settings,
        "groups": made,
        "group": {each.name: each for each in made},
        "credentials": kind,
        "region": region,
        "config_text": yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False),
        "config_file": CONFIG_FILE,
        "volumes": _volumes(config),
        "ray_version": RAY_VERSION,
        "object_store_bytes": OBJECT_STORE_GIB * GIB,
        "stop_wait": {STOP_WAIT_VARIABLE: str(STOP_WAIT_S)},
        "stop_wait_s": STOP_WAIT_S,
        "token_key": TOKEN_KEY,
        "extras": _extras(config),
        "secrets": _secrets(name, kind, target, settings),
        **_machines(target, settings, has_gpus=len(made) > 2),
    }


def _check(config: RunConfig, target: str, settings: Settings) -> None:
    """Check the options against each other and the target.

    Raises:
        ConfigError: Two options exclude each other, or one is missing.
    """
    for option, least in (("gpus-per-node", 1), ("cpu-nodes", 1)):
        if (given := getattr(settings, option.replace("-", "_"))) < least:
            raise ConfigError(f"--{option} {given}: at least {least}")
    if target == "gcp" and settings.project is None:
        raise ConfigError("--target gcp needs --project", "for example `--project vision-1234`")
    if target == "kuberay-cron" and len(settings.schedule.split()) != 5:
        raise ConfigError(
            f"--schedule {settings.schedule}: not a cron expression of five fields",
            'for example `--schedule "0 3 * * 1"`',
        )
    if settings.queue and target == "kuberay-cluster":
        raise ConfigError("--queue works only for jobs, not for a cluster that stays", "use `--target kuberay`")


def _volumes(config: RunConfig) -> list[Volume]:
    """List the folders on the nodes' own disks that the configuration names."""
    train = config.train
    assert train
    found: list[Volume] = []
    if train.cache_dir:
        found.append(Volume("cache", train.cache_dir, math.ceil(train.max_cache_bytes / GIB)))
    if train.offload_path:
        found.append(Volume("offload", train.offload_path, OFFLOAD_GIB))
    return found


def _extras(config: RunConfig) -> str:
    """Return the extras of the package that the image needs for this configuration."""
    assert config.train
    wanted = {"gpu", EXTRAS[storage_kind(config)], *extras_of(config.train.trackers)}
    sources = config.ingest.sources if config.ingest else ()
    wanted |= {"s3" for source in sources if source.path.startswith("s3://")}
    wanted |= {"gcs" for source in sources if source.path.startswith(("gs://", "gcs://"))}
    return ",".join(sorted(extra for extra in wanted if extra))


def _secrets(name: str, kind: str, target: str, settings: Settings) -> list[tuple[str, str, str]]:
    """List every Secret that the manifests refer to: its name, its keys, its purpose."""
    found = [(f"{name}-auth", TOKEN_KEY, "Ray's token")]
    if kind == "s3" and not settings.identity:
        found.append((f"{name}-storage", "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY", "the keys of the storage"))
    if kind == "gcs" and not settings.identity:
        found.append((f"{name}-storage", "credentials.json", "the service account's key"))
    if settings.redis and target == "kuberay-cluster":
        found.append((f"{name}-redis", "password", "Redis"))
    if settings.secret:
        found.append((settings.secret, "any", "becomes the environment of all Ray pods"))
    return found


def _machines(target: str, settings: Settings, *, has_gpus: bool) -> dict[str, object]:
    """Return the machine or accelerator names of the target's cloud."""
    if target in ("aws", "gcp"):
        gpu = machines.gpu_machine(target, settings.accelerator, settings.gpus_per_node) if has_gpus else None
        return {"machine": {"head": machines.HEAD_MACHINES[target], "cpu": machines.CPU_MACHINES[target], "gpu": gpu}}
    if target == "skypilot":
        return {"accelerator": machines.sky_accelerator(settings.accelerator)}
    return {"accelerator": machines.GKE.get(settings.accelerator, settings.accelerator)}


def _fill(template: str, facts: Mapping[str, object]) -> str:
    return _environment().get_template(f"{template}.j2").render(facts)


@lru_cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 (YAML, not HTML; values go through the filter `quote`)
    )
    environment.filters["quote"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment
