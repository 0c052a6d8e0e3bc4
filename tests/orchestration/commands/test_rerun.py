"""`--every`: what fails is tried again at its time, a wrong configuration or a signal ends it."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from orchestration.cluster.signals import Stopped
from orchestration.commands.every import run_every
from orchestration.config import RunConfig
from pipelines.dataset.errors import ClusterError, ConfigError


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run whose sources are not there (yet)."""
    return RunConfig.model_validate({
        "name": "small",
        "storage": str(tmp_path / "storage"),
        "ingest": {"sources": [{"format": "pickapic", "path": str(tmp_path / "*.parquet")}]},
        "encode": {"model": str(tmp_path), "resolution": 64},
        "train": {"num_workers": 1, "precision": "fp32"},
    })  # fmt: skip


def test_work_that_failed_is_tried_again_and_the_configuration_is_read_each_time(config: RunConfig) -> None:
    starts: list[float] = []
    said: list[str] = []

    def load() -> RunConfig:
        starts.append(time.monotonic())
        if len(starts) == 3:
            raise ConfigError("somebody has changed it for the worse")
        return config

    with pytest.raises(ConfigError, match="for the worse"):
        run_every("1s", load, said.append)
    assert [line.split()[0] for line in said] == ["SourceError:", "next"] * 2
    assert starts[1] - starts[0] >= 1
    assert starts[2] - starts[1] >= 1


def test_a_cluster_that_fails_is_tried_again_unless_this_process_goes_down_with_it() -> None:
    final = ClusterError("its head is gone")
    final.ends_process = True
    errors = [ClusterError("a worker is gone"), final]
    said: list[str] = []

    def load() -> RunConfig:
        raise errors.pop(0)

    with pytest.raises(ClusterError, match="its head is gone"):
        run_every("1s", load, said.append)
    assert said[0] == "ClusterError: a worker is gone"


def test_a_signal_ends_the_wait(config: RunConfig) -> None:
    said: list[str] = []

    def stop_once_it_waits() -> None:
        while not any(line.startswith("next run at") for line in said):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    kept = signal.signal(signal.SIGTERM, lambda *_: None)
    thread = threading.Thread(target=stop_once_it_waits)
    thread.start()
    try:
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            run_every("1h", lambda: config, said.append)
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, kept)


@pytest.mark.parametrize("text", ["0s", "often", "-1h"])
def test_a_time_that_is_none_is_refused_before_anything_runs(text: str) -> None:
    with pytest.raises(ConfigError, match="--every"):
        run_every(text, lambda: pytest.fail("it is read"), print)
