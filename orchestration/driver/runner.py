"""The stages of a run, in order: is it up to date, and if not, do it.

Whether a stage is up to date follows from what is on storage. The key of a stage is a digest of all that it is made
from, the key of the stage before it included, so that a change runs through to the report.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.cluster.canary import canary
from orchestration.cluster.connect import connected, ours
from orchestration.config import RunConfig
from orchestration.driver.plan import plan_json, plan_stages, plan_text
from orchestration.driver.session import Driving, driving, hurry
from orchestration.report.writer import ReportWriter
from orchestration.run import telemetry
from orchestration.run.context import Outcome, Run, Say, command_line
from orchestration.run.journal import StageRecord
from orchestration.run.lease import Lease
from orchestration.stages import actions
from orchestration.stages.base_check import check_base_model
from pipelines.dataset.errors import ConfigError, MapoError

MAX_MESSAGE = 2000  # characters of an error in the journal: Ray's may be a worker's whole traceback


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: As in the command.
        section: The configuration section that it cannot do without.
        key: What it would be made from now; None while an earlier stage has not run.
        is_done: Whether the storage holds its result for this key.
        execute: Do it.
        needs_ray: Whether it runs on a cluster.
        refusal: Why there is no key, if the stage knows more than that an earlier one has not run.
    """

    name: str
    section: str | None
    key: Callable[[Run], str | None]
    is_done: Callable[[Run, str], bool]
    execute: Callable[[Run, str], Outcome]
    needs_ray: bool
    refusal: Callable[[Run], MapoError | None] = lambda run: None


def recorded(name: str) -> Callable[[Run, str], bool]:
    """A stage whose record on storage is the mark that it is done."""

    def is_done(run: Run, key: str) -> bool:
        record = run.journal.record(name)
        return record is not None and record.key == key

    return is_done


MADE_FOR_BASE = ("ingest", "encode", "train")
"""Stages whose work would be lost on a base model that training does not understand."""
ALL_STAGES = ("ingest", "encode", "train", "export", "evaluate", "report")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("ingest", "ingest", actions.ingest_key, actions.ingest_is_done, actions.run_ingest, True),
        Stage("encode", "encode", actions.encode_key, actions.encode_is_done, actions.run_encode, True),
        Stage("train", "train", actions.train_key, recorded("train"), actions.run_train, True, actions.train_refusal),
        Stage("export", "train", actions.export_key, actions.export_is_done, actions.run_export, False),
        Stage("evaluate", "encode", actions.evaluate_key, recorded("evaluate"), actions.run_evaluate, True),
        Stage("report", None, actions.report_key, actions.report_is_done, actions.run_report, False),
    )
}


def run_all(config: RunConfig, say: Say) -> None:
    """All stages; the last lines say where the report and the model are."""
    run_stages(config, ALL_STAGES, say)
    run = Run.open(config, say)
    say(f"\nreport  {run.storage.uri(run.report)}\nmodel   {run.storage.uri(run.model)}")


def run_stages(config: RunConfig, names: Sequence[str], say: Say) -> None:
    """Bring these stages up to date, in their order. Ray starts only if one of them has work that needs it.

    Raises:
        ConfigError: A stage has no configuration, or the stage before it has not run.
        LeaseError: Another driver works on this run.
        JobError: A stage failed; what was done before it stays.
        Stopped: It was told to stop; what was done before stays.
    """
    run = Run.open(config, say, names)
    stages = [STAGES[name] for name in names]
    for stage in stages:
        if stage.section is not None and getattr(config, stage.section) is None:
            raise ConfigError(
                f"the configuration has no `{stage.section}` section, which {stage.name} needs",
                "docs/reference/configuration.md has every section with its keys",
            )
    position = 0
    while position < len(stages) and _is_up_to_date(run, stages[position]):
        position += 1
    if position == len(stages):
        return
    _check(run, stages[position:])
    with driving(run) as driver:
        if len(stages) > 1 or stages[0].name == "train":
            for line in plan_text(plan_stages(run, stages[position:])):
                say(f"plan      {line}")
        _run_rest(run, stages[position:], driver)


def plan_run(config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """What `run_all` would do, as plain data and as lines; writes nothing and needs no Ray."""
    run = Run.open(config, lambda line: None, ALL_STAGES)
    plans = plan_stages(run, [STAGES[name] for name in ALL_STAGES])
    return plan_json(run, plans), plan_text(plans)


def _check(run: Run, stages: Sequence[Stage]) -> None:
    """What can be wrong before any work: what the first stage needs, models, trackers, the export, the storage."""
    first, config = stages[0], run.config
    if config.encode is not None:
        if any(stage.name in MADE_FOR_BASE for stage in stages):
            for note in check_base_model(config):
                if len(stages) == 1:  # else the plan says it
                    run.say(f"{stages[0].name:<9} note: {note}")
        else:  # what is trained already can be exported as ever
            actions.check_model(config.encode)
    if first.key(run) is None:
        raise first.refusal(run) or ConfigError(
            f"{first.name} needs the stage before it, which has not run for this configuration",
            "`mapo run` does all stages in order",
        )
    if config.train is not None:
        actions.check_training(config.train)
        actions.check_rounds(run)
    if any(stage.name == "train" for stage in stages):
        actions.check_export(config)
    run.storage.check_writable()


def _is_up_to_date(run: Run, stage: Stage) -> bool:
    key = stage.key(run)
    if key is None or not stage.is_done(run, key):
        return False
    record = run.journal.record(stage.name)
    run.say(f"{stage.name:<9} up to date   {record.summary if record else ''}".rstrip())
    return True


def _run_rest(run: Run, stages: Sequence[Stage], driver: Driving) -> None:
    """Do what is to be done; another driver may have done some of it while this one waited for the lease."""
    with contextlib.ExitStack() as cluster, _growing_report(run, driver.lease) as report:
        is_connected = False
        for stage in stages:
            if _is_up_to_date(run, stage):
                continue
            if stage.needs_ray and not is_connected:
                cluster.enter_context(connected(run.config, driver.interruption.fail))
                is_connected = True
                cluster.callback(run.ahead.stop)
            if stage.name not in ("ingest", "encode"):
                run.ahead.stop()
            if stage.name == "report" and report is not None:
                report.close()
            run_stage(run, stage, driver)


@contextlib.contextmanager
def _growing_report(run: Run, lease: Lease) -> Iterator[ReportWriter | None]:
    """The run's page, written again and again while stages run; the last one of a run that fails tells why.

    A driver whose run was taken over leaves that page to the other.
    """
    if "report" not in run.goal:
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


def run_stage(run: Run, stage: Stage, driver: Driving) -> StageRecord:
    """Do one stage and record it."""
    key = stage.key(run)
    assert key is not None, "the stages before this one have just run"
    run.say(f"{stage.name:<9} …")
    run.journal.event("began", stage=stage.name)
    started = time.monotonic()
    try:
        living = canary(driver.interruption.fail) if stage.needs_ray else contextlib.nullcontext()
        with telemetry.stage(run.config.name, stage.name), driver.interruption.named(), ours(stage.name), living:
            outcome = stage.execute(run, key)
        driver.lease.confirm()
    except BaseException as error:
        hurry()
        with contextlib.suppress(MapoError):  # the storage may be what failed
            if isinstance(error, KeyboardInterrupt):
                run.journal.event("stopped", stage=stage.name, reason=str(error) or "interrupted")
            else:
                what = {"error": type(error).__name__, "message": str(error)[:MAX_MESSAGE]}
                run.journal.event("failed", stage=stage.name, **what)
        raise
    seconds = time.monotonic() - started
    record = run.journal.finish(stage.name, key=key, summary=outcome.summary, seconds=seconds, details=outcome.details)
    run.say(f"{stage.name:<9} {seconds:7.1f} s    {outcome.summary}")
    return record
