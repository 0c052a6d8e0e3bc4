"""Trackers that get the curves in addition to the report: TensorBoard, Weights & Biases, MLflow.

Each tracker has its own thread. Any failure (a lost network, a wrong key, a full disk) costs one warning and the rest
of its curves, never the run; and a slow service does not slow down a step.
"""

import contextlib
import hashlib
import importlib.util
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.dataset.errors import ConfigError
from pipelines.dataset.storage import Storage
from training.tracking.backends import BACKENDS, Backend, TrackedRun, extras_of

MAX_WAITING = 1000  # entries that a slow service may be behind
FLUSH_S = 60.0  # training waits for a tracker at a checkpoint, no longer than this and once

logger = logging.getLogger(__name__)


def check_trackers(names: Sequence[str]) -> None:
    """Reject trackers whose package is not installed; imports nothing.

    Raises:
        ConfigError: At least one package is missing; the message lists them all.
    """
    missing = [name for name in names if not _is_installed(BACKENDS[name].package)]
    if missing:
        extras = extras_of(missing)
        wanted = f"'mapo[{','.join(extras)}]'" if extras else " ".join(BACKENDS[name].package for name in missing)
        raise ConfigError(
            f"train.trackers has {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            f"`pip install {wanted}`, on the workers' nodes too; or leave `train.trackers` out",
        )


def _is_installed(package: str) -> bool:
    """Return whether the package can be imported: a folder `wandb`, which wandb leaves where it ran, does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def open_trackers(
    names: Sequence[str], *, storage: Storage, folder: str, key: str, start: int, parameters: Mapping[str, Any]
) -> list["Tracker"]:
    """Open the trackers of a run, on rank 0. A resumed run continues its curves.

    Args:
        names: Keys of BACKENDS.
        storage: The storage of the run.
        folder: The run's folder; its last part names the run.
        key: The key of the training; each training has its own curves in wandb and MLflow.
        start: Steps that earlier parts of the run have finished.
        parameters: The resolved configuration of training.
    """
    identity = hashlib.sha256(f"{storage.uri(folder)} {key}".encode()).hexdigest()[:16]
    run = TrackedRun(storage, folder, identity, start, parameters)
    return [Tracker(name, run, BACKENDS[name]) for name in names]


class Tracker:
    """A service that can neither stop training nor slow it down.

    Args:
        name: The tracker's name, for the warning.
        run: The run that is tracked.
        opened: Opens the backend with a local folder that lasts as long as this tracker; called on its thread.
    """

    def __init__(self, name: str, run: TrackedRun, opened: Callable[[TrackedRun, Path], Backend]) -> None:
        self.name = name
        self.warning: str | None = None
        self._run, self._opened = run, opened
        self._waiting: queue.Queue[Callable[[Backend], None] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the numbers of a step; names have a group, as in train/loss."""
        self._put(lambda backend: backend.log(metrics, step))

    def image(self, name: str, image: Image.Image | Path, step: int) -> None:
        """Log an image; a file is read before this returns."""
        try:
            picture = (Image.open(image) if isinstance(image, Path) else image).convert("RGB")
        except OSError as error:
            self._disable(error)
        else:
            self._put(lambda backend: backend.image(name, picture, step))

    def flush(self) -> None:
        """Wait until everything logged is sent; after FLUSH_S the tracker is disabled."""
        done = threading.Event()

        def flush(backend: Backend) -> None:
            backend.flush()
            done.set()

        self._put(flush)
        self._wait(done)

    def close(self, *, failed: bool) -> None:
        """End the tracker; waits like `flush`."""
        self._put(lambda backend: backend.close(failed=failed))
        self._put(None)
        self._wait(threading.Event())

    def _put(self, action: Callable[[Backend], None] | None) -> None:
        if self.warning is None:
            try:
                self._waiting.put_nowait(action)
            except queue.Full:
                self._disable(f"it is {MAX_WAITING:,} entries behind")

    def _wait(self, done: threading.Event) -> None:
        """Wait until `done` or the end of the thread."""
        deadline = time.monotonic() + FLUSH_S
        while self.warning is None and self._thread.is_alive() and not done.wait(0.01):
            if time.monotonic() > deadline:
                self._disable(f"it took more than {FLUSH_S:.0f} s to send what was logged")

    def _work(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix=f"mapo-{self.name}-", ignore_cleanup_errors=True) as local:
                backend = self._opened(self._run, Path(local))
                while (action := self._waiting.get()) is not None and self.warning is None:
                    action(backend)
        except Exception as error:  # every service has its own exception tree, and none may end the run
            self._disable(error)

    def _disable(self, reason: Exception | str) -> None:
        text = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
        self.warning = f"tracker {self.name} disabled; training continues: {text}"
        logger.warning("%s", self.warning)
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)  # the thread may be waiting for work
