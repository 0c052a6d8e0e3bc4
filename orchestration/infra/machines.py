"""The clouds' machine types, by accelerator and GPUs per machine."""

from dataclasses import dataclass

from pipelines.dataset.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """A machine type.

    Args:
        name: The cloud's name for it.
        num_cpus: Its virtual CPUs.
    """

    name: str
    num_cpus: int


AWS = {
    "nvidia-h200-141gb": {8: Machine("p5en.48xlarge", 192)},
    "nvidia-h100-80gb": {1: Machine("p5.4xlarge", 16), 8: Machine("p5.48xlarge", 192)},
    "nvidia-a100-80gb": {8: Machine("p4de.24xlarge", 96)},
    "nvidia-a100-40gb": {8: Machine("p4d.24xlarge", 96)},
    "nvidia-l40s": {1: Machine("g6e.4xlarge", 16), 4: Machine("g6e.12xlarge", 48), 8: Machine("g6e.48xlarge", 192)},
}
GCP = {
    "nvidia-h200-141gb": {8: Machine("a3-ultragpu-8g", 224)},
    "nvidia-h100-80gb": {n: Machine(f"a3-highgpu-{n}g", 26 * n) for n in (1, 2, 4, 8)},
    "nvidia-a100-80gb": {n: Machine(f"a2-ultragpu-{n}g", 12 * n) for n in (1, 2, 4, 8)},
    "nvidia-a100-40gb": {n: Machine(f"a2-highgpu-{n}g", 12 * n) for n in (1, 2, 4, 8)},
}
CPU_MACHINES = {"aws": Machine("m6i.2xlarge", 8), "gcp": Machine("n2-standard-8", 8)}
"""For ingest: 32 GiB of memory."""
HEAD_MACHINES = {"aws": Machine("r6i.xlarge", 4), "gcp": Machine("n2-highmem-4", 4)}
"""For the driver: 32 GiB of memory, which `export` of SDXL needs."""

SKYPILOT = {
    "nvidia-h200-141gb": "H200",
    "nvidia-h100-80gb": "H100",
    "nvidia-a100-80gb": "A100-80GB",
    "nvidia-a100-40gb": "A100",
    "nvidia-l40s": "L40S",
}
GKE = {"nvidia-a100-40gb": "nvidia-tesla-a100"}
"""GKE's name of an accelerator, where it differs."""


def gpu_machine(cloud: str, accelerator: str, num_gpus: int) -> Machine:
    """Find a cloud's machine with this many GPUs of a kind.

    Raises:
        ConfigError: There is no such machine; the message lists the known ones.
    """
    known = {"aws": AWS, "gcp": GCP}[cloud]
    if found := known.get(accelerator, {}).get(num_gpus):
        return found
    listed = "; ".join(f"{name} with {', '.join(str(n) for n in sizes)}" for name, sizes in known.items())
    raise ConfigError(
        f"--accelerator {accelerator} --gpus-per-node {num_gpus}: no such machine on {cloud}",
        f"known machines: {listed}",
    )


def sky_accelerator(accelerator: str) -> str:
    """Return SkyPilot's name of an accelerator.

    Raises:
        ConfigError: The accelerator is not known.
    """
    if found := SKYPILOT.get(accelerator):
        return found
    raise ConfigError(f"--accelerator {accelerator}: unknown accelerator", f"use one of: {', '.join(SKYPILOT)}")
