"""Encode beside ingest: no GPU waits for the last source file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines.dataset.errors import MapoError
from pipelines.resources import uses_gpu

if TYPE_CHECKING:
    from pipelines.config import EncodeConfig, IngestConfig
    from pipelines.dataset.storage import Storage
    from pipelines.encode.ahead import LatentsAhead
    from pipelines.units.stats import Speed

WAITS_IN_RAY = "encode-ahead"
"""The name of its thread: Ray must not be shut down under it."""
MAX_STOP_S = 20.0  # a unit takes less


class EncodeAhead:
    """Begun by the stage `ingest`, ended by the stage `encode`, or by `stop`: in between, a thread of the driver
    encodes the latents of what ingest has committed.

    An error does not end the ingest: the stage `encode` meets it again.

    Args:
        storage: Of the data set.
        say: Where lines go.
    """

    def __init__(self, storage: Storage, say: Callable[[str], None]) -> None:
        self._storage, self._say = storage, say
        self._ahead: LatentsAhead | None = None
        self._thread: threading.Thread | None = None

    def begin(self, ingest: IngestConfig, encode: EncodeConfig) -> None:
        """Begin, unless both stages would only take CPUs from each other: there must be GPUs, or nodes of encode's own
        by `encode.resources`.
        """
        from pipelines.encode.ahead import LatentsAhead
        from pipelines.units.pool import demand_of

        has_own_nodes = bool(encode.resources) and encode.resources != ingest.resources
        if has_own_nodes or uses_gpu(encode.device):
            self._ahead = LatentsAhead(encode, self._storage)
            self._thread = threading.Thread(target=self._run, args=(self._ahead,), name=WAITS_IN_RAY, daemon=True)
            self._thread.start()
            if not (demand := demand_of(encode)).has_node():
                self._say(f"encode    starts beside ingest once a node has {demand}")

    def _run(self, ahead: LatentsAhead) -> None:
        try:
            ahead.run()
        except MapoError as error:
            self._say(f"encode    beside ingest ended, and is tried again after it: {error.message}")
        except Exception as error:  # of Ray, which may be going down
            self._say(f"encode    beside ingest ended, and is tried again after it: {type(error).__name__}")

    def speed(self) -> Speed | None:
        """What was done since this was last asked, and how fast; None if nothing."""
        return None if self._ahead is None else self._ahead.take_speed()

    def finish(self) -> Speed | None:
        """Wait until all that is committed is encoded; the speed of this rest.

        Where there has been no node for it so far, nothing is waited for: that is left to the stage `encode`.
        """
        if self._ahead is None or self._thread is None:
            return None
        self._ahead.finish()
        self._thread.join()
        return self.speed()

    def stop(self) -> None:
        """End it after the next unit, or at once while it waits for a node."""
        if self._ahead is not None and self._thread is not None:
            self._ahead.stop()
            self._thread.join(MAX_STOP_S)
