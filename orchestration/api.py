"""A run from Python: whole, or stage by stage. The commands of `mapo` are built on these functions.

Made for notebooks and other programs: results are typed, lines go where the caller wants them, no signal handler is
replaced unless asked for, and nothing ends the process. Calls block until the work is done; an interrupt of the
notebook stops a run cleanly, and the same call resumes it.

    from orchestration import api

    result = api.run("photos.yaml", overrides=["train.max_steps=100"])
    print(result.model, result["train"].summary)
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orchestration.config import RunConfig, read_text, yaml_of
from orchestration.driver.plan import RunPlan
from orchestration.driver.runner import StageResult, plan_run, run_stages
from orchestration.driver.status import RunStatus, StageStatus, describe_run
from orchestration.jobs.paths import check_inside_job, locate
from orchestration.run.console import say as say_to_stdout
from orchestration.run.context import Run, Say
from orchestration.stages.registry import ALL_STAGES, REPORT, stages_of
from orchestration.stages.stage import StageState
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.secrets import redact

__all__ = [
    "RunPlan", "RunResult", "RunStatus", "StageResult", "StageState", "StageStatus", "encode", "evaluate", "export",
    "ingest", "plan", "report", "run", "stage", "status", "train",
]  # fmt: skip

Source = RunConfig | Mapping[str, Any] | str | Path
"""A configuration: checked already, as plain data, or the path of a YAML file."""


@dataclass(frozen=True)
class RunResult:
    """The stages that a call brought up to date.

    Args:
        run: The run's name.
        storage: The URL of its storage.
        stages: One result for each stage that was asked for, in order.
        report: The URL of the run's page; None if it was not asked for.
        model: The URL of the exported model; None if it was not asked for, or if the run only judges models.
    """

    run: str
    storage: str
    stages: tuple[StageResult, ...]
    report: str | None = None
    model: str | None = None

    def __getitem__(self, stage: str) -> StageResult:
        """Return the result of a stage.

        Raises:
            KeyError: The stage was not asked for.
        """
        for each in self.stages:
            if each.stage == stage:
                return each
        raise KeyError(stage)


def load(config: Source, overrides: Sequence[str] = (), *, say: Say = say_to_stdout) -> RunConfig:
    """Check a configuration and make its local paths absolute, as every function here does.

    Args:
        config: The configuration; relative paths in it are relative to the working directory.
        overrides: `key.path=value`, as `-o` of the commands.
        say: Shows one line to the user.

    Raises:
        ConfigError: The configuration is wrong; the message names each key.
    """
    return _located(config, overrides, lambda found: check_inside_job(found, say))


def run(
    config: Source, *, overrides: Sequence[str] = (), say: Say = say_to_stdout, takes_signals: bool = False
) -> RunResult:
    """Bring all stages of a run up to date: `mapo run`. A run that only judges models has `evaluate` and `report`.

    Args:
        config: The configuration.
        overrides: `key.path=value`, as `-o` of the commands.
        say: Shows one line to the user.
        takes_signals: Whether SIGINT and SIGTERM stop the run cleanly while it works, as in the command.

    Raises:
        ConfigError: The configuration is wrong.
        LeaseError: Another driver is working on this run.
        JobError: A stage failed; finished work is on the storage, and the same call resumes.
    """
    result = _run(config, None, overrides, say, takes_signals=takes_signals)
    model = "" if result.model is None else f"\nmodel   {result.model}"
    _masked(say)(f"\nreport  {result.report}{model}")
    return result


def stage(
    name: str,
    config: Source,
    *,
    overrides: Sequence[str] = (),
    say: Say = say_to_stdout,
    takes_signals: bool = False,
) -> RunResult:
    """Bring one stage up to date from the result of the stage before it; see `run`.

    Args:
        name: The stage's name, from `orchestration.stages.registry`.
        config: The configuration.
        overrides: See `run`.
        say: See `run`.
        takes_signals: See `run`.

    Raises:
        ConfigError: There is no such stage, or the configuration is wrong.
    """
    if name not in ALL_STAGES:
        raise ConfigError(f"there is no stage {name!r}", f"the stages are {', '.join(ALL_STAGES)}")
    return _run(config, (name,), overrides, say, takes_signals=takes_signals)


def ingest(config: Source, *, overrides: Sequence[str] = (), say: Say = say_to_stdout) -> RunResult:
    """Bring the table of pairs up to date with the sources: `mapo ingest`."""
    return stage("ingest", config, overrides=overrides, say=say)


def encode(config: Source, *, overrides: Sequence[str] = (), say: Say = say_to_stdout) -> RunResult:
    """Write the missing latents and text embeddings: `mapo encode`."""
    return stage("encode", config, overrides=overrides, say=say)


def train(config: Source, *, overrides: Sequence[str] = (), say: Say = say_to_stdout) -> RunResult:
    """Train from the last checkpoint if there is one: `mapo train`."""
    return stage("train", config, overrides=overrides, say=say)


def export(config: Source, *, overrides: Sequence[str] = (), say: Say = say_to_stdout) -> RunResult:
    """Export the trained model in diffusers' format: `mapo export`."""
    return stage("export", config, overrides=overrides, say=say)


def evaluate(config: Source, *, overrides: Sequence[str] = (), say: Say = say_to_stdout) -> RunResult:
    """Sample and score the base and the aligned model: `mapo evaluate`."""
    return stage("evaluate", config, overrides=overrides, say=say)


def report(config: Source, *, overrides: Sequence[str] = (), say: Say = say_to_stdout) -> str:
    """Write the run's page and the index of runs from their current state, at any time: `mapo report`.

    Returns:
        The URL of the page.
    """
    from orchestration.report.writer import report_now

    loaded = load(config, overrides, say=say)
    config_file = str(config) if isinstance(config, str | Path) else "CONFIG"
    report_now(loaded, config_file=config_file, say=_masked(say))
    found = Run.open(loaded, say)
    return found.storage.uri(found.report)


def plan(config: Source, *, overrides: Sequence[str] = ()) -> RunPlan:
    """Return what `run` would do; write nothing and need no Ray: `mapo run --dry-run`."""
    return plan_run(load(config, overrides, say=_silent))


def status(config: Source, *, overrides: Sequence[str] = ()) -> RunStatus:
    """Return the state of a run, from its storage alone: `mapo status`."""
    return describe_run(_located(config, overrides, lambda found: None))


def _run(
    config: Source, names: Sequence[str] | None, overrides: Sequence[str], say: Say, *, takes_signals: bool
) -> RunResult:
    """Bring stages up to date: those named, or all of the run's."""
    say = _masked(say)
    loaded = load(config, overrides, say=say)
    names = stages_of(loaded) if names is None else names
    results = run_stages(loaded, names, say, takes_signals=takes_signals)
    found = Run.open(loaded, say)
    report = found.storage.uri(found.report) if REPORT in names else None
    model = found.storage.uri(found.model) if "export" in names else None
    return RunResult(loaded.name, found.storage.url, tuple(results), report, model)


def _masked(say: Say) -> Say:
    """Return `say` for lines in which every secret is masked."""
    return lambda line: say(redact(line))


def _silent(line: str) -> None:
    """Show nothing."""


def _located(config: Source, overrides: Sequence[str], check: Callable[[RunConfig], None]) -> RunConfig:
    """Return a configuration with absolute local paths; `check` sees it with the paths as they are written."""
    source = str(config) if isinstance(config, str | Path) else "configuration"
    given = yaml_of(read_text(config), source) if isinstance(config, str | Path) else _plain(config)
    if not isinstance(given, dict):
        raise ConfigError(
            f"{source} is a {type(config).__name__}, not a configuration",
            "give the path of a YAML file, a RunConfig, or a mapping with at least `name` and `storage`",
        )
    return locate(given, overrides, source=source, check=check)[0]


def _plain(value: Any) -> Any:
    """Return a configuration as plain data: paths as text, models, mappings and sequences as what they hold."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") else value  # a number of numpy
