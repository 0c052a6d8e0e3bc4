"""One driver for a run at a time: a lease on the storage, which a living driver renews and a dead one loses.

A driver's turn is a *term*: an object `lease/<term>.json` that can be created once, so of several drivers that want the
next term one gets it. Its holder rewrites `lease/<term>.beat` every few seconds. Whoever finds the newest term without
a beat for `TTL_S`, measured on its own clock, may create the next; clocks of two machines are never compared. A driver
that finds a newer term than its own has lost the run, and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from orchestration.run.job_id import submission_id
from orchestration.run.journal import now
from pipelines.dataset.errors import LeaseError, MapoError
from pipelines.dataset.secrets import redact
from pipelines.dataset.storage import Storage

BEAT_S = 5.0
TTL_S = 30.0  # several beats, and a storage that stutters in between
POLL_S = 0.5
TERM = re.compile(r"(\d{6})\.json")


@dataclass(frozen=True)
class Holder:
    """Who drives a run: for people, and for others on the same machine to see whether it lives."""

    id: str
    host: str
    pid: int
    started_at: str
    command: str
    job: str | None
    """Submission id, if it runs as a Ray job."""
    machine: str
    """Boot and process namespace: only where these are the same does the pid mean anything."""
    born: float
    """When the process was created, by the machine's own clock: pids come again."""

    @staticmethod
    def here(command: str) -> Holder:
        """This process."""
        return Holder(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=now(),
            command=redact(command),
            job=submission_id(),
            machine=_machine(),
            born=psutil.Process().create_time(),
        )

    def is_dead(self) -> bool:
        """Whether its process is known to be gone; False also where this cannot be told."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() != self.born or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        job = f", Ray job {self.job}" if self.job else ""
        return f"pid {self.pid} on {self.host}{job} (`{self.command}`, since {self.started_at})"


class Terms:
    """The terms of a run's lease as they lie on the storage.

    Args:
        storage: Of the run.
        folder: The run's folder.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self.folder = storage, f"{folder}/lease"

    def newest(self) -> int:
        """The newest term; 0 before the first."""
        found = (TERM.fullmatch(name.rpartition("/")[2]) for name in self._storage.names(self.folder))
        return max((int(match[1]) for match in found if match), default=0)

    def file(self, term: int, kind: str = "json") -> str:
        """The name of a term's object, or of its `beat`."""
        return f"{self.folder}/{term:06d}.{kind}"

    def holder(self, term: int) -> Holder | None:
        """Who took a term; None if it has been tidied away."""
        content = self._read(self.file(term))
        return Holder(**content) if content else None

    def beat(self, term: int) -> dict[str, Any]:
        """What its holder last said of a term; empty before the first beat."""
        return self._read(self.file(term, "beat"))

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self._storage.read(name))
        except MapoError:
            if self._storage.exists(name):
                raise
            return {}
        return content


class Lease:
    """The right to drive one run; a context manager that takes it and gives it back.

    Args:
        storage: Of the run.
        folder: The run's folder.
        command: What this driver was called with.
        on_beat: Called after every beat, from another thread.
        on_lost: Called with a reason when another driver has taken the run over, from another thread.

    Raises:
        LeaseError: Another driver works on the run.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        command: str,
        *,
        on_beat: Callable[[], None] = lambda: None,
        on_lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._storage, self._terms, self._name = storage, Terms(storage, folder), folder.rpartition("/")[2]
        self.holder = Holder.here(command)
        self._on_beat, self._on_lost = on_beat, on_lost
        self._term, self._num_beats = 0, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        while not self._try():
            pass
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(MapoError):  # it runs out by itself
            if self._terms.newest() == self._term:
                self._write_beat(released=True)

    def confirm(self) -> None:
        """Make sure, before something is recorded, that the run is still this driver's.

        Raises:
            LeaseError: Another driver has taken it over.
        """
        if (newest := self._terms.newest()) > self._term:
            raise LeaseError(self._lost(newest), "it goes on; `mapo status` shows where it is")

    def _try(self) -> bool:
        """Take the next term if the newest is free; False if another driver was faster."""
        newest = self._terms.newest()
        if newest:
            self._wait_until_free(newest)
        content = json.dumps(asdict(self.holder), indent=1).encode()
        if not self._storage.create(self._terms.file(newest + 1), content) or self._terms.newest() != newest + 1:
            return False  # the second: this one was slow, and its term had been taken, given back and tidied away
        self._term = newest + 1
        self._write_beat()
        self._tidy()
        return True

    def _wait_until_free(self, term: int) -> None:
        """Until the term was given back, or its holder is dead or has not renewed it for TTL_S; raises if it lives."""
        holder, beat, seen = self._terms.holder(term), self._terms.beat(term), time.monotonic()
        while not beat.get("released") and not (holder and holder.is_dead()):
            if time.monotonic() - seen > TTL_S or self._terms.newest() != term:
                return
            time.sleep(POLL_S)
            newest = self._terms.beat(term)
            if newest.get("beats", 0) != beat.get("beats", 0) and not newest.get("released"):
                raise LeaseError(
                    f"run {self._name} is driven by {holder or 'another driver'}",
                    "wait for it, or stop it with `mapo stop`; another `name` is another run",
                )
            beat = newest

    def _renew(self) -> None:
        while not self._closed.wait(BEAT_S):
            try:
                newest = self._terms.newest()
                if newest > self._term:
                    self._on_lost(self._lost(newest))
                    return
                self._write_beat()
                self._on_beat()
            except MapoError:
                continue  # the storage is away for a moment: if it stays so, nothing can be recorded anyway

    def _lost(self, term: int) -> str:
        with contextlib.suppress(MapoError):
            return f"run {self._name} was taken over by {self._terms.holder(term) or 'another driver'}"
        return f"run {self._name} was taken over by another driver"

    def _write_beat(self, *, released: bool = False) -> None:
        self._num_beats += 1
        beat = {"beats": self._num_beats, "at": now(), "released": released}
        self._storage.write(self._terms.file(self._term, "beat"), json.dumps(beat).encode())

    def _tidy(self) -> None:
        """Remove terms that are over; the newest always stays, so that numbers only grow."""
        for name in self._storage.names(self._terms.folder):
            number = name.rpartition("/")[2].partition(".")[0]
            if number.isdigit() and int(number) < self._term:
                self._storage.delete(name)


def current_holder(storage: Storage, folder: str) -> Holder | None:
    """Who drives a run as far as a look at the storage tells; None if nobody, or if its process is known to be gone.

    A driver that died on another machine is still named, until another takes over.
    """
    terms = Terms(storage, folder)
    term = terms.newest()
    if not term or terms.beat(term).get("released"):
        return None
    holder = terms.holder(term)
    return None if holder is None or holder.is_dead() else holder


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:  # noqa: PTH123
            return f"{boot.read().strip()}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return ""
