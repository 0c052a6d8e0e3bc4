"""Watch the cluster's head: a minute after losing it, Ray ends a driver without an error."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

from orchestration.cluster.exit_message import ExitMessage
from pipelines.dataset.errors import ClusterError

LOOK_S = 2.0
RAY_GIVES_UP_S = 60.0
GIVES_UP_VARIABLE = (
    "RAY_gcs_rpc_server_reconnect_timeout_s"  # Ray's own; set higher where a head with a database can come back
)


class HeadWatch:
    """A context manager: a thread checks whether the head (its GCS) takes connections.

    After half the time that Ray waits, the main thread is interrupted, so that the run ends with its own error. If that
    hangs in Ray, the process is ended a quarter of that time later; finished work is on the storage.

    Args:
        address: HOST:PORT of the GCS.
        on_lost: Called once, from another thread.
        exit_message: Takes the error where the process is ended at once.
    """

    def __init__(self, address: str, on_lost: Callable[[ClusterError], None], exit_message: ExitMessage) -> None:
        self._address, self._on_lost, self._exit_message = address, on_lost, exit_message
        self._patience_s = float(os.environ.get(GIVES_UP_VARIABLE, RAY_GIVES_UP_S)) / 2
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="head-watch", daemon=True)
        self.is_lost = False

    @property
    def error(self) -> ClusterError:
        """The error that a run ends with when the head is lost."""
        found = ClusterError(
            f"the head of the Ray cluster at {self._address} does not answer",
            "finished work is on the storage; rerun the same command to resume once the cluster is back",
        )
        found.ends_process = self.is_lost
        return found

    @property
    def has_address(self) -> bool:
        """Whether the address is HOST:PORT, and neither `auto` nor an address of Ray Client."""
        host, _, port = self._address.rpartition(":")
        return bool(host) and "/" not in host and port.isdigit()

    def answers(self) -> bool:
        """Return whether the head takes a connection now."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_S).close()
        except OSError:
            return False
        return True

    def _watch(self) -> None:
        answered_at = time.monotonic()
        while not self._closed.wait(LOOK_S):
            if self.answers():
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at >= self._patience_s:
                self.is_lost = True
                self._on_lost(self.error)
                if not self._closed.wait(self._patience_s / 2):
                    self._exit_message.set(f"ClusterError: {self.error}")
                    os._exit(self.error.exit_code)
                return

    def __enter__(self) -> HeadWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        if isinstance(error, Exception) and not self.answers():
            self.is_lost = True  # Ray noticed it first
        if self.is_lost and error is not None and not getattr(error, "ends_process", False):
            raise self.error from error
