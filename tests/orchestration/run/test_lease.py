"""One driver for a run at a time, whatever happens to it: on a folder and on S3."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.run import lease as lease_module
from orchestration.run.lease import Holder, Lease, current_holder
from pipelines.dataset.errors import LeaseError
from pipelines.dataset.storage import Storage

FOLDER = "runs/photos"
HOLD = """
import sys, time
from orchestration.run.lease import Lease
from pipelines.dataset.storage import Storage
with Lease(Storage(sys.argv[1]), "runs/photos", "mapo run photos.yaml"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path)) if request.param == "folder" else request.getfixturevalue("s3_storage")


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats and their end in fractions of a second."""
    for name, seconds in (("BEAT_S", 0.2), ("TTL_S", 1.5), ("POLL_S", 0.05)):
        monkeypatch.setattr(lease_module, name, seconds)


@pytest.fixture
def holding(local: Storage) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lease for a minute."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, local.url, "60"], stdout=subprocess.PIPE)
    assert other.stdout
    assert other.stdout.readline() == b"held\n"
    yield other
    other.kill()
    other.wait()
    other.stdout.close()


def lease(storage: Storage, **options) -> Lease:
    return Lease(storage, FOLDER, "mapo run photos.yaml", **options)


def test_of_many_drivers_at_once_one_gets_the_run(storage: Storage, quick: None) -> None:
    won, lost, together = [], [], threading.Barrier(6)

    def drive() -> None:
        mine = lease(storage)
        together.wait()
        try:
            with mine:
                won.append(mine.holder.id)
                time.sleep(1.5)
        except LeaseError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == 5
    assert all(f"run photos is already running: pid {os.getpid()} on" in error for error in lost)
    assert all("hint: " in error for error in lost)


def test_a_run_that_was_given_back_is_free_at_once(storage: Storage) -> None:
    with lease(storage):
        pass
    started = time.monotonic()
    with lease(storage) as second:
        second.confirm()
    assert time.monotonic() - started < 5
    assert len([name for name in storage.names(f"{FOLDER}/lease") if name.endswith(".json")]) == 1, "tidied"


def test_a_living_holder_is_named_and_keeps_the_run(local: Storage, holding: subprocess.Popen[bytes]) -> None:
    with (
        pytest.raises(LeaseError, match=f"running: pid {holding.pid} on .*`mapo run photos.yaml`"),
        lease(local),
    ):
        pass
    held = current_holder(local, FOLDER)
    assert held is not None
    assert held.pid == holding.pid


def test_a_killed_holder_on_this_machine_is_followed_at_once(local: Storage, holding: subprocess.Popen[bytes]) -> None:
    holding.send_signal(signal.SIGKILL)
    holding.wait()
    assert current_holder(local, FOLDER) is None
    started = time.monotonic()
    with lease(local) as mine:
        assert time.monotonic() - started < 5
        mine.confirm()


def test_a_holder_elsewhere_that_does_not_beat_any_more_is_followed_after_the_time_limit(
    storage: Storage, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease, "_renew", lambda self: None)
    dead = lease(storage)
    dead.__enter__()
    monkeypatch.undo()
    for name, seconds in (("BEAT_S", 0.2), ("TTL_S", 1.5), ("POLL_S", 0.05)):
        monkeypatch.setattr(lease_module, name, seconds)
    started = time.monotonic()
    with lease(storage) as mine:
        assert time.monotonic() - started > 1.5
        mine.confirm()
        with pytest.raises(LeaseError, match="was taken over by pid"):
            dead.confirm()


def test_who_was_taken_over_is_told(local: Storage, quick: None) -> None:
    reasons: list[str] = []
    told = threading.Event()

    def on_lost(reason: str) -> None:
        reasons.append(reason)
        told.set()

    with lease(local, on_lost=on_lost) as mine:
        other = Holder.here("mapo run photos.yaml")
        local.write(f"{FOLDER}/lease/000002.json", json.dumps(other.__dict__).encode())
        assert told.wait(10)
        with pytest.raises(LeaseError):
            mine.confirm()
    assert reasons == [f"run photos was taken over by {other}"]
    assert not local.exists(f"{FOLDER}/lease/000002.beat"), "what was lost is not given back"


def test_beats_go_on_after_a_storage_was_away(local: Storage, quick: None, tmp_path: Path) -> None:
    lost: list[str] = []
    with lease(local, on_lost=lost.append) as mine:
        folder = tmp_path / FOLDER / "lease"
        folder.rename(tmp_path / "away")
        (tmp_path / FOLDER / "lease").write_text("in the way")
        time.sleep(0.6)
        (tmp_path / FOLDER / "lease").unlink()
        (tmp_path / "away").rename(folder)
        before = json.loads(local.read(f"{FOLDER}/lease/000001.beat"))["beats"]
        deadline = time.monotonic() + 10
        while json.loads(local.read(f"{FOLDER}/lease/000001.beat"))["beats"] == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        mine.confirm()
    assert lost == []


def test_create_is_for_the_first_alone(storage: Storage) -> None:
    assert storage.create("once", b"first")
    assert not storage.create("once", b"second")
    assert storage.create("once", b"first"), "an answer that was lost: the same bytes are there"
    assert storage.read("once") == b"first"


class WritesBetween(Storage):
    """A storage on which another driver writes its first beat just after this one has looked for it."""

    def read(self, name: str) -> bytes:
        try:
            return super().read(name)
        finally:
            if name.endswith(".beat") and not self.exists(name):
                self.write(name, json.dumps({"beats": 1, "at": "", "released": False}).encode())


def test_a_beat_that_is_written_just_after_the_look_is_no_error(tmp_path: Path) -> None:
    terms = lease_module.Terms(WritesBetween(str(tmp_path)), FOLDER)
    assert terms.beat(1) == lease_module.Beat()
    assert terms.beat(1).beats == 1
