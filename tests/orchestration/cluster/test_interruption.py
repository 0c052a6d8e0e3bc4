"""Signals: `Stopped` whatever a library does to their handlers, and what there was before is put back."""

import os
import signal
import sys
from collections.abc import Callable

import pytest

from orchestration.cluster.signals import Interruption, Stopped, keeping_handlers
from pipelines.dataset.errors import ClusterError, StorageError


def leave(number: int, _: object) -> None:
    """What Ray does at SIGTERM, from the beginning of `ray.init` on."""
    sys.exit(number)


def start_like_ray() -> None:
    with keeping_handlers():
        signal.signal(signal.SIGTERM, leave)
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_ray_starts_stops_the_run_like_any_other() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption().armed():
        ours = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            start_like_ray()
        assert signal.getsignal(signal.SIGTERM) is ours
    assert signal.getsignal(signal.SIGTERM) is before


def test_where_nothing_is_armed_ray_does_as_it_wants() -> None:
    kept = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit):
            start_like_ray()
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_what_another_thread_asks_for_has_its_reason() -> None:
    interruption = Interruption()
    with interruption.armed(), pytest.raises(Stopped, match="by request of ada"):
        interruption.ask("stopped by request of ada")


def told_instead(interruption: Interruption, interrupt: Callable[[], None], error: BaseException) -> BaseException:
    """What comes out where something else is raised in place of what a signal raised."""
    try:
        with interruption.armed(), interruption.reraise_stop():
            try:
                interrupt()
                signal.sigtimedwait([], 0.1)
            except BaseException:  # C code lost it
                pass
            raise error
    except BaseException as found:
        return found


def by_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_what_c_code_makes_of_a_signal_is_told_as_what_it_was() -> None:
    for made in (KeyboardInterrupt(), SystemError("a result with an exception set")):
        found = told_instead(Interruption(), by_sigterm, made)
        assert str(found) == "stopped by SIGTERM"
        assert found.__cause__ is made
        assert told_instead(Interruption(), lambda: None, made) is made


def test_what_fails_in_a_clean_end_is_told() -> None:
    failed = StorageError("no space left", "make room")
    assert told_instead(Interruption(), by_sigterm, failed) is failed


def test_an_error_of_another_thread_comes_before_all_that_follows_from_it() -> None:
    interruption, error = Interruption(), ClusterError("the head does not answer", "start it")
    found = told_instead(interruption, lambda: interruption.fail(error), ValueError("what a library made of it"))
    assert found is error
