"""Chaos: whatever fails in whichever stage, the run ends as an undisturbed one, or says in time why it cannot.

The suite runs short forms elsewhere: test_driver.py, test_crash.py, test_encode_crash.py, test_resume.py.
"""

import os
from pathlib import Path

import pytest
from faults import KINDS, NAMED, STAGES, Course, Fault, contents

from pipelines.dataset.storage import Storage

SEEDS = range(54)


@pytest.fixture(scope="module")
def course(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    return Course(tmp_path_factory.mktemp("course"), tiny_pipeline)


def check(course: Course, seed: int, place: Path) -> None:
    fault = Fault.of(seed)
    if fault.kind == "disk full" and os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    code, errors = course.suffer(fault, place)
    if code != 0 and NAMED[fault.kind]:
        assert any(name in errors for name in NAMED[fault.kind]), f"{fault}: {code}\n{errors}"
        assert "Traceback" not in errors
    if code != 0:
        code, errors = course.again(fault.stage, place)
        assert code == 0, f"{fault}, again: {errors}"
    assert contents(fault.stage, Storage(str(place))) == course.made[fault.stage], fault


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_chaos(course: Course, seed: int, tmp_path: Path) -> None:
    check(course, seed, tmp_path / "storage")


def test_every_kind_comes_in_every_stage_that_can_have_it() -> None:
    faults = [Fault.of(seed) for seed in SEEDS]
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.stage for fault in faults} == set(STAGES)
    assert len({(fault.stage, fault.kind) for fault in faults}) == 27
