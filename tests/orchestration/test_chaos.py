"""Chaos: whatever fails in whichever stage, the run ends as an undisturbed one, or says in time why it cannot."""

import os
from pathlib import Path

import pytest
from faults import KINDS, NAMED, STAGES, Course, Fault, contents

from pipelines.dataset.storage import Storage

SEEDS = range(54)
SHORT = (8,)  # the export, stopped; tests/orchestration/test_driver.py stops and kills drivers of the other stages


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


@pytest.mark.parametrize("seed", SHORT)
def test_a_stage_that_met_a_fault_ends_like_an_undisturbed_one(course: Course, seed: int, tmp_path: Path) -> None:
    check(course, seed, tmp_path / "storage")


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_chaos(course: Course, seed: int, tmp_path: Path) -> None:
    check(course, seed, tmp_path / "storage")


def test_every_kind_comes_in_every_stage_that_can_have_it() -> None:
    faults = [Fault.of(seed) for seed in SEEDS]
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.stage for fault in faults} == set(STAGES)
    assert len({(fault.stage, fault.kind) for fault in faults}) == 27
