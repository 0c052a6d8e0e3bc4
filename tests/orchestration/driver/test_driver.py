"""Who drives a run, and how it is stopped: the installed command in processes of its own."""

import contextlib
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from command import Command
from encode_steps import encode_here, ingest_here
from factories import photo_pairs, write_parquet

from orchestration.config import RunConfig
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, TextEncoder

MAX_STEPS = 120


@pytest.fixture(scope="module")
def encoded(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a configuration whose pairs are encoded."""
    folder = tmp_path_factory.mktemp("driver")
    write_parquet(folder / "data" / "pairs.parquet", photo_pairs(48, num_prompts=6), row_group_size=16)
    train = {"num_workers": 1, "global_batch_size": 4, "micro_batch_size": 4, "max_steps": MAX_STEPS}
    train |= {"learning_rate": 1e-4, "precision": "fp32", "checkpoint_every": 1000, "validate_every": 1000}
    settings = {
        "name": "small",
        "storage": "storage",
        "ingest": {"sources": [{"format": "pickapic", "path": str(folder / "data" / "*.parquet")}]},
        "encode": {"model": str(tiny_pipeline), "resolution": 64, "batch_size": 8},
        "train": train,
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    config = RunConfig.model_validate(settings | {"storage": str(folder / "storage")})
    storage, source = Storage(config.storage), config.encode.source
    ingest_here(storage, folder / "data" / "pairs.parquet")
    encode_here(config.encode, storage, LatentEncoder(source), TextEncoder(source))
    return folder


@pytest.fixture
def folder(encoded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "work"))


class Driver(Command):
    """`mapo STAGE` on a folder's configuration."""

    def __init__(self, folder: Path, stage: str, *options: str) -> None:
        self.run = folder / "storage" / "runs" / "small"
        super().__init__(stage, folder / "small.yaml", *options, cwd=folder)

    def __enter__(self) -> "Driver":
        return self

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not is_so():
            assert self.process.poll() is None, f"it has ended\n{self.process.communicate()}"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.look()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Stop what Ray has started for it, and what Ray still starts: it lives, and gets no further."""
        is_over = threading.Event()

        def hold() -> None:
            while not is_over.wait(0.05):
                with contextlib.suppress(psutil.NoSuchProcess):
                    for each in psutil.Process(self.process.pid).children(recursive=True):
                        if "ray::" in " ".join(each.cmdline()[:1]):
                            each.suspend()

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    @property
    def step(self) -> int:
        """Where its training is; 0 before the first step of this driver."""
        progress = read_json(self.run / "progress.json")
        began = psutil.Process(self.process.pid).create_time()
        return int(progress["step"]) if progress and progress["started_at"] > began else 0


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def newest_step(run: Path) -> int:
    """Of the newest whole checkpoint; -1 without one."""
    return max(
        (json.loads(file.read_text())["step"] for file in run.glob("checkpoints/*/step-*/manifest.json")), default=-1
    )


def events(run: Path) -> Iterator[tuple[str, str | None]]:
    for file in sorted(run.glob("journal/*.json")):
        event = json.loads(file.read_text())
        yield event["event"], event.get("stage")


def check_that_a_second_is_refused(first: Driver, folder: Path, *options: str) -> None:
    """While the first is held: it could be done before the second has looked."""
    with first.held(), Driver(folder, "run", *options) as second:
        assert second.wait() == 1
    assert re.search(rf"LeaseError: run small is already running: pid {first.process.pid} on ", second.errors)
    assert second.errors.count("hint: ") == 1


def test_a_second_driver_is_refused_and_a_killed_one_is_followed(folder: Path) -> None:
    options = ("-o", "storage=other")
    with Driver(folder, "ingest", *options) as first:
        first.until(lambda: ("began", "ingest") in events(folder / "other/runs/small"))
        check_that_a_second_is_refused(first, folder, *options)
        first.kill()
        with Driver(folder, "ingest", *options) as third:
            assert third.wait() == 0, third.errors
    assert "48 rows: 48 kept" in third.output


@pytest.mark.slow
def test_one_that_is_killed_in_a_training_is_followed_from_its_newest_checkpoint(folder: Path) -> None:
    options = ("-o", "train.max_steps=24", "-o", "train.checkpoint_every=4")
    with Driver(folder, "train", *options) as first:
        first.until(lambda: newest_step(first.run) >= 4)
        check_that_a_second_is_refused(first, folder, *options)
        left_at = newest_step(first.run)
        first.kill()
        with Driver(folder, "train", *options) as third:
            assert third.wait() == 0, third.errors
    goes_on = re.search(r"restart 2: resuming from step (\d+)", third.output)
    assert goes_on
    assert 4 <= left_at <= int(goes_on[1]) < 24
    assert newest_step(first.run) == 24


@pytest.mark.slow
def test_a_stopped_driver_leaves_a_checkpoint_from_which_the_next_goes_on(folder: Path) -> None:
    with Driver(folder, "train") as first:
        first.until(lambda: first.step >= 2)
        first.process.send_signal(signal.SIGTERM)
        assert first.wait() == 130
    assert "stopped by SIGTERM; rerun the same command to resume" in first.errors
    stopped_at = newest_step(first.run)
    assert 2 <= stopped_at < MAX_STEPS, "it has left a checkpoint that no interval asked for"
    assert list(events(first.run))[-2:] == [("began", "train"), ("stopped", "train")]
    with Driver(folder, "train") as second:
        assert second.wait() == 0, second.errors
    assert f"restart 2: resuming from step {stopped_at}" in second.output
    assert newest_step(first.run) == MAX_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 2, 4, 6, 8])
def test_a_driver_is_stopped_while_its_workers_start(folder: Path, seconds: int) -> None:
    with Driver(folder, "train") as driver:
        driver.until(lambda: ("began", "train") in events(driver.run))
        driver.sleep(seconds)
        driver.process.send_signal(signal.SIGTERM)
        assert driver.wait() == 130, driver.errors
        left = psutil.wait_procs(list(driver._family), timeout=90)[1]  # Ray's agents notice within a minute
        assert left == []
    assert "stopped by SIGTERM; rerun the same command to resume" in driver.errors


@pytest.mark.slow
def test_a_request_on_the_storage_stops_a_run(folder: Path) -> None:
    with Driver(folder, "train") as driver:
        driver.until(lambda: driver.step >= 1)
        (driver.run / "stop.json").write_text(json.dumps({"requested_at": "2026-01-01T00:00:00Z", "by": "ada"}))
        assert driver.wait() == 130
    assert "stopped by request of ada; rerun the same command to resume" in driver.errors
    assert not (driver.run / "stop.json").exists()
    assert newest_step(driver.run) >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_in_ingest_ends_it_at_once_and_the_same_command_goes_on(folder: Path, number: int) -> None:
    options = ("-o", "storage=other", "-o", "ingest.max_shard_bytes=65536")
    with Driver(folder, "ingest", *options) as driver:
        driver.until(lambda: bool(list((folder / "other/dataset/shards").glob("*.tar"))))
        driver.process.send_signal(number)
        assert driver.wait() in (0, 130)  # 0: it had committed the last unit
    with Driver(folder, "ingest", *options) as again:
        assert again.wait() == 0, again.errors
    assert "48 rows: 48 kept" in again.output


def test_the_plan_is_printed_and_nothing_is_written(folder: Path) -> None:
    before = {str(f): f.stat().st_mtime_ns for f in folder.rglob("*")}
    with Driver(folder, "run", "--dry-run", "--json") as driver:
        assert driver.wait() == 0, driver.errors
    stages = {plan["stage"]: plan for plan in json.loads(driver.output)["stages"]}
    assert [plan["state"] for plan in stages.values()] == ["up to date", "up to date", "to do", *["waits"] * 3]
    assert stages["train"]["work"] == {"steps": MAX_STEPS, "of_steps": MAX_STEPS, "pairs": 4 * MAX_STEPS, "workers": 1}
    assert {str(f): f.stat().st_mtime_ns for f in folder.rglob("*")} == before
    with Driver(folder, "run", "--dry-run", "-o", "storage=new") as driver:
        assert driver.wait() == 0, driver.errors
    lines = driver.output.splitlines()
    assert re.fullmatch(r"ingest    to do       1 of 1 units, [\d.]+ kB, 48 rows", lines[0])
    assert re.fullmatch(r"encode    waits       after ingest, 0 shards, 48 pairs, [\d.]+ kB of latents", lines[1])
    assert not (folder / "new").exists()
