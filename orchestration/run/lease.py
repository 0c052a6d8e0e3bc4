"""One driver for a run at a time: a lease on the storage, which a live driver renews and a dead one loses.

A driver's turn is a *term*: an object `lease/<term>.json` that can be created only once, so that exactly one of several
drivers gets the next term. Its holder rewrites `lease/<term>.beat` every few seconds. A driver that sees no new beat in
the newest term for `TTL_S`, by its own clock, may create the next; clocks of two machines are never compared. A driver
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
from dataclasses import asdict, dataclass, fields
from typing import Any

import psutil

from orchestration.run.job_id import submission_id
from orchestration.run.journal import now
from pipelines.dataset.errors import LeaseError, MapoError
from pipelines.dataset.secrets import redact
from pipelines.dataset.storage import Storage

BEAT_S = 5.0
TTL_S = 30.0  # several beats, with room for a storage that stutters
POLL_S = 0.5
TERM = re.compile(r"(\d{6})\.json")


@dataclass(frozen=True)
class Holder:
    """The process that drives a run: for messages, and to check on the same machine whether it is alive."""

    id: str
    host: str
    pid: int
    started_at: str
    command: str
    job: str | None
    """The submission id, if the process runs as a Ray job."""
    machine: str
    """Boot id and process namespace: the pid is only meaningful where both are the same."""
    born: float
    """Creation time of the process by the machine's own clock, because pids are reused."""

    @staticmethod
    def here(command: str) -> Holder:
        """Describe this process."""
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
        """Return whether its process is known to be gone; also False if this cannot be known."""
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


@dataclass(frozen=True)
class Beat:
    """A sign of life from the holder of a term.

    Args:
        beats: Number of beats so far, including this one.
        at: Time of writing by the holder's clock.
        released: Whether the holder gave the term back.
    """

    beats: int = 0
    at: str = ""
    released: bool = False


class Terms:
    """The terms of a run's lease on the storage.

    Args:
        storage: The run's storage.
        folder: The run's folder.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self.folder = storage, f"{folder}/lease"

    def newest(self) -> int:
        """Return the newest term; 0 before the first."""
        found = (TERM.fullmatch(name.rpartition("/")[2]) for name in self._storage.names(self.folder))
        return max((int(match[1]) for match in found if match), default=0)

    def file(self, term: int, kind: str = "json") -> str:
        """Return the name of a term's object, or of its `beat`."""
        return f"{self.folder}/{term:06d}.{kind}"

    def holder(self, term: int) -> Holder | None:
        """Return the holder of a term; None if the term was removed."""
        content = self._read(self.file(term))
        if not isinstance(content, dict):
            return None
        known = {each.name: content[each.name] for each in fields(Holder) if each.name in content}
        with contextlib.suppress(TypeError):
            return Holder(**known)
        return None

    def beat(self, term: int) -> Beat:
        """Return the last beat of a term; `Beat()` before the first."""
        content = self._read(self.file(term, "beat"))
        content = content if isinstance(content, dict) else {}
        return Beat(content.get("beats", 0), content.get("at", ""), content.get("released", False))

    def _read(self, name: str) -> Any:
        """Return the content of a JSON object; None if there is none, or if it is damaged."""
        data = self._storage.read_if_there(name)
        with contextlib.suppress(ValueError):
            return None if data is None else json.loads(data)
        return None


class Lease:
    """The right to drive one run; a context manager that acquires and releases it.

    Args:
        storage: The run's storage.
        folder: The run's folder.
        command: The command line of this driver.
        on_beat: Called after every beat, from another thread.
        on_lost: Called with a reason when another driver has taken over, from another thread.

    Raises:
        LeaseError: The run is already running.
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
        with contextlib.suppress(MapoError):  # it expires anyway
            if self._terms.newest() == self._term:
                self._write_beat(released=True)

    def confirm(self) -> None:
        """Check that this driver still holds the lease, before something is recorded.

        Raises:
            LeaseError: Another driver has taken over.
        """
        if (newest := self._terms.newest()) > self._term:
            raise LeaseError(self._lost(newest), "the run continues there; `mapo status` shows its state")

    def _try(self) -> bool:
        """Try to take the next term once the newest is free; return False if another driver was faster."""
        newest = self._terms.newest()
        if newest:
            self._wait_until_free(newest)
        content = json.dumps(asdict(self.holder), indent=1).encode()
        if not self._storage.create(self._terms.file(newest + 1), content) or self._terms.newest() != newest + 1:
            return False  # in the second case this driver was slow: the term was taken, released and removed meanwhile
        self._term = newest + 1
        self._write_beat()
        self._tidy()
        return True

    def _wait_until_free(self, term: int) -> None:
        """Wait until the term is released, its holder is dead or has not renewed it for TTL_S; raise if it is alive."""
        holder, beat, seen = self._terms.holder(term), self._terms.beat(term), time.monotonic()
        while not beat.released and not (holder and holder.is_dead()):
            if time.monotonic() - seen > TTL_S or self._terms.newest() != term:
                return
            time.sleep(POLL_S)
            newest = self._terms.beat(term)
            if newest.beats != beat.beats and not newest.released:
                raise LeaseError(
                    f"run {self._name} is already running: {holder or 'another driver'}",
                    "wait for it, or stop it with `mapo stop`; another `name` makes another run",
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
                continue  # the storage is away for a moment; if it stays away, nothing can be recorded anyway

    def _lost(self, term: int) -> str:
        with contextlib.suppress(MapoError):
            return f"run {self._name} was taken over by {self._terms.holder(term) or 'another driver'}"
        return f"run {self._name} was taken over by another driver"

    def _write_beat(self, *, released: bool = False) -> None:
        self._num_beats += 1
        beat = Beat(self._num_beats, now(), released)
        self._storage.write(self._terms.file(self._term, "beat"), json.dumps(asdict(beat)).encode())

    def _tidy(self) -> None:
        """Remove terms that are over; the newest always stays, so that the numbers only grow."""
        for name in self._storage.names(self._terms.folder):
            number = name.rpartition("/")[2].partition(".")[0]
            if number.isdigit() and int(number) < self._term:
                self._storage.delete(name)


def current_holder(storage: Storage, folder: str) -> Holder | None:
    """Return the driver of a run according to the storage; None if there is none, or its process is known to be gone.

    A driver that died on another machine is still returned until another takes over.
    """
    terms = Terms(storage, folder)
    term = terms.newest()
    if not term or terms.beat(term).released:
        return None
    holder = terms.holder(term)
    return None if holder is None or holder.is_dead() else holder


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:  # noqa: PTH123
            return f"{boot.read().strip()}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return ""
