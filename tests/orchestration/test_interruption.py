"""Signals: `Stopped` whatever a library does to their handlers, and what there was before is put back."""

import os
import signal
import sys

import pytest

from orchestration.interruption import Interruption, Stopped, keeping_handlers


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
