"""Our metrics, scraped from a real Ray; and alerts and dashboard, which may name only what is there."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from manifests import ROOT

from orchestration.run import telemetry
from pipelines.progress import ProgressBar, observers

ALERTS = yaml.safe_load((ROOT / "infra" / "prometheus" / "alerts.yaml").read_text())
DASHBOARD = json.loads((ROOT / "infra" / "grafana" / "dashboard.json").read_text())
OF_KUBERAY = {"kuberay_job_execution_duration_seconds"}
EXPORTED = {f"ray_{name}" for name in telemetry.GAUGES} | {f"ray_{name}_total" for name in telemetry.COUNTERS}

DRIVER = """
import logging, sys, time, urllib.request
import ray
port = int(sys.argv[1])
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         _metrics_export_port=port, _system_config={"metrics_report_interval_ms": 300})
from types import SimpleNamespace
from orchestration.run import telemetry
from orchestration.stages.training_view import TrainingView
from pipelines.progress import ProgressBar
from training.run_progress import RunProgress

with telemetry.stage("photos", "ingest"):
    with ProgressBar("ingest", 8, "units") as progress:
        progress.advance(2, statuses={"kept": 20, "tie": 3})
        progress.advance(1, statuses={"kept": 5, "quarantined": 1})
try:
    with telemetry.stage("photos", "export"):
        raise ValueError("no")
except ValueError:
    pass
last = {"loss": 0.25, "implicit_accuracy": 0.625, "grad_norm": 1.5, "skipped_steps": 3, "pairs_per_s": 12.5,
        "mfu": 0.375, "data_wait_ratio": 0.0625}
seen = RunProgress(key="k", step=5, max_steps=9, starts=2, started_at=0.0, start_up_s={}, workers=(), notes=(),
                   last=last)
spec = SimpleNamespace(run="photos", config=SimpleNamespace(max_steps=9))
text = ""
with telemetry.stage("photos", "train"), TrainingView(spec, lambda line: None) as view:
    view.watch(seen)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        except OSError:
            pass
        if "mapo_data_wait_ratio" in text and "mapo_stages_failed" in text:
            break
        time.sleep(0.3)
print(text)
ray.shutdown()
"""


@pytest.fixture(scope="module")
def scraped() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of ours: (name, tags) -> value."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(port)], capture_output=True, text=True, timeout=400, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for name, labels, value in re.findall(r"^(ray_mapo_\w+)\{([^}]*)\} (\S+)$", done.stdout, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        kept = tuple(sorted((key, tags[key]) for key in ("run", "stage", "status") if tags.get(key)))
        found[name, kept] = float(value)
    return found


def test_prometheus_sees_every_number(scraped: dict[tuple[str, tuple[tuple[str, str], ...]], float]) -> None:
    run = ("run", "photos")
    assert {name for name, _ in scraped} >= EXPORTED
    expected: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {
        ("ray_mapo_stage_running", (run, ("stage", "ingest"))): 0,
        ("ray_mapo_stage_running", (run, ("stage", "train"))): 1,
        ("ray_mapo_units_done", (run, ("stage", "ingest"))): 3,
        ("ray_mapo_units_total", (run, ("stage", "ingest"))): 8,
        ("ray_mapo_rows", (run, ("status", "kept"))): 25,
        ("ray_mapo_rows", (run, ("status", "quarantined"))): 1,
        ("ray_mapo_train_step", (run,)): 5,
        ("ray_mapo_train_max_steps", (run,)): 9,
        ("ray_mapo_train_starts", (run,)): 2,
        ("ray_mapo_train_loss", (run,)): 0.25,
        ("ray_mapo_implicit_accuracy", (run,)): 0.625,
        ("ray_mapo_grad_norm", (run,)): 1.5,
        ("ray_mapo_skipped_steps", (run,)): 3,
        ("ray_mapo_pairs_per_second", (run,)): 12.5,
        ("ray_mapo_mfu", (run,)): 0.375,
        ("ray_mapo_data_wait_ratio", (run,)): 0.0625,
        ("ray_mapo_stages_finished_total", (run, ("stage", "ingest"))): 1,
        ("ray_mapo_stages_failed_total", (run, ("stage", "export"))): 1,
    }
    assert {key: scraped.get(key) for key in expected} == expected


def test_without_ray_nothing_is_done(run_python: Callable[[str], str]) -> None:
    code = """
import sys
from orchestration.run import telemetry
from pipelines.progress import ProgressBar
with telemetry.stage("photos", "ingest"), ProgressBar("ingest", 2, "units") as progress:
    progress.advance(1)
telemetry.training("photos", {"step": 1, "max_steps": 2, "starts": 1, "last": {}})
print("ray" in sys.modules)
"""
    assert run_python(code).split() == ["False"]


def test_a_broken_outlet_breaks_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError(name)

    monkeypatch.setattr(telemetry._outlet, "metric", broken)
    with telemetry.stage("photos", "ingest"), ProgressBar("ingest", 2, "units") as progress:
        progress.advance(1)
    assert not observers
    with pytest.raises(ValueError, match="as it was"), telemetry.stage("photos", "ingest"):
        raise ValueError("as it was")
    assert not observers


def expressions() -> Iterator[str]:
    for group in ALERTS["spec"]["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"].replace("$run", ".*") for target in panel["targets"])


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector below a node of a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for part in ("lhs", "rhs", "expr", "vector_selector"):
        if (inner := getattr(node, part, None)) is not None:
            yield from selectors(inner)
    for inner in getattr(node, "args", None) or []:
        yield from selectors(inner)


def ray_names() -> set[str]:
    """The metrics that Ray's own dashboards show."""
    import ray.dashboard

    folder = Path(ray.dashboard.__file__).parent / "modules" / "metrics" / "dashboards"
    return set(re.findall(r"\bray_\w+", (folder / "default_dashboard_panels.py").read_text()))


def test_alerts_and_dashboard_name_only_metrics_that_there_are() -> None:
    known, ours = EXPORTED | OF_KUBERAY | ray_names(), set()
    for expression in expressions():
        found = [selector.name for selector in selectors(promql_parser.parse(expression))]
        assert found, expression
        assert set(found) <= known, expression
        ours |= set(found) & EXPORTED
    assert ours == EXPORTED, "a metric that nobody looks at"


def test_alerts_filter_by_tags_that_the_metrics_have() -> None:
    tags = {f"ray_{name}": keys for name, (_, keys) in telemetry.GAUGES.items()}
    tags |= {f"ray_{name}_total": keys for name, (_, keys) in telemetry.COUNTERS.items()}
    for expression in expressions():
        for selector in selectors(promql_parser.parse(expression)):
            for matcher in selector.matchers.matchers:
                if selector.name in tags:
                    assert matcher.name in tags[selector.name], expression


def test_every_alert_says_what_to_do() -> None:
    rules = [rule for group in ALERTS["spec"]["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 7
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_panels_have_a_place_and_an_id_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
