"""The stage `ingest`: from preference sources to pair shards; the table records which units are done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestration.run.context import Outcome, Run
from orchestration.stages.stage import Look, digest
from pipelines.dataset.layout import pairs_table
from pipelines.maintenance.accounting import summary_line
from pipelines.maintenance.describe import describe_dataset

if TYPE_CHECKING:
    from pipelines.sources.unit import SourceUnit


def look(run: Run) -> Look:
    """Compare the units of all sources with the table."""
    from pipelines.ingest.policy import Policy

    assert run.config.ingest
    key = digest(sorted(unit.id for unit in run.units), asdict(Policy.of(run.config.ingest)))
    return Look(key, is_done(run, key), lambda: _ingest(run, key), amount=lambda: _amount(run))


def estimate(run: Run, rows: int) -> Mapping[str, int]:
    """Count what is in the sources but not in the table."""
    return _amount(run)


def is_done(run: Run, key: str) -> bool:
    """Return whether every unit is in the table, each row follows the policy, and drops are within the limit.

    The table is read only if it has changed since an ingest of this run last found it so.
    """
    from pipelines.ingest.execution import check_drop_budget, is_up_to_date

    assert run.config.ingest
    record = run.journal.record("ingest")
    if record is not None and record.details.get("checked") == what_was_checked(run, key):
        return True
    if not is_up_to_date(run.config.ingest, run.storage, run.units):
        return False
    check_drop_budget(run.config.ingest, run.storage)
    return True


def what_was_checked(run: Run, key: str) -> list[Any]:
    """Return what a record of the ingest has checked: the key, and the version of the table."""
    assert run.config.ingest
    return [key, run.config.ingest.max_drop_ratio, pairs_table(run.storage).version]


def _ingest(run: Run, key: str) -> Outcome:
    from pipelines.ingest.execution import ingest

    assert run.config.ingest
    if "encode" in run.goal and run.config.encode:
        run.ahead.begin(run.config.ingest, run.config.encode)
    ingest(run.config.ingest, run.storage, run.units)
    details: dict[str, Any] = {} if (ahead := run.ahead.speed()) is None else {"encoded_ahead": [ahead.to_json()]}
    checked = what_was_checked(run, key)  # before the look: another run may commit at any time
    if is_done(run, key):
        details["checked"] = checked
    return Outcome(summary_line(describe_dataset(run.storage)), details)


def _amount(run: Run) -> Mapping[str, int]:
    from pipelines.ingest.execution import pending_of

    pending = pending_of(run.units, run.storage)
    rows = sum(unit.num_rows for unit in pending)
    counted = {"rows": rows} if all(unit.num_rows for unit in pending) else {}
    return {"units": len(pending), "of_units": len(run.units), "num_bytes": _bytes_of(pending, run.units), **counted}


def _bytes_of(units: Sequence[SourceUnit], planned: Sequence[SourceUnit]) -> int:
    """Return the bytes of source files behind units: each file's size times the unit's share of its rows."""
    parts: dict[str, int] = defaultdict(int)
    for unit in planned:
        parts[unit.file.uri] += _weight(unit)
    return round(sum(unit.file.size * _weight(unit) / parts[unit.file.uri] for unit in units))


def _weight(unit: SourceUnit) -> int:
    return unit.num_rows or max(1, unit.part[1] - unit.part[0])
