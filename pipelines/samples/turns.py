"""Lets units of several models share one device: one unit at a time, those of the loaded model first."""

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """Admits one unit at a time. Its methods may be called from any thread.

    Units arrive by model, but several at once: where two models meet, a unit of the next model may come before the last
    ones of the loaded model, which would be loaded a second time.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[str, object]] = []
        self._is_busy = False
        self._loaded: str | None = None

    @contextlib.contextmanager
    def turn(self, model: str) -> Iterator[None]:
        """Wait for the turn of a unit of this model, and hold it during the block."""
        mine = (model, object())
        with self._changed:
            self._waiting.append(mine)
            self._changed.wait_for(lambda: not self._is_busy and self._next() is mine)
            self._waiting.remove(mine)
            self._is_busy, self._loaded = True, model
        try:
            yield
        finally:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _next(self) -> tuple[str, object]:
        """Return the first unit of the loaded model, or else the first of all."""
        return next((each for each in self._waiting if each[0] == self._loaded), self._waiting[0])
