"""The session of a run's driver: its lease, the ways to stop it, and its entry in the journal."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from orchestration.cluster.signals import Interruption
from orchestration.config import resolved_json
from orchestration.run.context import Run, command_line
from orchestration.run.lease import Lease
from pipelines.dataset.errors import MapoError
from pipelines.dataset.storage import PATIENCE

STOP_FILE = "stop.json"
DEFAULT_PATIENCE_S = "300"


@dataclass(frozen=True)
class Driving:
    """The driver of a run.

    Args:
        lease: The lease that it holds.
        interruption: The means to stop it.
    """

    lease: Lease
    interruption: Interruption


@contextlib.contextmanager
def driving(run: Run, *, takes_signals: bool = True) -> Iterator[Driving]:
    """Hold the run's lease, and turn every way to stop the run into `Stopped` in this thread.

    Args:
        run: The run.
        takes_signals: Whether these include SIGINT and SIGTERM.

    Raises:
        LeaseError: Another driver is working on this run.
    """
    interruption = Interruption()
    lease = Lease(
        run.storage,
        run.folder,
        command_line(),
        on_beat=lambda: _look_for_request(run, interruption),
        on_lost=interruption.ask,
    )
    with interruption.armed(takes_signals=takes_signals), lease, tolerate_outages():
        run.storage.delete(f"{run.folder}/{STOP_FILE}")  # of an earlier driver
        _note_settings(run)
        run.journal.event("started", by=str(lease.holder), job=lease.holder.job, stages=list(run.goal))
        yield Driving(lease, interruption)


@contextlib.contextmanager
def tolerate_outages() -> Iterator[None]:
    """Wait out outages of a storage that has answered before; Ray's workers inherit this (`cluster/connect.py`)."""
    given = os.environ.get(PATIENCE)
    os.environ.setdefault(PATIENCE, DEFAULT_PATIENCE_S)
    try:
        yield
    finally:
        if given is None:
            del os.environ[PATIENCE]


def stop_retrying() -> None:
    """Stop waiting out outages: the run is ending, and its last writes are not worth minutes."""
    os.environ[PATIENCE] = "0"


def request_stop(run: Run, *, by: str, at: str) -> None:
    """Ask the run's driver to stop it cleanly; the driver checks every few seconds."""
    run.storage.write(f"{run.folder}/{STOP_FILE}", json.dumps({"requested_at": at, "by": by}).encode())


def _look_for_request(run: Run, interruption: Interruption) -> None:
    name = f"{run.folder}/{STOP_FILE}"
    data = run.storage.read_if_there(name)
    if data is None:
        return
    with contextlib.suppress(MapoError, ValueError):
        request = json.loads(data)
        run.storage.delete(name)
        by = request.get("by", "somebody") if isinstance(request, dict) else "somebody"
        interruption.ask(f"stopped by request of {by}")


def _note_settings(run: Run) -> None:
    """Save the resolved configuration with the run."""
    name, resolved = f"{run.folder}/config.json", resolved_json(run.config).encode()
    if run.storage.read_if_there(name) != resolved:
        run.storage.write(name, resolved)
