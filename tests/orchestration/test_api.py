"""A run from Python, as the guide shows it: typed results, and a process that stays as it was."""

import re
import signal
import threading
from pathlib import Path

import pytest
import yaml
from factories import photo_pairs, write_parquet

from orchestration import api
from orchestration.cluster.signals import Interruption, Stopped
from pipelines.dataset.errors import ConfigError

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
