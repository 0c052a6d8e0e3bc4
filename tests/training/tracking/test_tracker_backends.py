"""Curves in the real libraries: a run that is started again continues them, and what fails is one warning."""

import json
import logging
import struct
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.dataset.storage import Storage
from training.tracking import trackers
from training.tracking.backends import BACKENDS
from training.tracking.trackers import Tracker, open_trackers

PARAMETERS = {"method": "mapo_paper", "loss": {"beta": 8.0}, "targets": ["to_q", "to_k"], "lora": None}
FOLDER = "runs/photos"


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def opened(name: str, storage: Storage, *, start: int = 0, key: str = "abc") -> Tracker:
    (tracker,) = open_trackers([name], storage=storage, folder=FOLDER, key=key, start=start, parameters=PARAMETERS)
    return tracker


def loss(step: int) -> float:
    return 1 / (1 + step)


def part(name: str, storage: Storage, *, first: int, last: int, key: str = "abc", failed: bool = False) -> None:
    """One start of the workers: it trains steps `first` to `last`, with a picture at the last one."""
    tracker = opened(name, storage, start=first - 1, key=key)
    for step in range(first, last + 1):
        tracker.log({"train/loss": loss(step), "train/margin": float(step)}, step)
    tracker.image("samples/grid", Image.new("RGB", (8, 8), "red"), last)
    tracker.flush()
    tracker.close(failed=failed)
    assert tracker.warning is None


def test_tensorboard_has_each_step_once_after_a_resume(storage) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    part("tensorboard", storage, first=1, last=7, failed=True)
    part("tensorboard", storage, first=6, last=9)  # the checkpoint was of step 5
    events = EventAccumulator(storage.path(f"{FOLDER}/tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 10))
    assert [event.value for event in scalars] == pytest.approx([loss(step) for step in range(1, 10)])
    assert [event.step for event in events.Images("samples/grid")] == [9]
    (text, *_) = events.Tensors("config/text_summary")
    assert '"beta": 8.0' in text.tensor_proto.string_val[0].decode()


@pytest.fixture
def wandb_offline(monkeypatch, tmp_path) -> Iterator[Any]:
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "ERROR_REPORTING": "false", "CONFIG_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("DIR", "PROJECT", "NAME"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    yield wandb
    wandb.teardown()


def wandb_records(file: Path) -> Iterator[Any]:
    """What wandb wrote to be sent later: protobuf in LevelDB's log format, after 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block that holds no header
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_wandb_continues_one_run_and_leaves_offline_runs_on_the_storage(storage, wandb_offline) -> None:
    part("wandb", storage, first=1, last=3, failed=True)
    part("wandb", storage, first=3, last=4)
    part("wandb", storage, first=1, last=1, key="another")
    names = storage.names(f"{FOLDER}/wandb")
    files = [Path(storage.path(name)) for name in names if name.endswith(".wandb")]
    found = [list(wandb_records(file)) for file in files]
    identities = [record.run.run_id for records in found for record in records if record.HasField("run")]
    assert len(set(identities)) == 2
    assert len(files) == 3
    whole = [
        {".".join([item.key, *item.nested_key]).strip("."): item.value_json for item in record.history.item}
        for records in found
        for record in records
        if record.HasField("history") and identities.count(records_id(records)) == 2
    ]
    losses = [(json.loads(row["step"]), json.loads(row["train/loss"])) for row in whole if "train/loss" in row]
    assert losses == [(step, loss(step)) for step in (1, 2, 3, 3, 4)]
    assert sum(name.endswith(".png") for name in names) == 3
    config = {
        item.key: item.value_json for record in found[0] if record.HasField("run") for item in record.run.config.update
    }
    assert json.loads(config["loss"]) == {"beta": 8.0}
    exits = [record.exit.exit_code for records in found for record in records if record.HasField("exit")]
    assert sorted(exits) == [0, 0, 1]


def records_id(records: list[Any]) -> str:
    return next(record.run.run_id for record in records if record.HasField("run"))


def test_wandb_without_a_key_is_one_warning(storage, wandb_offline, monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setattr(trackers.logger, "disabled", False)  # by a library in the same process
    monkeypatch.setattr(trackers.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(trackers.logger, "propagate", False)
    caplog.set_level(logging.WARNING, logger=trackers.__name__)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    tracker = opened("wandb", storage)
    for step in range(3):
        tracker.log({"train/loss": 1.0}, step)
    tracker.close(failed=False)
    assert tracker.warning is not None
    assert "API key" in tracker.warning
    assert [record.message for record in caplog.records if record.name == trackers.__name__] == [tracker.warning]


@pytest.fixture
def mlflow_store(monkeypatch, tmp_path) -> Any:
    mlflow = pytest.importorskip("mlflow")
    settings = {
        "MLFLOW_TRACKING_URI": (tmp_path / "mlflow").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",  # a database needs the whole of MLflow
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return mlflow


def test_mlflow_continues_one_run(storage, mlflow_store) -> None:
    part("mlflow", storage, first=1, last=3, failed=True)
    part("mlflow", storage, first=3, last=4)
    part("mlflow", storage, first=1, last=1, key="another")
    client = mlflow_store.MlflowClient()
    experiment = client.get_experiment_by_name("mapo")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    assert [run.info.run_name for run in runs] == ["photos", "photos"]
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert runs[0].data.params | {"loss.beta": "8.0", "lora": "None"} == runs[0].data.params
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(s, loss(s)) for s in (1, 2, 3, 3, 4)]
    assert len(client.get_metric_history(runs[1].info.run_id, "train/loss")) == 1
    assert any(file.path.endswith(".png") for file in client.list_artifacts(runs[0].info.run_id, "images"))


def test_mlflow_marks_a_run_that_failed(storage, mlflow_store) -> None:
    part("mlflow", storage, first=1, last=1, failed=True)
    client = mlflow_store.MlflowClient()
    experiment = client.get_experiment_by_name("mapo")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FAILED"]


def test_a_server_that_is_not_there_is_one_warning(storage, mlflow_store, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = opened("mlflow", storage)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.flush()
    tracker.close(failed=False)
    assert tracker.warning is not None
    assert "tracker mlflow disabled; training continues" in tracker.warning


def test_every_backend_is_complete_and_its_extra_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    methods = {"__init__", "log", "image", "flush", "close"}
    for name, backend in BACKENDS.items():
        assert name == backend.name
        assert methods <= set(vars(backend)), name
        assert backend.resumes
        assert backend.variables
        requirements = (
            project["dependencies"] if backend.extra is None else project["optional-dependencies"][backend.extra]
        )
        assert any(requirement.startswith(backend.package) for requirement in requirements), name
