"""Chaos: whatever fails in whichever stage, the run ends as an undisturbed one, or says in time why it cannot.

The suite runs short forms elsewhere: test_driver.py, test_crash.py, test_encode_crash.py, test_resume.py.
"""

import os
import signal
from pathlib import Path

import pytest
from faults import KINDS, NAMED, NUM_FAULTS, Course, Fault, contents
from s3_faults import faulty_proxy

from pipelines.dataset.storage import Storage

OUTAGES = ("storage away", "storage gone")


@pytest.fixture(scope="module")
def course(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    return Course(tmp_path_factory.mktemp("course"), tiny_pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_FAULTS))
def test_chaos(course: Course, seed: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    fault = Fault.of(seed)
    if fault.kind == "disk full" and os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    if fault.kind in OUTAGES:
        storage: Storage = request.getfixturevalue("s3_storage")
        with faulty_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            code, errors = course.suffer_outage(fault, storage.url, proxy)
    else:
        storage = Storage(str(tmp_path / "storage"))
        code, errors = course.suffer(fault, tmp_path / "storage")
    print(f"{fault}: {code}\n{errors}")
    if code not in (0, -signal.SIGTERM) and NAMED[fault.kind]:  # it may come before there is anything to stop cleanly
        assert any(name in errors for name in NAMED[fault.kind])
        assert "Traceback" not in errors
    if code != 0:
        code, errors = course.again(fault.stage, storage.url)
        assert code == 0, errors
    assert contents(fault.stage, storage) == course.made[fault.stage]


def test_every_kind_comes_in_every_stage_that_can_have_it() -> None:
    faults = [Fault.of(seed) for seed in range(NUM_FAULTS)]
    assert len(faults) >= 40
    assert {(fault.kind, fault.stage) for fault in faults} == {
        (k, stage) for k, stages in KINDS.items() for stage in stages
    }
