"""Where no actor can live, the run is told; where one can, it is not."""

import os
import threading
import time

import psutil
import pytest

from orchestration.cluster import canary
from pipelines.dataset.errors import ClusterError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "LOOK_S", 0.2)
    monkeypatch.setattr(canary, "MAX_DEATHS", 2)


def test_an_actor_that_dies_whenever_it_is_started_is_an_error_with_what_ray_says(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        def ping(self) -> None:
            os._exit(1)

    told: list[ClusterError] = []
    is_told = threading.Event()
    monkeypatch.setattr(canary, "_Actor", Dying)
    with canary.canary(lambda error: (told.append(error), is_told.set())):
        assert is_told.wait(300)
    (error,) = told
    assert str(error).startswith("even an actor that does nothing died 2 times on this cluster: The actor died ")
    assert error.hint


def test_a_living_one_is_nothing_to_tell_and_is_gone_afterwards(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    looked = canary._watch
    pids: list[int] = []

    class Living:
        def ping(self) -> int:
            return os.getpid()

    def watch(actor, is_over, on_lost) -> None:
        import ray

        pids.append(ray.get(actor.ping.remote()))
        answered.set()
        looked(actor, is_over, on_lost)

    told: list[ClusterError] = []
    monkeypatch.setattr(canary, "_Actor", Living)
    monkeypatch.setattr(canary, "_watch", watch)
    with canary.canary(told.append):
        assert answered.wait(300)
    assert told == []
    deadline = time.monotonic() + 120
    while psutil.pid_exists(pids[0]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
