"""A configuration that only judges models: submit, plan, status, run and report agree on which stages it has."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration import api
from orchestration.cli import main, parser
from orchestration.config import RunConfig, parse_config
from orchestration.driver.runner import plan_run, run_stages
from orchestration.driver.status import describe_run
from orchestration.jobs.paths import load_located
from orchestration.jobs.submit import prepare
from orchestration.report.index import read_summaries
from orchestration.stages.registry import ALL_STAGES, stages_of
from orchestration.stages.stage import StageState
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler

INGEST = {"sources": [{"format": "pickapic", "path": "pairs.parquet"}]}
OTHER = {"name": "other", "model": "s3://bucket/other"}


def settings(**changes: Any) -> dict[str, Any]:
    """A configuration that judges the base and a model by name; None leaves a section out."""
    found = {
        "name": "judged",
        "storage": "storage",
        "encode": {"model": "s3://bucket/base", "resolution": 64, "device": "cpu"},
        "evaluate": {"models": ["base", OTHER], "suites": ["starter"]},
    }
    return {key: value for key, value in (found | changes).items() if value is not None}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_is_submitted_as_mapo_run(here: Path) -> None:
    assert main(["init", "evaluate"]) == 0
    submission = prepare("evaluate.yaml", ["storage=here"], command="")
    words = shlex.split(submission.entrypoint)
    assert words[:3] == ["mapo", "run", "evaluate.yaml"]
    options = parser().parse_args(words[1:])
    config, _ = load_located(options.config, options.overrides)
    assert config == submission.config
    assert config.only_judges
    assert stages_of(config) == ("evaluate", "report")


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"ingest": INGEST}, "`train`"),
        ({"train": {}}, "`ingest`"),
        ({"ingest": INGEST, "encode": None}, "`encode`, `train`"),
        ({"evaluate": None}, "`ingest`, `train`"),
        ({"evaluate": {"suites": ["starter"]}}, "`ingest`, `train`"),
        ({"evaluate": {"models": ["base", "aligned"]}}, "`ingest`, `train`"),
        ({"evaluate": {"models": ["base", OTHER, "checkpoints"]}}, "`ingest`, `train`"),
        ({"encode": None}, "`encode`"),
    ],
)
def test_a_configuration_that_lacks_a_section_is_refused_everywhere_in_the_same_words(
    here: Path, changes: dict[str, Any], missing: str
) -> None:
    """Also one that has `evaluate` but trains: it must not be taken for one that only judges."""
    (here / "run.yaml").write_text(yaml.safe_dump(settings(**changes)))
    with pytest.raises(ConfigError) as of_submit:
        prepare("run.yaml", [], command="")
    with pytest.raises(ConfigError) as of_run:
        api.run("run.yaml", say=lambda line: None)
    assert of_submit.value.message == f"run.yaml has no {missing}, which `mapo run` needs"
    assert of_run.value.message == f"the configuration has no {missing}, which `mapo run` needs"
    assert ("evaluate.models" in str(of_submit.value)) == (missing == "`ingest`, `train`")
    plan = api.plan("run.yaml")
    not_set = [each.note for each in plan.stages if each.state == StageState.NOT_SET]
    assert plan.is_blocked
    assert list(dict.fromkeys(not_set)) == [f"the configuration has no {each} section" for each in missing.split(", ")]
    assert not (here / "storage").exists()


def test_one_stage_says_which_section_it_needs() -> None:
    with pytest.raises(ConfigError, match="has no `train`, which `mapo export` needs"):
        run_stages(parse_config(yaml.safe_dump(settings())), ["export"], lambda line: None)


def small(folder: Path, base: Path, **evaluate: Any) -> RunConfig:
    (folder / "prompts.txt").write_text("a red house\na blue sea\n")
    own = {"prompts": "prompts.txt", "models": ["base", {"name": "other", "model": str(base)}],
           "num_inference_steps": 1, "scorers": ["saturation"], "dtype": "float32"}  # fmt: skip
    encode = {"model": str(base), "resolution": 64, "device": "cpu"}
    (folder / "judged.yaml").write_text(yaml.safe_dump(settings(encode=encode, evaluate=own | evaluate)))
    return load_located("judged.yaml", [])[0]


def test_plan_and_status_have_the_stages_of_the_run_and_no_others(
    here: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(here, tiny_pipeline)
    plan = plan_run(config)
    assert [(each.stage, each.state) for each in plan.stages] == [("evaluate", "to do"), ("report", "waits")]
    assert plan.stages[0].work == {"samples": 2}, "one model under two names: the samples of both are the same"
    states = {each.stage: each.state for each in describe_run(config).stages}
    assert states == {"evaluate": StageState.TO_DO, "report": StageState.TO_DO}
    assert main(["run", "judged.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("evaluate  to do")
    with_training = parse_config(yaml.safe_dump(settings(evaluate=None)))
    assert [each.stage for each in describe_run(with_training).stages] == list(ALL_STAGES)


def test_a_run_that_only_judges_is_finished_once_it_has_judged(
    ray_cluster: None, here: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, said = small(here, tiny_pipeline), list[str]()
    first = api.run("judged.yaml", say=said.append)
    assert [(each.stage, each.state) for each in first.stages] == [("evaluate", "done"), ("report", "done")]
    assert first.model is None
    assert said[-1] == f"\nreport  {first.report}"
    planned = [line.removeprefix("plan      ").partition(" ")[0] for line in said if line.startswith("plan ")]
    assert [stage for stage in planned if stage] == ["evaluate", "report"]
    storage = Storage(config.storage)
    results = json.loads(storage.read("runs/judged/evaluation/results.json"))["suites"]["prompts"]
    assert list(results["models"]) == ["base", "other"]
    (summary,) = read_summaries(storage)
    assert (summary.state, summary.stage) == ("finished", None)
    page = storage.read("runs/judged/report/index.html").decode()
    assert "has not run" not in page
    assert "This run only judges" in page
    assert storage.exists("runs/judged/evaluation/leaderboard.html")

    journal = storage.names("runs/judged/journal")
    assert [each.state for each in api.run("judged.yaml", say=said.append).stages] == [StageState.UP_TO_DATE] * 2
    assert storage.names("runs/judged/journal") == journal
    assert main(["status", "judged.yaml"]) == 0
    assert [line.split(maxsplit=1)[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["evaluate", "report"]
    assert not api.plan("judged.yaml").is_blocked
