"""The plan of a run, from the storage alone: stages, their state, and the amount of work of each.

Amounts are counted from tables and file listings; after a stage that has work they are upper bounds.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestration.driver.looks import Looks
from orchestration.run.context import Run
from orchestration.stages.base_check import BaseCheck, run_base_check
from orchestration.stages.registry import Stage
from orchestration.stages.stage import Look, StageState
from pipelines.dataset.errors import MapoError

LABELS = {"num_bytes": "bytes", "latent_bytes": "bytes of latents", "text_bytes": "bytes of text embeddings"}
HAS_WORK = (StageState.TO_DO, StageState.STALE, StageState.WAITS, StageState.BLOCKED)


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Args:
        stage: The stage's name.
        state: See `StageState`; `waits` if a stage before it has work.
        work: Amounts of work by unit; empty if nothing is known.
        note: The summary of its last success, what it waits for, or the error.
        settings: The settings it would choose where the configuration leaves a choice, by name.
        remarks: Remarks for the user on those settings and on the base model.
    """

    stage: str
    state: StageState
    work: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    Args:
        run: The run's name.
        storage: The URL of its storage.
        stages: The plan of each stage, in order.
    """

    run: str
    storage: str
    stages: tuple[StagePlan, ...]

    @property
    def is_blocked(self) -> bool:
        """Whether a stage cannot run with this configuration: `mapo run` would refuse it."""
        return any(plan.state in (StageState.BLOCKED, StageState.NOT_SET) for plan in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the plan for a terminal."""
        return plan_text(self.stages)


def plan_stages(run: Run, stages: Sequence[Stage], looks: Looks) -> list[StagePlan]:
    """Plan these stages in order; reads the storage and the sources, writes nothing, needs no Ray.

    Args:
        run: The run.
        stages: The stages to plan.
        looks: The looks of this command; new ones are kept for the work.
    """
    plans: list[StagePlan] = []
    base = functools.cache(lambda: run_base_check(run))
    before: str | None = None  # the last stage that has work
    rows = 0  # that ingest would add at most
    for stage in stages:
        plan = _plan(run, stage, before, rows, looks, base)
        if plan.state in HAS_WORK:
            before = stage.name
        if stage.name == "ingest" and before == stage.name:
            rows = plan.work.get("rows", 0)
        plans.append(plan)
    return plans


def _plan(
    run: Run, stage: Stage, before: str | None, rows: int, looks: Looks, base: Callable[[], BaseCheck]
) -> StagePlan:
    """Plan one stage; `before` is the last stage before it that has work, and `rows` is what ingest would add."""
    if not is_set(run, stage):
        return StagePlan(stage.name, StageState.NOT_SET, note=f"the configuration has no `{stage.section}` section")
    try:
        look = looks.at(stage) if before is None else None
        if look is not None and look.is_done:
            return _up_to_date(run, stage, look)
        if _meets_base(stage, before) and (refusal := base().refusal) is not None:
            return StagePlan(stage.name, StageState.BLOCKED, note=str(refusal))
        plan = _behind(run, stage, f"after {before}", rows) if look is None else _seen(run, stage, look, rows)
    except MapoError as error:
        return StagePlan(stage.name, StageState.BLOCKED, note=str(error))
    is_encode = stage.name == "encode" and plan.state is not StageState.BLOCKED
    return replace(plan, remarks=(*base().remarks, *plan.remarks)) if is_encode else plan


def _meets_base(stage: Stage, before: str | None) -> bool:
    """Return whether a stage is the first with work that reads the base, and so the one that reports a wrong base."""
    return stage.reads_base and stage.name != "ingest" and before in (None, "ingest")


def _up_to_date(run: Run, stage: Stage, look: Look) -> StagePlan:
    record = run.journal.record(stage.name)
    note = record.summary if record else ""
    return StagePlan(stage.name, StageState.UP_TO_DATE, note=note, remarks=look.notes().remarks)


def _seen(run: Run, stage: Stage, look: Look, rows: int) -> StagePlan:
    """Plan a stage from its look, which found work or an obstacle."""
    state = state_of(run, stage, look)
    if state is StageState.BLOCKED:
        return StagePlan(stage.name, state, note=str(look.refusal))
    if state is StageState.WAITS:
        return _behind(run, stage, f"after {look.waits_for}", rows)
    notes = look.notes()
    return StagePlan(stage.name, state, look.amount(), settings=notes.settings, remarks=notes.remarks)


def _behind(run: Run, stage: Stage, note: str, rows: int) -> StagePlan:
    """Plan a stage that waits for an earlier one: its work is bounded from above."""
    notes = stage.notes(run)
    return StagePlan(
        stage.name, StageState.WAITS, stage.estimate(run, rows), note, settings=notes.settings, remarks=notes.remarks
    )


def is_set(run: Run, stage: Stage) -> bool:
    """Return whether the configuration has the section that a stage needs."""
    return stage.section is None or getattr(run.config, stage.section, None) is not None


def state_of(run: Run, stage: Stage, look: Look) -> StageState:
    """Return the state that a look shows, of a stage whose section is set."""
    if look.is_done:
        return StageState.UP_TO_DATE
    if look.key is None:
        return StageState.WAITS if look.refusal is None else StageState.BLOCKED
    return StageState.TO_DO if run.journal.record(stage.name) is None else StageState.STALE


def plan_text(plans: Sequence[StagePlan]) -> list[str]:
    """Return the plan for a terminal: a line per stage, and below it its hint and its remarks."""
    lines = []
    for plan in plans:
        lines.append(f"{plan.stage:<9} {plan.state:<11} {_detail(plan)}".rstrip())
        way_out = plan.note.splitlines()[1:] if plan.state is StageState.BLOCKED else []
        lines += [f"{'':<21} {line}" for line in (*way_out, *plan.remarks)]
    return lines


def _detail(plan: StagePlan) -> str:
    return ", ".join(part for part in (plan.note.partition("\n")[0], _work_text(plan.work)) if part)


def _work_text(work: Mapping[str, int]) -> str:
    parts = []
    for name, count in work.items():
        if name.startswith("of_"):
            continue
        of = f" of {work[f'of_{name}']:,}" if f"of_{name}" in work else ""
        shown = size_text(count) if name.endswith("bytes") else f"{count:,}"
        label = LABELS.get(name, name)
        parts.append(f"{shown}{of} {label}" if not name.endswith("bytes") else f"{shown}{label.removeprefix('bytes')}")
    return ", ".join(parts)


def size_text(num_bytes: float) -> str:
    """Format bytes with a unit, in powers of 1000."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    power = min(int(math.log10(num_bytes) // 3), 5)
    return f"{num_bytes / 1000**power:.1f} {' kMGTP'[power]}B"
