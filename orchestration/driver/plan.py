"""What a run would do, from what is on storage: stages, their state, and how much work waits in each.

Numbers are counted where the tables and file listings tell them, and are upper bounds behind a stage that has work.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from orchestration.run.context import Run
from orchestration.stages.base_check import BaseLook, look_at_base
from pipelines.dataset.errors import MapoError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.model_files import read_config

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from orchestration.driver.runner import Stage
    from pipelines.config import EncodeConfig
    from pipelines.sources.unit import SourceUnit

VAE_FACTOR, LATENT_CHANNELS = 8, 4
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
UP_TO_DATE, TO_DO, WAITS, NOT_SET, BLOCKED = "up to date", "to do", "waits", "not set", "blocked"
OF_BASE = ("encode", "train")
"""Stages that a base model of a kind that training does not know is refused for; the first that has work says so."""
LABELS = {"num_bytes": "bytes", "latent_bytes": "bytes of latents"}


@dataclass(frozen=True)
class StagePlan:
    """What one stage would do.

    Args:
        stage: Its name.
        state: `up to date`, `to do`, `waits` (for one before it), `not set` (no section) or `blocked` (by an error).
        work: How much of what; empty where nothing is known.
        note: A word on it: the record's summary, what it waits for, or the error.
        settings: What it takes where the configuration leaves a choice, by name.
        remarks: Lines on those settings and on the base model, for people.
    """

    stage: str
    state: str
    work: dict[str, int] = field(default_factory=dict)
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def plan_stages(run: Run, stages: Sequence[Stage]) -> list[StagePlan]:
    """Plan these stages in their order; reads the storage and the sources, writes nothing, needs no Ray."""
    plans: list[StagePlan] = []
    base = functools.cache(lambda: look_at_base(run))
    before: str | None = None  # the last stage that has work
    rows = 0  # that ingest would add at most
    for stage in stages:
        plan = _plan(run, stage, before, rows, base)
        if stage.name == "train" and plan.state in (TO_DO, WAITS, UP_TO_DATE):
            plan = _with_settings(run, plan)
        if plan.state in (TO_DO, WAITS, BLOCKED):
            before = stage.name
        if stage.name == "ingest" and plan.state == TO_DO:
            rows = plan.work.get("rows", 0)
        plans.append(plan)
    return plans


def _plan(run: Run, stage: Stage, before: str | None, rows: int, base: Callable[[], BaseLook]) -> StagePlan:
    if stage.section is not None and getattr(run.config, stage.section) is None:
        return StagePlan(stage.name, NOT_SET, note=f"the configuration has no `{stage.section}` section")
    try:
        key = stage.key(run) if before is None else None
        if key is not None and stage.is_done(run, key):
            record = run.journal.record(stage.name)
            return StagePlan(stage.name, UP_TO_DATE, note=record.summary if record else "")
        reads_base = stage.name in OF_BASE and before not in OF_BASE
        if reads_base and (refusal := base().refusal) is not None:
            return StagePlan(stage.name, BLOCKED, note=str(refusal))
        remarks = list(base().remarks) if stage.name == "encode" else []
        if before is not None:
            return StagePlan(stage.name, WAITS, WORK[stage.name](run, rows), f"after {before}", remarks=remarks)
        if key is None and (refusal := stage.refusal(run)) is not None:
            return StagePlan(stage.name, BLOCKED, note=str(refusal))
        state = TO_DO if key is not None else WAITS
        return StagePlan(stage.name, state, WORK[stage.name](run, rows), remarks=remarks)
    except MapoError as error:
        return StagePlan(stage.name, BLOCKED, note=str(error))


def _ingest_work(run: Run, _: int) -> dict[str, int]:
    from pipelines.ingest.execution import pending_of

    pending = pending_of(run.units, run.storage)
    rows = sum(unit.num_rows for unit in pending)
    counted = {"rows": rows} if all(unit.num_rows for unit in pending) else {}
    return {"units": len(pending), "of_units": len(run.units), "num_bytes": _bytes_of(pending, run.units), **counted}


def _bytes_of(units: Sequence[SourceUnit], planned: Sequence[SourceUnit]) -> int:
    """Bytes of source files behind units: each file's, by the unit's share of its rows."""
    parts: dict[str, int] = defaultdict(int)
    for unit in planned:
        parts[unit.file.uri] += _weight(unit)
    return round(sum(unit.file.size * _weight(unit) / parts[unit.file.uri] for unit in units))


def _weight(unit: SourceUnit) -> int:
    return unit.num_rows or max(1, unit.part[1] - unit.part[0])


def _encode_work(run: Run, rows: int) -> dict[str, int]:
    from pipelines.encode.plan import pending

    config = run.config.encode
    assert config
    pairs = prompts = shards = 0
    if pairs_table(run.storage).version is not None:
        todo = pending(config, run.storage, include_empty_prompt=run.config.wants_empty_prompt)
        pairs, prompts = (sum(unit.rows.num_rows for unit in units) for units in (todo.latents, todo.texts))
        shards = len(todo.latents)
    work = {"shards": shards, "pairs": pairs + rows, "latent_bytes": (pairs + rows) * _latent_bytes(config)}
    return work | ({} if rows else {"prompts": prompts})


def _latent_bytes(config: EncodeConfig) -> int:
    """Of a pair of full-size buckets, as all buckets are, nearly."""
    channels, side = LATENT_CHANNELS, config.resolution // VAE_FACTOR
    if config.source.is_fetched():
        channels = int(read_config(config.source.vae_folder() / "config.json").get("latent_channels", channels))
    num_latents = 4 if config.flips else 2
    return num_latents * channels * side * side * DTYPE_BYTES[config.dtype]


def _train_work(run: Run, _: int) -> dict[str, int]:
    from orchestration.stages.actions import train_spec
    from training.state.checkpoint_format import committed

    config = run.config.train
    assert config
    done = 0
    spec = train_spec(run)
    if spec is not None and (manifests := committed(run.storage, spec.checkpoints)):
        done = manifests[-1].step
    steps = max(0, config.max_steps - done)
    work = {"steps": steps, "of_steps": config.max_steps, "pairs": steps * config.global_batch_size}
    return work | {"workers": config.worker_range[0]}


def _with_settings(run: Run, plan: StagePlan) -> StagePlan:
    from orchestration.stages.actions import train_spec
    from orchestration.stages.training_notes import training_notes, training_settings, version_notes

    config = run.config.train
    assert config
    spec = train_spec(run) if plan.state in (TO_DO, UP_TO_DATE) else None
    begun, versions = (None, []) if spec is None else (spec.config, version_notes(spec))
    if plan.state == UP_TO_DATE:
        return replace(plan, remarks=versions)
    settings, remarks = training_settings(config, begun), training_notes(config, begun)
    return replace(plan, settings=settings, remarks=[*remarks, *versions])


def _evaluate_work(run: Run, _: int) -> dict[str, int]:
    return {"samples": 2 * run.config.evaluate.num_samples}


def _no_work(run: Run, _: int) -> dict[str, int]:
    return {}


WORK = {
    "ingest": _ingest_work,
    "encode": _encode_work,
    "train": _train_work,
    "export": _no_work,
    "evaluate": _evaluate_work,
    "report": _no_work,
}


def plan_json(run: Run, plans: Sequence[StagePlan]) -> dict[str, Any]:
    """The plan as plain data."""
    return {"run": run.config.name, "storage": run.storage.url, "stages": [asdict(plan) for plan in plans]}


def plan_text(plans: Sequence[StagePlan]) -> list[str]:
    """The plan for a terminal: a line a stage, and below it its way out and its remarks."""
    lines = []
    for plan in plans:
        lines.append(f"{plan.stage:<9} {plan.state:<11} {_detail(plan)}".rstrip())
        way_out = plan.note.splitlines()[1:] if plan.state == BLOCKED else []
        lines += [f"{'':<21} {line}" for line in (*way_out, *plan.remarks)]
    return lines


def _detail(plan: StagePlan) -> str:
    note = plan.note.partition("\n")[0]
    return ", ".join(part for part in (note if plan.state != TO_DO else "", _work_text(plan.work)) if part)


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
    """Bytes as people read them, in powers of 1000."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    power = min(int(math.log10(num_bytes) // 3), 5)
    return f"{num_bytes / 1000**power:.1f} {' kMGTP'[power]}B"
