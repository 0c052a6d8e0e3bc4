"""A run from Python, as the guide shows it: typed results, and a process that stays as it was."""

import json
import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from factories import photo_pairs, write_parquet

from orchestration import api
from orchestration.cluster.signals import Interruption, Stopped
from orchestration.run.journal import Journal, StageRecord
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.storage import Storage
from training.config import TrainConfig

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "python-api.md"


def settings(folder: Path, model: Path) -> dict[str, object]:
    """A small run, as plain data."""
    write_parquet(folder / "data" / "in.parquet", photo_pairs(8, num_prompts=2))
    train = {"num_workers": 1, "device": "cpu", "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 1}
    return {
        "name": "photos",
        "storage": "runs/photos",
        "ingest": {"sources": [{"format": "pickapic", "path": "data/*.parquet"}]},
        "encode": {"model": str(model), "resolution": 64},
        "train": train | {"precision": "fp32"},
        "evaluate": {"num_samples": 2, "num_inference_steps": 1, "batch_size": 2},
    }


def test_the_cell_of_the_guide_runs_twice_in_one_process(
    ray_cluster: None, tmp_path: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (cell, *_) = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("photos.yaml").write_text(yaml.safe_dump(settings(tmp_path, tiny_pipeline)))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for expected in (api.StageState.DONE, api.StageState.UP_TO_DATE):
        names: dict[str, object] = {}
        exec(cell, names)
        result = names["result"]
        assert isinstance(result, api.RunResult)
        assert [each.stage for each in result.stages] == [
            "ingest", "encode", "train", "export", "evaluate", "report",
        ]  # fmt: skip
        assert {each.state for each in result.stages} == {expected}
        assert result.model == f"{tmp_path}/runs/photos/runs/photos/model"
        assert (Path(result.model) / "model_index.json").is_file()
        assert result["train"].details["steps"] == 1
        with pytest.raises(KeyError):
            result["nothing"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert re.search(r"^train +up to date", capsys.readouterr().out, re.MULTILINE)


def test_a_configuration_as_plain_data_is_checked_like_a_file(tmp_path: Path, tiny_pipeline: Path) -> None:
    given = settings(tmp_path, tiny_pipeline)
    with pytest.raises(ConfigError, match=r"unknown key `encode\.modle`"):
        api.plan(given | {"encode": {"modle": "x"}})
    plan = api.plan(given, overrides=[f"ingest.sources.0.path={tmp_path}/data/*.parquet", f"storage={tmp_path}/s"])
    assert [each.stage for each in plan.stages][:2] == ["ingest", "encode"]
    assert plan.stages[0].state is api.StageState.TO_DO
    assert not plan.is_blocked
    status = api.status(given, overrides=[f"storage={tmp_path}/s", f"ingest.sources.0.path={tmp_path}/data/*.parquet"])
    assert status.driver is None
    assert status.stages[0].state is api.StageState.TO_DO


def test_without_signals_a_run_can_still_be_asked_to_stop() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stopped: list[str] = []

    def work() -> None:
        interruption = Interruption()
        try:
            with interruption.armed(takes_signals=False):
                assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
                threading.Timer(0.2, interruption.ask, ["stopped by request of somebody"]).start()
                while True:
                    threading.Event().wait(0.05)
        except Stopped as error:
            stopped.append(error.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert stopped == ["stopped by request of somebody"]


@pytest.mark.parametrize("given", [None, 5, [1], b"photos.yaml", {1: 2}])
def test_what_is_no_configuration_is_a_configuration_error(given: object) -> None:
    with pytest.raises(ConfigError):
        api.plan(given)  # type: ignore[arg-type]


def test_paths_models_and_numbers_of_numpy_are_plain_data(tmp_path: Path, tiny_pipeline: Path) -> None:
    given = settings(tmp_path, tiny_pipeline)
    train = TrainConfig.model_validate(given["train"])
    changed = given | {"storage": tmp_path / "storage", "seed": np.int64(3), "train": train}
    expected = given | {"storage": str(tmp_path / "storage"), "seed": 3}
    assert api.load(changed) == api.load(expected)
    assert given == settings(tmp_path, tiny_pipeline), "the caller's data is left as it was"


def test_a_stage_that_does_not_exist_and_overrides_as_one_text_are_configuration_errors(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    given = settings(tmp_path, tiny_pipeline)
    with pytest.raises(ConfigError, match="there is no stage 'trian'"):
        api.stage("trian", given)
    with pytest.raises(ConfigError, match="overrides is one text"):
        api.load(given, overrides="seed=3")


def test_errors_and_lines_are_masked_without_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-somebody")
    with pytest.raises(ConfigError) as raised:
        api.load({"name": "a", "storage": "x", "seed": "secret-of-somebody"})
    assert "secret-of-somebody" not in str(raised.value)
    lines: list[str] = []
    api.report({"name": "a", "storage": str(tmp_path / "secret-of-somebody")}, say=lines.append)
    assert lines
    assert "secret-of-somebody" not in "".join(lines)


def test_a_plan_without_a_section_that_a_run_needs_is_blocked(tmp_path: Path, tiny_pipeline: Path) -> None:
    given = {name: value for name, value in settings(tmp_path, tiny_pipeline).items() if name != "ingest"}
    assert api.plan(given | {"storage": str(tmp_path / "s")}).is_blocked


def test_a_configuration_may_be_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("name: a\nstorage: x\n",))
    writer.start()
    assert api.load(tmp_path / "pipe").name == "a"
    writer.join(60)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"stage": "ingest"}', b'{"key": 1}', b"\xff"])
def test_a_damaged_record_blocks_its_stage_and_no_other(tmp_path: Path, tiny_pipeline: Path, content: bytes) -> None:
    given = settings(tmp_path, tiny_pipeline) | {"storage": str(tmp_path / "storage")}
    given |= {"ingest": {"sources": [{"format": "pickapic", "path": f"{tmp_path}/data/*.parquet"}]}}
    record = tmp_path / "storage/runs/photos/stages/ingest.json"
    record.parent.mkdir(parents=True)
    record.write_bytes(content)
    (tmp_path / "storage/runs/photos/progress.json").write_bytes(content)
    status = api.status(given)
    first, second = status.stages[:2]
    assert first.state is api.StageState.BLOCKED
    assert first.problem is not None
    assert str(record) in first.problem
    assert second.state is not api.StageState.BLOCKED
    assert status.training is None


def test_a_field_of_a_later_version_is_left_out_of_a_record(tmp_path: Path) -> None:
    journal = Journal(Storage(str(tmp_path)), "photos")
    journal.finish("ingest", key="k", summary="s", seconds=1.0, details={})
    file = tmp_path / "runs/photos/stages/ingest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"later": 1}))
    assert journal.record("ingest") == StageRecord("ingest", "k", "s", 1.0, json.loads(file.read_text())["finished_at"])
