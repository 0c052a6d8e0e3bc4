"""Ray's cluster launcher, SkyPilot and the image, against Ray's own schema and the package."""

import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml
from manifests import EXAMPLE, ROOT, stream

from orchestration.cli import parser
from orchestration.config import parse_config
from orchestration.infra.render import RAY_VERSION, Settings, render_files

TEXT = (ROOT / "infra" / "docker" / "Dockerfile").read_text()


@pytest.mark.parametrize("settings", [{}, {"spot": True, "warm": True}, {"identity": "someone"}])
@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_launcher_takes_its_files(cloud: str, settings: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (cluster,) = stream(cloud, project="vision-1234", **settings)
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["max_workers"] * 8 >= 16
    assert prepared["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert prepared["docker"]["image"].startswith("mapo:")


def test_a_mistake_in_a_launcher_file_is_found() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (cluster,) = stream("aws")
    cluster["idle_timeout"] = 5
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(cluster))


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_no_dashboard_of_a_machine_is_open(cloud: str) -> None:
    (cluster,) = stream(cloud, project="vision-1234")
    assert "IpPermissions" not in cluster["provider"].get("security_group", {})
    (start,) = [command for command in cluster["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_only_cpu_machines_are_spare_ones() -> None:
    (aws,), (gcp,) = stream("aws", spot=True), stream("gcp", spot=True, project="p")
    market = {n: "InstanceMarketOptions" in t["node_config"] for n, t in aws["available_node_types"].items()}
    assert market == {"head": False, "cpu": True, "gpu": False}
    spare = {
        n: {"preemptible": True} in t["node_config"].get("scheduling", [])
        for n, t in gcp["available_node_types"].items()
    }
    assert spare == market


def test_custom_resources_reach_the_nodes() -> None:
    overrides = ("ingest.resources={reader: 1}", "encode.resources={encoder: 1}")
    (aws,) = stream("aws", *overrides)
    assert aws["available_node_types"]["cpu"]["resources"]["reader"] >= 12
    assert aws["available_node_types"]["gpu"]["resources"]["encoder"] == 8
    job = stream("kuberay", *overrides)[-1]
    for group, name in zip(job["spec"]["rayClusterSpec"]["workerGroupSpecs"], ("reader", "encoder"), strict=True):
        quoted = yaml.safe_load(group["rayStartParams"]["resources"])  # a shell strips the outer quotes
        assert name in yaml.safe_load(quoted)


def test_a_skypilot_task_runs_our_command() -> None:
    (task,) = stream("skypilot")
    assert set(task) <= {"name", "num_nodes", "resources", "secrets", "envs", "setup", "run"}
    assert task["num_nodes"] * 8 >= 16
    assert task["resources"]["accelerators"] == "H100:8"
    assert not any(task["secrets"].values())
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    embedded = task["setup"].split("<<'MAPO_CONFIGURATION'\n")[1].split("MAPO_CONFIGURATION")[0]
    assert parse_config(embedded).name == "pickapic"
    (line,) = [line for line in task["run"].splitlines() if " mapo " in line]
    parser().parse_args(shlex.split(line.split(" mapo ")[1]))


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines() if line.strip()]


def test_the_image_is_of_the_tested_versions() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert pins["ray"] == RAY_VERSION
    (base,) = [rest for word, rest in instructions(TEXT) if word == "ARG" and rest.startswith("RAY_IMAGE=")]
    assert f"ray:{RAY_VERSION}-py311-cu" in base
    assert stream()[-1]["spec"]["rayClusterSpec"]["rayVersion"] == RAY_VERSION
    (install,) = [rest for word, rest in instructions(TEXT) if word == "RUN" and "--constraint constraints.txt" in rest]
    assert "[${MAPO_EXTRAS}]" in install


def test_the_image_does_not_run_as_root() -> None:
    users = [rest for word, rest in instructions(TEXT) if word == "USER"]
    assert users[-1] == "1000"
    job = stream()[-1]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert str(head["securityContext"]["runAsUser"]) == users[-1]


def test_the_image_holds_what_it_copies_and_no_more() -> None:
    copied = {
        name for word, rest in instructions(TEXT) if word == "COPY"
        for name in rest.split()[1:-1]
    }  # fmt: skip
    ignore = (ROOT / "infra" / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert not re.search(r"(?i)(token|password|secret|key)=\S", TEXT)


def test_extras_of_the_image_follow_from_the_configuration() -> None:
    def extras(*overrides: str) -> set[str]:
        text = render_files(EXAMPLE, overrides, "docker", Settings())["Dockerfile"]
        return set(re.search(r"MAPO_EXTRAS=(\S+)", text)[1].split(","))  # type: ignore[index]

    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert extras() == {"gpu", "s3"}
    assert extras("storage=gs://b/x", "train.trackers=[wandb]") == {"gpu", "gcs", "s3", "wandb"}
    assert extras("storage=gs://b/x") <= known
