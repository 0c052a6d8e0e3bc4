"""Ways to stop a run from outside: Ctrl-C, SIGTERM, a request on the storage, the loss of the lease.

All raise `Stopped` in the main thread, wherever it waits. Stages then stop cleanly, so that the run can be resumed
(training writes a checkpoint first); a second signal does not wait for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOPPING = b"\nstopping cleanly so that the run can be resumed; press Ctrl-C again to stop now\n"
SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; finished work is on the storage, and the same command resumes it.

    Args:
        reason: Why, in a few words.
    """

    def __init__(self, reason: str = "stopped") -> None:
        super().__init__(reason)
        self.reason = reason


class Interruption:
    """Turns signals into `Stopped` while it is armed, and lets other threads do the same with their own reason."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._error: Exception | None = None
        self._raised: BaseException | None = None
        self._thread = threading.main_thread()
        self._is_armed = self._takes_signals = False

    def ask(self, reason: str) -> None:
        """Stop the working thread, from any thread; nothing happens if it is already being stopped."""
        if self._reason is not None or not self._is_armed or self._thread.ident is None:
            return
        self._reason = reason
        if self._takes_signals:
            signal.pthread_kill(self._thread.ident, signal.SIGTERM)
        else:  # raised as soon as that thread runs Python again; `named` then says what it meant
            self._raised = self._error or Stopped(reason)
            thread = ctypes.c_ulong(self._thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Stopped))

    def fail(self, error: Exception) -> None:
        """End the main thread's work with an error, from any thread, when there is nothing to end cleanly."""
        self._error = error
        self.ask(str(error))

    def _raise(self, number: int, _: FrameType | None) -> None:
        if self._error is None:
            os.write(2, STOPPING)  # a handler may be called inside of a write to sys.stderr
        self._raised = self._error or Stopped(self._reason or SIGNALS[signal.Signals(number)])
        raise self._raised

    @contextlib.contextmanager
    def reraise_stop(self) -> Iterator[None]:
        """Raise `Stopped` for a signal that a library's C code turned into another exception.

        Ray's core raises a plain `KeyboardInterrupt`; Python raises a `SystemError` if C code ignored the signal.
        """
        try:
            yield
        except BaseException as found:
            is_other = self._raised is not None and found is not self._raised
            if is_other and (self._error is not None or isinstance(found, KeyboardInterrupt | SystemError)):
                raise self._raised from found  # type: ignore[misc]
            raise

    @contextlib.contextmanager
    def armed(self, *, takes_signals: bool = True) -> Iterator[Interruption]:
        """Stop the block's work in this thread when any of the ways to stop a run is used.

        Args:
            takes_signals: Whether they include SIGINT and SIGTERM, in the main thread. Otherwise the handlers are left
                alone, as a notebook needs: there an interrupt is a plain `KeyboardInterrupt`.
        """
        self._thread = threading.current_thread()
        self._takes_signals = takes_signals and self._thread is threading.main_thread()
        if not self._takes_signals:
            self._is_armed = True
            try:
                with self.reraise_stop():
                    yield self
            finally:
                self._is_armed = False
            return
        kept: dict[Any, Any] = {number: signal.signal(number, self._raise) for number in SIGNALS}
        self._is_armed = True
        try:
            yield self
        finally:
            self._is_armed = False
            for number, handler in kept.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def keeping_handlers() -> Iterator[None]:
    """Restore the signal handlers that a library replaces in the block: `ray.init` takes SIGTERM for itself.

    Raises:
        Stopped: A signal came in the block while an `Interruption` was armed; Ray's handler would exit the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept: dict[Any, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    except SystemExit as leaving:
        if kept[signal.SIGTERM] is signal.SIG_DFL:
            raise
        raise Stopped(SIGNALS[signal.SIGTERM]) from leaving
    finally:
        for number, handler in kept.items():
            if handler is not signal.SIG_DFL:
                signal.signal(number, handler)
