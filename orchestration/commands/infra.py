"""`mapo infra`: manifests for a cluster, filled in from the configuration."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.commands.options import CONFIGURED, Command, Option, say, write

if TYPE_CHECKING:
    from orchestration.infra.render import Settings

TARGETS = ("kuberay", "kuberay-cluster", "kuberay-cron", "aws", "gcp", "skypilot", "docker")
TEXTS = {
    "image": ("IMAGE", "container image, built from infra/docker (default: mapo:VERSION)"),
    "namespace": ("NAME", "Kubernetes namespace (default: mapo)"),
    "operator-namespace": ("NAME", "namespace of KubeRay's operator (default: kuberay-system)"),
    "accelerator": ("KIND", "kind of GPU, in GKE's spelling (default: nvidia-h100-80gb)"),
    "secret": ("NAME", "Secret whose keys, such as HF_TOKEN, become the environment of all Ray pods"),
    "identity": (
        "ID",
        "role ARN or service account e-mail for pods and machines (default: keys from a Secret)",
    ),
    "queue": ("NAME", "Kueue queue, which then decides when the job starts"),
    "redis": ("HOST:PORT", "kuberay-cluster: keep the head's state there, so that a new head can resume from it"),
    "schedule": ("CRON", 'kuberay-cron: when a round starts (default: "0 3 * * 1")'),
    "region": ("NAME", "AWS or GCP region (default: us-east-1, us-central1)"),
    "project": ("ID", "GCP project"),
}
NUMBERS = {
    "gpus-per-node": "GPUs of each GPU node (default: 8)",
    "cpu-nodes": "maximum number of CPU nodes, which ingest (default: 8)",
}
SWITCHES = {
    "spot": "aws, gcp, skypilot: use spot machines for the CPU nodes",
    "warm": "keep enough GPU nodes for the minimum number of workers from the start",
}


def settings_of(options: argparse.Namespace) -> "Settings":
    """Return the options that were given; the rest have the defaults of `Settings`.

    Raises:
        ConfigError: A label is not LABEL=VALUE.
    """
    from orchestration.infra.render import Settings
    from pipelines.dataset.errors import ConfigError

    given = {name.replace("-", "_") for name in (*TEXTS, *NUMBERS, *SWITCHES)}
    values = {name: value for name in given if (value := getattr(options, name)) is not None}
    labels = dict(each.partition("=")[::2] for each in options.node_selector)
    if not all(labels.values()):
        raise ConfigError(
            f"--node-selector {options.node_selector[-1]}: not LABEL=VALUE",
            "for example `--node-selector node.kubernetes.io/instance-type=p5.48xlarge`",
        )
    return Settings(**values, node_selector=labels)


def _render(options: argparse.Namespace) -> None:
    from orchestration.infra.render import render_files, render_stream

    settings = settings_of(options)
    if options.output is None:
        write(render_stream(options.config, options.overrides, options.target, settings))
        return
    for name, text in render_files(options.config, options.overrides, options.target, settings).items():
        path = Path(options.output) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        say(str(path))


COMMANDS = (
    Command(
        "infra render",
        "render manifests for a cluster, filled in from the configuration",
        _render,
        (
            *CONFIGURED,
            Option("--target", f"one of {', '.join(TARGETS)}", metavar="TARGET", choices=TARGETS, is_required=True),
            Option(
                "--output", "write the target's files to this folder, instead of one stream to stdout", metavar="DIR"
            ),
            *(Option(f"--{name}", text, metavar=metavar) for name, (metavar, text) in TEXTS.items()),
            *(Option(f"--{name}", text, metavar="N", type=int) for name, text in NUMBERS.items()),
            Option("--node-selector", "label that GPU nodes must have", metavar="LABEL=VALUE", is_repeated=True),
            *(Option(f"--{name}", text) for name, text in SWITCHES.items()),
        ),
    ),
)
