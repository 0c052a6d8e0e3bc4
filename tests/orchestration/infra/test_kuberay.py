"""The manifests of Kubernetes: valid, safe, consistent with the configuration, and the same however they are made."""

import json
import math
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from manifests import CRDS, EXAMPLE, only, overlay, pods, stream, strict

from orchestration.cli import parser
from orchestration.config import load_config, parse_config
from orchestration.infra.__main__ import FOLDER, pages
from orchestration.infra.shape import MAX_NAME, dns_name

TARGETS = ("kuberay", "kuberay-cluster", "kuberay-cron")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kueue": {"queue": "gpus"},
    "identity": {"identity": "arn:aws:iam::123456789012:role/mapo"},
    "secret": {"secret": "tokens", "region": "eu-central-1", "node_selector": {"gpu": "h100"}},
}


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    if not CRDS.exists():
        pytest.skip("KubeRay's definitions are not beside this checkout")
    found = {}
    for file in CRDS.glob("*.yaml"):
        crd = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
        found[crd["spec"]["names"]["kind"]] = jsonschema.Draft7Validator(strict(version["schema"]["openAPIV3Schema"]))
    return found


def spec_of(documents: list[dict[str, Any]], target: str) -> dict[str, Any]:
    if target == "kuberay-cluster":
        return only(documents, "RayCluster")["spec"]
    return only(documents, "RayJob")["spec"]["rayClusterSpec"]


@pytest.mark.parametrize(
    ("target", "variant"),
    [(t, v) for t in TARGETS for v in VARIANTS if (t, v) != ("kuberay-cluster", "kueue")],  # a cluster does not end
)
def test_ray_resources_are_what_kuberay_defines(schemas: dict[str, Any], target: str, variant: str) -> None:
    documents = stream(target, redis="redis:6379", **VARIANTS[variant])
    kind = "RayCluster" if target == "kuberay-cluster" else "RayJob"
    resource = only(documents, kind)
    assert [f"{list(error.path)}: {error.message}" for error in schemas[kind].iter_errors(resource)] == []


def test_a_field_that_kuberay_would_drop_is_found(schemas: dict[str, Any]) -> None:
    job = only(stream(), "RayJob")
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["hostIPCC"] = True
    assert any("hostIPCC" in error.message for error in schemas["RayJob"].iter_errors(job))


def test_what_lies_in_infra_is_what_is_rendered() -> None:
    stale = [str(page) for page, text in pages().items() if not page.exists() or page.read_text() != text]
    assert not stale, "run `python -m orchestration.infra`"


def test_infra_holds_nothing_that_nobody_renders() -> None:
    rendered = set(pages())
    for target in ("kuberay", "kuberay-cluster", "kuberay-cron", "aws", "gcp", "skypilot", "docker"):
        assert {file for file in (FOLDER / target).rglob("*") if file.is_file()} <= rendered


@pytest.mark.parametrize(("kind", "storage"), [("s3", "s3://bucket/mapo"), ("gcs", "gs://bucket/mapo")])
def test_an_overlay_gives_what_the_stream_has(kind: str, storage: str) -> None:
    for identity in (None, {"s3": "arn:aws:iam::1:role/mapo", "gcs": "mapo@p.iam.gserviceaccount.com"}[kind]):
        given = {"identity": identity, "region": "eu-central-1" if kind == "s3" else None}
        assert overlay(kind, f"storage={storage}", **given) == stream("kuberay", f"storage={storage}", **given)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_kustomize_agrees(kind: str) -> None:
    command = ["kubectl", "kustomize", str(FOLDER / "kuberay" / "overlays" / kind)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    ours = overlay(kind, image="ghcr.io/example/mapo:0.1.0")
    assert sorted(map(canonical, yaml.safe_load_all(built))) == sorted(map(canonical, ours))


def canonical(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True)


@pytest.mark.parametrize("target", TARGETS)
def test_pods_have_no_privileges(target: str) -> None:
    seen = set()
    for component, spec in pods(stream(target)):
        seen.add(component)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["automountServiceAccountToken"] is (component in ("head", "round"))
        assert not any("hostPath" in volume for volume in spec["volumes"]) if "volumes" in spec else True
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}
            }, component  # fmt: skip
            assert container["resources"]["limits"]["memory"]
    assert {"head", "cpu", "gpu"} <= seen


@pytest.mark.parametrize("target", TARGETS)
def test_the_dashboard_is_open_to_nobody_outside(target: str) -> None:
    documents = stream(target)
    spec = spec_of(documents, target)
    assert spec["authOptions"] == {"mode": "token", "secretName": "pickapic-auth"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not {"Ingress", "Service"} & {document["kind"] for document in documents}
    policies = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "NetworkPolicy"}
    (rule,) = policies["pickapic-dashboard"]["ingress"]
    assert rule["ports"] == [{"port": "dashboard"}]
    assert all("ingress" in p["policyTypes"][0].lower() for p in policies.values())
    for spec in policies.values():
        assert all("from" in rule and rule["from"] for rule in spec.get("ingress", []))


@pytest.mark.parametrize("target", TARGETS)
def test_secrets_are_references_that_the_header_lists(target: str) -> None:
    from orchestration.infra.render import Settings, render_stream

    for storage in ("s3://bucket/mapo", "gs://bucket/mapo"):
        settings = Settings(secret="tokens", redis="redis:6379")
        text = render_stream(EXAMPLE, [f"storage={storage}"], target, settings)
        listed = {line.split()[1] for line in text.splitlines() if line.startswith("#   ")}
        named = set(_secrets_in([yaml.safe_load(d) for d in text.split("\n---\n")]))
        assert named == listed
        assert {"pickapic-auth", "pickapic-storage", "tokens"} <= named


def _secrets_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        here = [value["secretKeyRef"]["name"]] if "secretKeyRef" in value else []
        here += [value["secretRef"]["name"]] if "secretRef" in value else []
        here += [value["secretName"]] if "secretName" in value else []
        inner = [yaml.safe_load(text) for text in value["data"].values()] if value.get("kind") == "ConfigMap" else []
        return here + [name for each in [*value.values(), *inner] for name in _secrets_in(each)]
    return [name for each in value for name in _secrets_in(each)] if isinstance(value, list) else []


@pytest.mark.parametrize(
    ("workers", "encoders", "samplers", "gpus"),
    [("8", "1", "1", 8), ("2..12", "4", "2", 4), ("1", "1..9", "1", 2), ("1", "1", "1", 1), ("2", "1", "4..16", 4)],
)
def test_gpu_nodes_hold_the_workers(workers: str, encoders: str, samplers: str, gpus: int) -> None:
    overrides = tuple(
        f"{section}.num_workers={number}"
        for section, number in (("train", workers), ("encode", encoders), ("evaluate", samplers))
    )
    config = load_config(EXAMPLE, overrides)
    assert config.train
    assert config.encode
    ranges = [section.worker_range for section in (config.train, config.encode, config.evaluate)]
    fewest, most = (max(each[end] for each in ranges) for end in (0, 1))
    for settings in ({}, {"warm": True}, {"queue": "gpus"}):
        spec = spec_of(stream("kuberay", *overrides, gpus_per_node=gpus, **settings), "kuberay")
        (group,) = [each for each in spec["workerGroupSpecs"] if each["groupName"] == "gpu"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
        assert group["maxReplicas"] == math.ceil(most / gpus)
        least = {"warm": math.ceil(fewest / gpus)}
        expected = least.get(next(iter(settings), ""), group["maxReplicas"] if "queue" in settings else 0)
        assert group["minReplicas"] == group["replicas"] == expected
        assert spec["enableInTreeAutoscaling"] is ("queue" not in settings)


def test_memory_and_shm_of_a_pod_fit_together() -> None:
    for _, spec in pods(stream()):
        if "volumes" not in spec:
            continue
        shm = next(v["emptyDir"]["sizeLimit"] for v in spec["volumes"] if v["name"] == "shm")
        memory = spec["containers"][0]["resources"]["limits"]["memory"]
        assert int(shm.removesuffix("Gi")) <= int(memory.removesuffix("Gi")) // 3
        assert {m["name"] for m in spec["containers"][0]["volumeMounts"]} == {v["name"] for v in spec["volumes"]}


def test_a_run_on_cpus_has_no_gpu_nodes() -> None:
    spec = spec_of(stream("kuberay", "train.device=cpu", "encode.device=cpu", "train.num_workers=64"), "kuberay")
    (group,) = spec["workerGroupSpecs"]
    assert group["groupName"] == "cpu"
    assert group["maxReplicas"] * 8 > 64


@pytest.mark.parametrize("target", TARGETS)
def test_the_configuration_in_the_manifests_is_the_run(target: str) -> None:
    documents = stream(target, "train.max_steps=7")
    (text,) = [d["data"]["run.yaml"] for d in documents if "run.yaml" in d.get("data", {})]
    embedded, ours = parse_config(text), load_config(EXAMPLE, ["train.max_steps=7"])
    assert embedded.train is not None
    assert embedded.encode is not None
    assert embedded.train.device == embedded.encode.device == "gpu"  # there are none before the autoscaler is asked
    again = parse_config(text, ["train.device=auto", "encode.device=auto"])
    assert again == ours


@pytest.mark.parametrize("target", ["kuberay", "kuberay-cron"])
def test_the_job_runs_our_command_on_the_mounted_file(target: str) -> None:
    spec = only(stream(target), "RayJob")["spec"]
    program, *arguments = shlex.split(spec["entrypoint"])
    assert program == "mapo"
    options = parser().parse_args(arguments)
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert options.config == "/etc/mapo/run.yaml"
    assert {"name": "config", "mountPath": "/etc/mapo", "readOnly": True} in head["containers"][0]["volumeMounts"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    yaml.safe_load(spec["runtimeEnvYAML"])


def test_a_pod_that_goes_has_time_for_a_checkpoint() -> None:
    gpu = dict(pods(stream()))["gpu"]
    hook = " ".join(gpu["containers"][0]["lifecycle"]["preStop"]["exec"]["command"])
    deadline = int(hook.split("--deadline-remaining-seconds ")[1].split()[0])
    assert deadline < gpu["terminationGracePeriodSeconds"]
    assert "timeout 30 ray drain-node" in hook  # the head may have gone, and then nothing answers for minutes
    subprocess.run(
        ["bash", "-n", "-c", gpu["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]], check=True
    )


@pytest.mark.parametrize("target", TARGETS)
def test_one_image_everywhere(target: str) -> None:
    images = {
        c["image"] for name, spec in pods(stream(target, image="x/y:1")) if name != "round" for c in spec["containers"]
    }
    assert images == {"x/y:1"}


def test_rounds_follow_each_other_and_may_do_little() -> None:
    documents = stream("kuberay-cron", schedule="0 3 * * 6")
    cron, role = only(documents, "CronJob")["spec"], only(documents, "Role")
    assert cron["schedule"] == "0 3 * * 6"
    assert cron["concurrencyPolicy"] == "Forbid"
    verbs = {verb for rule in role["rules"] for verb in rule["verbs"]}
    assert verbs == {"create", "get", "list", "watch", "delete"}
    assert all(rule["resources"] == ["rayjobs"] and rule["apiGroups"] == ["ray.io"] for rule in role["rules"])
    assert only(documents, "RayJob")["metadata"]["name"] == only(documents, "CronJob")["metadata"]["name"]


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True))
def test_every_run_name_becomes_a_name_of_kubernetes(name: str) -> None:
    made = dns_name(name)
    assert len(made) <= MAX_NAME
    assert made[0].isalpha()
    assert made[-1] != "-"
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert dns_name(made) == made
    if made != name:
        assert dns_name(name + "x") != made


def test_names_that_look_alike_stay_apart() -> None:
    assert len({dns_name(name) for name in ("photos", "Photos", "photos.", "photos_", "photos-")}) == 5
    assert dns_name("photos") == "photos"


def test_a_folder_is_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from orchestration.cli import main

    assert main(["infra", "render", str(EXAMPLE), "--target", "kuberay", "--output", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.splitlines()
    assert sorted(written) == sorted(str(f) for f in (tmp_path / "out").rglob("*") if f.is_file())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "kuberay", "-o", "storage=runs/photos"], "cannot see it"),
        (["--target", "kuberay", "-o", "storage=file:///data"], "cannot see it"),
        (["--target", "kuberay", "-o", "encode.model=/models/sdxl"], "encode.model"),
        (["--target", "kuberay", "-o", "train=null"], "no `train`"),
        (["--target", "kuberay", "-o", "train.cache_dir=cache"], "absolute"),
        (["--target", "kuberay", "-o", "storage=s3://user:password@host/x"], "secret"),
        (["--target", "kuberay", "--gpus-per-node", "0"], "--gpus-per-node 0"),
        (["--target", "kuberay", "--node-selector", "gpu"], "LABEL=VALUE"),
        (["--target", "kuberay-cron", "--schedule", "weekly"], "five fields"),
        (["--target", "kuberay-cluster", "--queue", "q"], "--queue"),
        (["--target", "gcp"], "--project"),
        (["--target", "aws", "--gpus-per-node", "3"], "no such machine on aws"),
        (["--target", "skypilot", "--accelerator", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_is_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from orchestration.cli import main

    assert main(["infra", "render", str(EXAMPLE), *arguments]) == 2
    out = capsys.readouterr()
    assert message in out.err
    assert not out.out
    assert "hint:" in out.err or "at least" in out.err


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parser().parse_args(["infra", "render", str(EXAMPLE), "--target", "mesos"])
    assert refused.value.code == 2
    assert "skypilot" in capsys.readouterr().err
