"""Encode beside ingest: no GPU waits for the last source file."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from orchestration.run import Run
from pipelines.dataset.errors import MapoError
from pipelines.room import uses_gpu


class EncodeAhead:
    """While it is entered, latents of shards that ingest has committed are encoded in a thread of the driver.

    Does nothing where both stages would only take CPUs from each other: there must be GPUs, or nodes of encode's own by
    `encode.resources`. An error does not end the ingest: the stage `encode`, which comes next, meets it again.

    Args:
        run: Its goal must hold `encode`.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._over, self._stopped = run, threading.Event(), threading.Event()
        self.passes: list[dict[str, Any]] = []
        self._thread: threading.Thread | None = None
        ingest, encode = run.config.ingest, run.config.encode
        if "encode" in run.goal and ingest and encode:
            has_own_nodes = bool(encode.resources) and encode.resources != ingest.resources
            if has_own_nodes or uses_gpu(encode.device):
                self._thread = threading.Thread(target=self._encode, name="encode-ahead", daemon=True)

    def _encode(self) -> None:
        from pipelines.encode import encode_ahead

        assert self._run.config.encode
        try:
            self.passes = encode_ahead(
                self._run.config.encode,
                self._run.storage,
                is_over=self._over.is_set,
                is_stopped=self._stopped.is_set,
            )
        except MapoError as error:
            self._run.say(f"encode    beside ingest: {error.message}; it is tried again after ingest")
        except Exception as error:  # of Ray, which may be going down
            self._run.say(f"encode    beside ingest: {type(error).__name__}; it is tried again after ingest")

    def __enter__(self) -> EncodeAhead:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if kind is not None:
            self._stopped.set()
        if self._thread is not None:
            self._thread.join()
