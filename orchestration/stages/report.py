"""The stage `report`: one self-contained page of the run, and the index of all runs."""

from __future__ import annotations

from orchestration.run.context import Outcome, Run
from orchestration.stages.registry import ALL_STAGES, REPORT
from orchestration.stages.stage import Look, digest

REPORT_VERSION = 3  # raise it when a page that stands is wrong: every finished run then writes its report anew


def look(run: Run) -> Look:
    """Compare the records of all stages before it with those of the last page."""
    from orchestration.config import comparable

    records = [run.journal.record(name) for name in ALL_STAGES if name != REPORT]
    made = [[each.stage, each.key, each.finished_at] for each in records if each]
    key, record = digest(REPORT_VERSION, made, comparable(run.config)), run.journal.record(REPORT)
    is_done = record is not None and record.key == key and run.storage.exists(run.report)
    return Look(key, is_done, lambda: _report(run))


def _report(run: Run) -> Outcome:
    from orchestration.report.writer import write_report
    from orchestration.run.context import command_line

    return Outcome(run.storage.uri(write_report(run, command=command_line(), is_driven=False)))
