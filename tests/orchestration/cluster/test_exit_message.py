"""A process that is killed still shows a message on standard error; one that ends in order does not."""

import subprocess
import sys

import pytest

from orchestration.cluster.exit_message import UNEXPECTED

DRIVER = """
import os, signal, sys
from orchestration.cluster.exit_message import ExitMessage
with ExitMessage() as exit_message:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # as while Ray starts
    {end}
"""


def said(end: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", DRIVER.format(end=end)], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.mark.parametrize(("end", "code"), [("os._exit(1)", 1), ("os.kill(os.getpid(), signal.SIGKILL)", -9)])
def test_of_a_process_that_is_ended_it_is_said(end: str, code: int) -> None:
    assert said(end) == (code, f"{UNEXPECTED}\n")


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("sys.exit(3)", 3)])
def test_a_process_that_ends_in_order_has_nothing_added(end: str, code: int) -> None:
    assert said(end) == (code, "")


def test_the_last_of_several_words_counts_as_it_was_given() -> None:
    words = r"""exit_message.set("one"); exit_message.set("C:\\new 100%\nhint: $HOME `x` 'y'"); os._exit(4)"""
    assert said(words) == (4, "C:\\new 100%\nhint: $HOME `x` 'y'\n")
