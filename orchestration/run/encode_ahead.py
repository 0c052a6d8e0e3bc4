"""Encode while ingest runs, so that no GPU waits for the last source file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines.dataset.errors import MapoError
from pipelines.dataset.ray_thread import RayThread
from pipelines.resources import uses_gpu

if TYPE_CHECKING:
    from pipelines.config import EncodeConfig, IngestConfig
    from pipelines.dataset.storage import Storage
    from pipelines.encode.ahead import LatentsAhead
    from pipelines.units.stats import Speed

MAX_STOP_S = 20.0  # longer than a unit takes


class EncodeAhead:
    """A thread of the driver that encodes the latents of committed pairs.

    The stage `ingest` starts it; the stage `encode`, or `stop`, ends it. An error does not end the ingest: the stage
    `encode` will run into it again.

    Args:
        storage: The storage of the data set.
        say: Shows a line to the user.
    """

    def __init__(self, storage: Storage, say: Callable[[str], None]) -> None:
        self._storage, self._say = storage, say
        self._ahead: LatentsAhead | None = None
        self._thread: RayThread | None = None

    def begin(self, ingest: IngestConfig, encode: EncodeConfig) -> None:
        """Start, if encode has GPUs or its own nodes (`encode.resources`); else both would compete for CPUs."""
        from pipelines.encode.ahead import LatentsAhead
        from pipelines.units.pool import demand_of

        has_own_nodes = bool(encode.resources) and encode.resources != ingest.resources
        if has_own_nodes or uses_gpu(encode.device):
            self._ahead = LatentsAhead(encode, self._storage)
            self._thread = RayThread(functools.partial(self._run, self._ahead), "encode-ahead")
            self._thread.start()
            if not (demand := demand_of(encode)).has_node():
                self._say(f"encode    starts alongside ingest once a node has {demand}")

    def _run(self, ahead: LatentsAhead) -> None:
        try:
            ahead.run()
        except MapoError as error:
            self._say(f"encode    failed alongside ingest, will retry after it: {error.message}")
        except Exception as error:  # from Ray, which may be shutting down
            self._say(f"encode    failed alongside ingest, will retry after it: {type(error).__name__}")

    def speed(self) -> Speed | None:
        """Return what was encoded since the last call, and how fast; None if nothing."""
        return None if self._ahead is None else self._ahead.take_speed()

    def finish(self) -> Speed | None:
        """Wait until everything committed is encoded; return the speed of that last part.

        Does not wait while no node could run it yet: the stage `encode` does.
        """
        if self._ahead is None or self._thread is None:
            return None
        self._ahead.finish()
        self._thread.join()
        return self.speed()

    def stop(self) -> None:
        """Stop after the current unit, or at once while waiting for a node."""
        if self._ahead is not None and self._thread is not None:
            self._ahead.stop()
            self._thread.join(MAX_STOP_S)
