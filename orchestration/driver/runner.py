"""Runs the stages of a run in order: looks at each, and does the work of those that are not up to date.

Whether a stage is up to date follows from the storage. The key of a stage is a digest of all its inputs, including the
key of the stage before it, so that a change propagates to the report.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.cluster.canary import canary
from orchestration.cluster.connect import connected, translate_ray_errors
from orchestration.config import RunConfig
from orchestration.driver.looks import Looks
from orchestration.driver.plan import RunPlan, plan_stages, plan_text
from orchestration.driver.session import Driving, driving, stop_retrying
from orchestration.report.writer import ReportWriter
from orchestration.run import telemetry
from orchestration.run.context import Run, Say, command_line
from orchestration.run.lease import Lease
from orchestration.stages.base_check import check_base_model, check_model, check_training
from orchestration.stages.registry import REPORT, STAGES, Stage, check_sections, stages_of
from orchestration.stages.stage import Look, StageState
from pipelines.dataset.errors import ConfigError, MapoError

MAX_MESSAGE = 2000  # characters of an error in the journal: Ray's may be a worker's whole traceback


@dataclass(frozen=True)
class StageResult:
    """The result of one stage in a command.

    Args:
        stage: The stage's name.
        state: `done` by this command, or `up to date` before it.
        key: Digest of everything that its result was made from.
        summary: One line for people; empty if another run on the same storage did the work.
        seconds: Duration of its last execution; None without a record.
        details: Further details of its record, as plain data.
    """

    stage: str
    state: StageState
    key: str
    summary: str
    seconds: float | None
    details: Mapping[str, Any]


def run_stages(config: RunConfig, names: Sequence[str], say: Say, *, takes_signals: bool = True) -> list[StageResult]:
    """Bring these stages up to date, in order. Ray starts only if one of them has work that needs it.

    Args:
        config: The run's configuration.
        names: The stages, in order.
        say: Shows one line to the user.
        takes_signals: Whether SIGINT and SIGTERM end the run cleanly while it works; a notebook keeps its own handlers.

    Raises:
        ConfigError: A stage has no configuration, or the stage before it has not run.
        LeaseError: Another driver is working on this run.
        JobError: A stage failed; finished work is kept.
        Stopped: The run was asked to stop; finished work is kept.
    """
    check_sections(config, names)
    run = Run.open(config, say, names)
    stages = [STAGES[name] for name in names]
    looks, results = Looks(run), []
    for stage in stages:
        if not (look := looks.at(stage)).is_done:
            break
        results.append(_up_to_date(run, stage, look))
    rest = stages[len(results) :]
    if not rest:
        return results
    _check(run, rest, looks)
    with driving(run, takes_signals=takes_signals) as driver:
        looks.forget_if_changed(num_own_events=1)
        if len(stages) > 1 or stages[0].name == "train":
            for line in plan_text(plan_stages(run, rest, looks)):
                say(f"plan      {line}")
        return results + _run_rest(run, rest, looks, driver)


def plan_run(config: RunConfig) -> RunPlan:
    """Return the plan of `mapo run`; write nothing and need no Ray."""
    names = stages_of(config)
    run = Run.open(config, lambda line: None, names)
    plans = plan_stages(run, [STAGES[name] for name in names], Looks(run))
    return RunPlan(config.name, run.storage.url, tuple(plans))


def _check(run: Run, stages: Sequence[Stage], looks: Looks) -> None:
    """Check before any work: the first stage's input, models, trackers, the export, the storage."""
    first, config = stages[0], run.config
    if config.encode is not None:
        if any(stage.reads_base for stage in stages):
            for note in check_base_model(config):
                if len(stages) == 1:  # else the plan says it
                    run.say(f"{first.name:<9} note: {note}")
        else:  # what is trained already can be exported as ever
            check_model(config)
    look = looks.at(first)
    if look.key is None:
        raise look.refusal or ConfigError(
            f"{first.name} needs the result of {look.waits_for}, which has not run for this configuration",
            "`mapo run` runs all stages in order",
        )
    check_training(run)
    for stage in stages:
        stage.check(run)
    run.storage.check_writable()


def _up_to_date(run: Run, stage: Stage, look: Look) -> StageResult:
    record = run.journal.record(stage.name)
    run.say(f"{stage.name:<9} up to date   {record.summary if record else ''}".rstrip())
    assert look.key is not None
    if record is None:
        return StageResult(stage.name, StageState.UP_TO_DATE, look.key, "", None, {})
    return StageResult(stage.name, StageState.UP_TO_DATE, look.key, record.summary, record.seconds, record.details)


def _run_rest(run: Run, stages: Sequence[Stage], looks: Looks, driver: Driving) -> list[StageResult]:
    """Do the work of each stage, according to the look that was shown."""
    results = []
    with contextlib.ExitStack() as cluster, _growing_report(run, driver.lease) as report:
        is_connected = False
        for stage in stages:
            look = looks.at(stage)
            if look.is_done:
                results.append(_up_to_date(run, stage, look))
                continue
            if stage.needs_ray and not is_connected:
                cluster.enter_context(connected(run.config, driver.interruption.fail))
                is_connected = True
                cluster.callback(run.ahead.stop)
            if not stage.shares_data:
                run.ahead.stop()
            if stage.name == REPORT and report is not None:
                report.close()
            results.append(run_stage(run, stage, look, driver))
    return results


@contextlib.contextmanager
def _growing_report(run: Run, lease: Lease) -> Iterator[ReportWriter | None]:
    """Rewrite the run's page regularly while stages run; the last page of a failed run tells why it failed.

    A driver whose run was taken over leaves that page to the new driver.
    """
    if REPORT not in run.goal:
        yield None
        return
    writer = ReportWriter(run, command=command_line())
    try:
        with writer:
            yield writer
    except BaseException:
        with contextlib.suppress(MapoError):
            lease.confirm()
            writer.write(is_driven=False)
        raise


def run_stage(run: Run, stage: Stage, look: Look, driver: Driving) -> StageResult:
    """Do the work that a look found, and record it under that look's key."""
    assert look.key is not None, "the stages before this one have just run"
    assert look.work is not None
    run.say(f"{stage.name:<9} …")
    run.journal.event("began", stage=stage.name)
    started = time.monotonic()
    try:
        living = canary(driver.interruption.fail) if stage.needs_ray else contextlib.nullcontext()
        with (
            telemetry.stage(run.config.name, stage.name),
            driver.interruption.reraise_stop(),
            translate_ray_errors(stage.name),
            living,
        ):
            outcome = look.work()
        driver.lease.confirm()
    except BaseException as error:
        stop_retrying()
        with contextlib.suppress(MapoError):  # the storage may be what failed
            if isinstance(error, KeyboardInterrupt):
                run.journal.event("stopped", stage=stage.name, reason=str(error) or "interrupted")
            else:
                what = {"error": type(error).__name__, "message": str(error)[:MAX_MESSAGE]}
                run.journal.event("failed", stage=stage.name, **what)
        raise
    seconds, details = time.monotonic() - started, outcome.details
    record = run.journal.finish(stage.name, key=look.key, summary=outcome.summary, seconds=seconds, details=details)
    run.say(f"{stage.name:<9} {seconds:7.1f} s    {outcome.summary}")
    return StageResult(stage.name, StageState.DONE, look.key, record.summary, record.seconds, record.details)
