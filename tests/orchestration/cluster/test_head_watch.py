"""A head that is gone: the driver reports it before Ray kills the process without an error."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from orchestration.cluster.exit_message import ExitMessage
from orchestration.cluster.head_watch import GIVES_UP_VARIABLE, HeadWatch
from pipelines.dataset.errors import ClusterError

HANGING = """
import socket, threading, time
from orchestration.cluster.head_watch import HeadWatch
from orchestration.cluster.exit_message import ExitMessage
with ExitMessage() as exit_message, HeadWatch("127.0.0.1:1", lambda error: None, exit_message):
    time.sleep(60)
"""


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(head: socket.socket) -> str:
    return f"127.0.0.1:{head.getsockname()[1]}"


def test_the_main_thread_is_told_once_the_head_is_gone_for_long_enough(
    head: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GIVES_UP_VARIABLE, "8")
    told, lost = [], threading.Event()

    def on_lost(error: ClusterError) -> None:
        told.append(error)
        lost.set()

    with ExitMessage() as exit_message, HeadWatch(address_of(head), on_lost, exit_message) as watch:
        assert not lost.wait(5)
        assert not watch.is_lost
        head.close()
        gone_at = time.monotonic()
        assert lost.wait(20)
        assert 2 <= time.monotonic() - gone_at <= 12
        assert watch.is_lost
    assert f"{watch._address} does not answer" in told[0].message
    assert len(told) == 1


def test_what_ray_says_without_its_head_becomes_our_error(head: socket.socket) -> None:
    watch = HeadWatch(address_of(head), lambda error: None, ExitMessage())
    with pytest.raises(ClusterError, match="does not answer") as raised, watch:  # noqa: PT012
        head.close()
        raise RuntimeError("something of Ray")
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert watch.is_lost


def test_with_its_head_an_error_is_what_it_was(head: socket.socket) -> None:
    with (
        pytest.raises(RuntimeError, match="something else"),
        HeadWatch(address_of(head), lambda error: None, ExitMessage()),
    ):
        raise RuntimeError("something else")


def test_a_process_that_hangs_without_its_head_ends_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GIVES_UP_VARIABLE, "4")
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert done.stderr.startswith("ClusterError: the head of the Ray cluster at 127.0.0.1:1 does not answer\nhint: ")
