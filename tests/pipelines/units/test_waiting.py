"""What waits says for what and how long, and ends where it can never come."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_cluster import small_cluster

from pipelines.dataset.errors import ClusterError
from pipelines.resources import Demand
from pipelines.units import waiting
from pipelines.units.autoscaler import has_autoscaler
from pipelines.units.waiting import Shortage, Wait, wait_for, wait_until_placed

NOBODY_HAS = Demand("CPU", {"of no node": 1})
HEAD, OF_GPUS = {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0}, {"resources": {"CPU": 1, "GPU": 1}}


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def lines_of(wait: Wait, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        wait.look()
        clock.now += 1


def test_a_wait_speaks_at_once_and_then_sparsely_and_ends_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    monkeypatch.setattr(waiting, "has_autoscaler", lambda: None)  # whatever Ray other tests have started
    said: list[str] = []
    shortage = Shortage("no node has a GPU yet; waiting for one", "no node has a GPU")
    wait = Wait("evaluate", lambda: shortage, None, timeout_s=1800, way_out="add one", say=said.append)
    with pytest.raises(ClusterError, match=r"evaluate: no node has a GPU, and .+ \(waited 30:00\)"):
        lines_of(wait, clock, 2000)
    assert said[:2] == [
        "evaluate: no node has a GPU yet; waiting for one (0:00 of 30:00)",
        "evaluate: no node has a GPU yet; waiting for one (0:30 of 30:00)",
    ]
    assert 6 < len(said) < 12
    assert clock.now == 2800


def test_what_others_use_is_waited_for_without_a_limit_and_said_within_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    said: list[str] = []
    wait = Wait("train", lambda: None, "waiting for free GPUs", timeout_s=1, way_out="", say=said.append)
    lines_of(wait, clock, 10)
    assert said == ["train: waiting for free GPUs (0:08)"]
    lines_of(wait, clock, 5000)
    assert len(said) < 25


def test_a_node_that_comes_ends_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lacks = Clock(), [True]
    monkeypatch.setattr(waiting, "time", clock)
    shortage = Shortage("no node", "no node")
    wait = Wait("encode", lambda: shortage if lacks[0] else None, None, timeout_s=60, way_out="", say=lambda line: None)
    for _ in range(3):  # a spot node that comes and goes
        lacks[0] = True
        lines_of(wait, clock, 50)
        lacks[0] = False
        lines_of(wait, clock, 5)


def test_what_no_node_has_is_an_error_on_a_cluster_without_an_autoscaler(ray_cluster: None) -> None:
    said: list[str] = []
    wait = wait_for("encode", NOBODY_HAS, timeout_s=1, way_out="add such a node", say=said.append)
    with pytest.raises(ClusterError) as found:
        wait_until_placed(NOBODY_HAS, wait, count=3)
    assert said == ["encode: no node has a CPU and of no node yet; waiting for one (0:00 of 0:01)"]
    assert str(found.value).startswith("encode: no node has a CPU and of no node, and ")
    assert found.value.hint == "add such a node"


def test_a_wait_ends_when_it_is_stopped_and_leaves_nothing_in_ray(ray_cluster: None) -> None:
    stopped = threading.Event()
    threading.Timer(0.5, stopped.set).start()
    assert not wait_until_placed(NOBODY_HAS, None, is_stopped=stopped.is_set)


def test_what_a_node_has_is_not_waited_for(ray_cluster: None) -> None:
    started = time.monotonic()
    assert wait_until_placed(Demand("CPU", {"encode_node": 0.5}), None)
    assert time.monotonic() - started < 0.5
    assert Demand("CPU").has_node()
    assert not Demand("GPU").has_node()
    assert Demand("CPU", {"encode_node": 0.5}).places([{"CPU": 8, "encode_node": 1}, {"CPU": 8}]) == 2


def test_a_plain_cluster_is_known_to_have_no_autoscaler(ray_cluster: None) -> None:
    """Its monitor says so some seconds after the head has begun."""
    deadline = time.monotonic() + 120
    while (found := has_autoscaler()) is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found is False


@pytest.mark.slow
@pytest.mark.parametrize("is_v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("grows", [False, True], ids=["plain", "autoscaler"])
def test_both_kinds_of_autoscaler_are_seen(
    is_v2: bool, grows: bool, tmp_path: Path, run_python: Callable[[str], str]
) -> None:
    from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG

    node_id = "f" * 51 + "00000"
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    types = {"gpus": OF_GPUS | {"node_config": {}, "min_workers": 0, "max_workers": 2}, "ray.head.default": HEAD}
    settings: dict[str, Any] = {**BASE_READONLY_CONFIG, "max_workers": 2, "available_node_types": types}
    settings["provider"] = {"type": "external", "module": provider, "head_node_id": node_id}
    (tmp_path / "autoscaler.json").write_text(json.dumps(settings))
    environment = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1" if is_v2 else "0"}
    if is_v2 and grows:  # as `ray up` and KubeRay set them
        environment |= {"RAY_CLOUD_INSTANCE_ID": "head", "RAY_NODE_TYPE_NAME": "ray.head.default"}
    code = """
import ray, sys, time
from pipelines.units.autoscaler import has_autoscaler
ray.init({address!r}, logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + 120
while (found := has_autoscaler()) is None and time.monotonic() < deadline:
    time.sleep(0.2)
print("answer", found)
"""
    configuration = str(tmp_path / "autoscaler.json") if grows else None
    with small_cluster(num_cpus=2, autoscaling=configuration, **environment) as address:
        assert f"answer {grows}" in run_python(code.format(address=address))
