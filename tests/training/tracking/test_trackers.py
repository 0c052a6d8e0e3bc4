"""No tracker stops training or holds it up, and one that is not installed is refused before training begins."""

import importlib.machinery
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.dataset.errors import ConfigError
from training.tracking import trackers
from training.tracking.trackers import Tracker, check_trackers


class Service:
    """A backend that does as a test says."""

    def __init__(
        self, log: Callable[[int], None] = lambda step: None, opens: Callable[[], None] = lambda: None
    ) -> None:
        self.steps: list[int] = []
        self.closed = False
        self._log, self._opens = log, opens

    def __call__(self, run: Any, local: Path) -> "Service":
        self._opens()
        return self

    def log(self, metrics: Any, step: int) -> None:
        self._log(step)
        self.steps.append(step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self.steps.append(step)

    def flush(self) -> None:
        pass

    def close(self, *, failed: bool) -> None:
        self.closed = True


def tracked(service: Service, num_steps: int = 6) -> Tracker:
    tracker = Tracker("service", None, service)  # type: ignore[arg-type]
    for step in range(num_steps):
        tracker.log({"loss": 1.0}, step)
    tracker.flush()
    tracker.close(failed=False)
    return tracker


def fail() -> None:
    raise ConnectionError("the network is gone")


def test_all_is_out_and_in_order_after_a_flush() -> None:
    service = Service()
    tracker = Tracker("service", None, service)  # type: ignore[arg-type]
    for step in range(500):
        tracker.log({"loss": 1.0}, step)
    tracker.flush()
    assert service.steps == list(range(500))
    tracker.close(failed=False)
    assert service.closed
    assert tracker.warning is None


def test_a_tracker_that_fails_in_the_middle_is_given_up_with_one_warning(caplog, monkeypatch) -> None:
    monkeypatch.setattr(trackers.logger, "disabled", False)  # by a library in the same process
    monkeypatch.setattr(trackers.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(trackers.logger, "propagate", False)
    caplog.set_level(logging.WARNING, logger=trackers.__name__)
    service = Service(log=lambda step: fail() if step == 2 else None)
    tracker = tracked(service)
    assert service.steps == [0, 1]
    expected = "tracker service disabled; training continues: ConnectionError: the network is gone"
    assert [record.message for record in caplog.records] == [expected] == [tracker.warning]


def test_a_tracker_that_does_not_open_is_given_up() -> None:
    assert "the network is gone" in str(tracked(Service(opens=fail)).warning)


def test_a_tracker_that_hangs_holds_no_step_up_and_a_flush_only_so_long(monkeypatch) -> None:
    monkeypatch.setattr(trackers, "FLUSH_S", 0.3)
    monkeypatch.setattr(trackers, "MAX_WAITING", 50)
    ends = threading.Event()
    started = time.monotonic()
    hanging = tracked(Service(log=lambda step: ends.wait() and None))
    behind = tracked(Service(log=lambda step: ends.wait() and None), num_steps=100)
    took_s = time.monotonic() - started
    ends.set()
    assert "it took more than 0 s" in str(hanging.warning)
    assert "50 entries behind" in str(behind.warning)
    assert took_s < 5


def test_a_picture_that_is_no_picture_costs_the_tracker_and_not_the_run(tmp_path) -> None:
    file = tmp_path / "grid.png"
    file.write_bytes(b"not a picture")
    tracker = Tracker("service", None, Service())  # type: ignore[arg-type]
    tracker.image("samples/grid", file, 1)
    tracker.close(failed=False)
    assert "grid.png" in str(tracker.warning)


def test_what_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch) -> None:
    def only_tensorboard(name: str) -> Any:
        return importlib.machinery.ModuleSpec(name, None, origin="here") if name == "tensorboard" else None

    monkeypatch.setattr(importlib.util, "find_spec", only_tensorboard)
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match="wandb, which is not installed"):
        check_trackers(["tensorboard", "wandb"])
    with pytest.raises(ConfigError, match="wandb and mlflow, which are not installed") as caught:
        check_trackers(["wandb", "mlflow"])
    assert "pip install 'mapo[wandb,mlflow]'" in str(caught.value.hint)


def test_a_folder_of_the_name_is_no_package(monkeypatch, tmp_path) -> None:
    (tmp_path / "mlflow").mkdir()  # as earlier runs leave it in the working directory
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(ConfigError, match="mlflow"):
        check_trackers(["mlflow"])


def test_checking_imports_none_of_them(run_python) -> None:
    code = """if True:
        import sys
        from training.tracking.trackers import check_trackers
        check_trackers(["tensorboard"])
        print(*{"wandb", "mlflow", "tensorboard"} & set(sys.modules))
    """
    assert run_python(code).split() == []
