"""The course of a run: what is done, also if another run of the storage did it."""

from datetime import UTC, datetime

import pytest

from orchestration.report.course import STAGES_SHOWN, Course, read_course
from orchestration.run.journal import StageRecord

OWN = ("train", "export", "evaluate")


def course_of(*done: str) -> Course:
    """Return the course after these stages have succeeded."""
    records = {
        stage: StageRecord(stage, "0" * 16, "", 1.0, "2026-11-27T00:00:00Z") if stage in done else None
        for stage in STAGES_SHOWN
    }
    return read_course([], records, now=datetime.now(UTC), is_driven=False)


def test_what_another_run_has_ingested_and_encoded_is_done() -> None:
    course = course_of(*OWN)
    assert course.state == "finished"
    assert set(course.stages.values()) == {"done"}


@pytest.mark.parametrize("missing", OWN)
def test_train_export_and_evaluate_are_done_only_by_the_run_itself(missing: str) -> None:
    course = course_of(*(stage for stage in STAGES_SHOWN if stage != missing))
    assert course.state == "partial"
    assert [stage for stage, state in course.stages.items() if state == "not run"] == [missing]


def test_a_finished_encode_implies_ingest_and_nothing_later() -> None:
    course = course_of("encode")
    assert course.state == "partial"
    assert course.stages == dict.fromkeys(("ingest", "encode"), "done") | dict.fromkeys(OWN, "not run")
