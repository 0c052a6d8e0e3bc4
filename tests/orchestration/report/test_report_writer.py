"""The report of a live run: from its journal, its checkpoints and what was seen, without ever failing the run."""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_sample import Page

from orchestration.config import parse_config
from orchestration.driver.runner import _growing_report
from orchestration.report import writer as report_writer
from orchestration.report.data import report_data
from orchestration.report.index import INDEX, SUMMARY
from orchestration.report.live_curves import SEEN, SeenSteps, live_curves, read_progress
from orchestration.report.writer import ReportWriter, write_report
from orchestration.run.context import Run
from orchestration.run.journal import Journal
from orchestration.run.lease import Lease, Terms
from pipelines.dataset.errors import StorageError
from pipelines.dataset.storage import Storage
from training.state.checkpoint_format import MANIFEST, STATE, Manifest

KEY = "0123456789abcdef"
WORKER = {"rank": 0, "world_size": 1, "node": "10.0.0.1", "pid": 1, "device": "cpu", "backend": "gloo", "zero_stage": 2}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    train = "{num_workers: 1, validate_every: 5}"
    text = f"{{name: photos, storage: {tmp_path}/storage, encode: {{model: m}}, train: {train}}}"
    return Run.open(parse_config(text), lambda line: None)


def step(number: int, loss: float = 1.0) -> dict[str, float]:
    return {"step": number, "loss": loss, "step_s": 2.0}


def put_progress(run: Run, number: int, *, key: str = KEY, held_out: float | None = None) -> None:
    last = step(number) | ({} if held_out is None else {"validation_loss": held_out, "validation_num_pairs": 8.0})
    state = {"key": key, "step": number, "max_steps": 100, "starts": 1, "started_at": 1.0, "start_up_s": {}}
    content = state | {"workers": [WORKER], "notes": [], "last": last if number else {}}
    run.storage.write(f"{run.folder}/progress.json", json.dumps(content).encode())


def put_checkpoint(run: Run, number: int) -> None:
    history = {"steps": [step(i, 0.5) for i in range(1, number + 1)], "validations": [{"step": 0, "loss": 0.4}]}
    state = json.dumps({"history": history}).encode()
    folder = f"{run.folder}/checkpoints/{KEY}/step-{number:08d}"
    manifest = Manifest(folder, number, 1, 2, None, {STATE: hashlib.sha256(state).hexdigest()}, {})
    run.storage.write(f"{folder}/{STATE}", state)
    run.storage.write(f"{folder}/{MANIFEST}", manifest.to_json())


def text_of(run: Run) -> str:
    return " ".join(Page(run.storage.read(run.report).decode()).text.split())


def test_a_page_can_be_written_before_anything_has_run(run: Run) -> None:
    write_report(run, command="mapo run photos.yaml")
    assert "Not trained yet" in text_of(run)
    assert run.storage.exists(INDEX)


def test_a_failure_is_on_the_page_with_its_stage_and_message(run: Run) -> None:
    run.journal.event(
        "started", by="pid 1 on here (`mapo run p.yaml -o seed=1`, since now)", stages=["ingest", "encode"]
    )
    run.journal.event("began", stage="ingest")
    run.journal.event("failed", stage="ingest", error="StorageError", message="no space left\nhint: make room")
    write_report(run, command="mapo run photos.yaml", is_driven=False)
    text = text_of(run)
    assert "Failed during ingest no space left hint: make room" in text
    assert "mapo run p.yaml -o seed=1" in text


def test_a_stage_that_began_is_running_with_a_driver_and_lost_without_one(run: Run) -> None:
    run.journal.event("started", by="x", stages=["ingest", "encode", "train"])
    run.journal.event("began", stage="ingest")
    for is_driven, state, states in ((True, "running", ["running", "waits", "waits", "not run", "not run"]),
                                     (False, "lost", ["lost", "not run", "not run", "not run", "not run"]),
                                     (None, "lost", ["lost", "not run", "not run", "not run", "not run"])):  # fmt: skip
        data = report_data(run.config, run.storage, run.journal, command="", is_driven=is_driven)
        assert (data.state, [stage.status for stage in data.stages]) == (state, states)


def test_the_last_page_of_a_run_shows_it_as_finished(run: Run) -> None:
    key, version = "0" * 32, "1"
    details = {"snapshot": {"pairs_version": None, "latents_fingerprint": key, "text_fingerprint": key}, "steps": 2}
    details |= {"workers": [WORKER | {"num_pairs": 2, "digest": version}], "starts": 1}
    details |= {"history": {"steps": [step(1), step(2)], "validations": []}, "model": "m", "scores": [], "samples": []}
    details |= {"num_samples": 0, "num_inference_steps": 1, "guidance_scale": 1.0}
    for stage in ("ingest", "encode", "train", "export", "evaluate"):
        run.journal.event("began", stage=stage)
        run.journal.finish(stage, key="k", summary="s", seconds=1.0, details=details)
    run.journal.event("began", stage="report")
    write_report(run, command="mapo run", is_driven=False)
    assert json.loads(run.storage.read(f"{run.folder}/{SUMMARY}"))["state"] == "finished"
    page = run.storage.read(run.report).decode()
    assert "Trained for 2 steps" in page
    assert "refresh" not in page
    run.journal.event("failed", stage="report", message="no space left")
    assert report_data(run.config, run.storage, run.journal, command="", is_driven=False).state == "failed"


def test_live_curves_join_the_checkpoint_and_what_was_seen_since(run: Run) -> None:
    seen = SeenSteps(run.storage, run.folder, validate_every=5)
    for number, held_out in ((1, 0.4), (2, 0.4), (7, 0.3)):
        put_progress(run, number, held_out=held_out)
        seen.look()
    put_checkpoint(run, 4)
    seen.save()
    put_progress(run, 9, held_out=0.3)
    progress = read_progress(run.storage, run.folder)
    assert progress is not None
    curves = live_curves(run.storage, run.folder, progress, validate_every=5)
    assert [(row["step"], row["loss"]) for row in curves.steps] == [
        *((i, 0.5) for i in (1, 2, 3, 4)),
        (7, 1.0),
        (9, 1.0),
    ]
    assert [(row["step"], row["loss"]) for row in curves.validations] == [(0, 0.4), (5, 0.3)]


def test_restarted_workers_replace_what_was_seen(run: Run) -> None:
    seen = SeenSteps(run.storage, run.folder, validate_every=5)
    for number in (6, 7, 3, 4):
        put_progress(run, number)
        seen.look()
    assert [row["step"] for row in seen.steps] == [3, 4]
    put_progress(run, 1, key="f" * 16)
    seen.look()
    assert [row["step"] for row in seen.steps] == [1]


def test_a_damaged_checkpoint_contributes_no_curve(run: Run) -> None:
    put_checkpoint(run, 4)
    run.storage.write(f"{run.folder}/checkpoints/{KEY}/step-00000004/{STATE}", b'{"history": {}}')
    put_progress(run, 5)
    progress = read_progress(run.storage, run.folder)
    assert progress is not None
    assert [row["step"] for row in live_curves(run.storage, run.folder, progress, validate_every=5).steps] == [5]


def test_the_cost_counts_every_execution_and_names_those_it_cannot_count(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for minute, (event, facts) in enumerate(
        (("began", {}), ("failed", {"message": "x"}), ("began", {}), ("began", {}), ("stopped", {"reason": "y"}))
    ):
        monkeypatch.setattr("orchestration.run.journal.now", lambda minute=minute: f"2026-11-24T12:{minute:02}:00Z")
        run.journal.event(event, stage="train", **facts)
    put_progress(run, 5)
    cost = report_data(run.config, run.storage, run.journal, command="", is_driven=False).cost
    assert cost.cpu_hours == pytest.approx(2 / 60)
    assert (cost.gpu_hours, cost.num_lost, cost.stages[0].num_executions) == (0, 1, 3)


@pytest.mark.parametrize(("num_workers", "count"), [("4", 4), ("2..8", 8)])
def test_the_cost_of_an_evaluation_follows_its_workers(
    num_workers: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{{name: p, storage: {tmp_path}, encode: {{model: m}}, evaluate: {{num_workers: {num_workers}}}}}"
    run = Run.open(parse_config(text), lambda line: None)
    for minute, event in ((0, "began"), (30, "stopped")):
        monkeypatch.setattr("orchestration.run.journal.now", lambda minute=minute: f"2026-11-24T12:{minute:02}:00Z")
        run.journal.event(event, stage="evaluate")
    cost = report_data(run.config, run.storage, run.journal, command="", is_driven=False).cost
    assert cost.cpu_hours == pytest.approx(count / 2)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_the_writer_follows_the_run_and_writes_nothing_once_closed(run: Run) -> None:
    run.journal.event("started", by="x", stages=["train"])
    run.journal.event("began", stage="train")
    put_progress(run, 3)
    with ReportWriter(run, command="mapo run", every_s=0.01) as writer:
        wait_for(lambda: run.storage.exists(run.report) and "step 3 of 100" in text_of(run))
        put_progress(run, 8)
        wait_for(lambda: "step 8 of 100" in text_of(run))
    written = run.storage.read(run.report)
    put_progress(run, 9)
    assert not writer._thread.is_alive()
    assert run.storage.read(run.report) == written
    assert run.storage.exists(f"{run.folder}/{SEEN}")


def test_a_failing_writer_does_not_fail_the_run(run: Run, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def refuse(self: Storage, name: str, data: bytes) -> None:
        raise StorageError("no space left", "make room")

    log = logging.Logger("alone")  # a library in the same process may have changed the levels of all others
    log.addHandler(caplog.handler)
    monkeypatch.setattr(report_writer, "log", log)
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    monkeypatch.setattr(Storage, "write", refuse)
    monkeypatch.setattr("orchestration.report.writer.MAX_LOAD", 1e9)
    with ReportWriter(run, command="mapo run", every_s=0.01):
        wait_for(lambda: caplog.text.count("report not written: no space left") >= 2)


@pytest.mark.parametrize("is_taken_over", [False, True])
def test_the_last_page_of_a_failed_run_is_written_by_whoever_drives_it(
    run: Run, is_taken_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bool] = []
    monkeypatch.setattr(ReportWriter, "write", lambda self, *, is_driven: written.append(is_driven))

    def fail() -> None:
        if is_taken_over:
            run.storage.create(Terms(run.storage, run.folder).file(2), b"{}")
        raise ValueError("it fails")

    lease = Lease(run.storage, run.folder, "mapo run")
    with pytest.raises(ValueError, match="it fails"), lease, _growing_report(replace(run, goal=("report",)), lease):
        fail()
    assert written == ([] if is_taken_over else [False])


def test_a_closed_writer_drops_the_page_it_was_making(run: Run) -> None:
    is_stopped = threading.Event()
    is_stopped.set()
    write_report(run, command="mapo run", is_stopped=is_stopped)
    assert run.storage.names() == []


def test_secrets_of_the_environment_are_not_on_the_pages(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-7f3a-0123")
    Journal(run.storage, "photos").event("began", stage="train")
    put_progress(run, 3)
    write_report(run, command="mapo run --token canary-7f3a-0123")
    assert len(run.storage.names()) >= 4
    assert all(b"canary-7f3a" not in run.storage.read(name) for name in run.storage.names())
