"""`mapo scores vote`: a page on which a person votes blindly on the images of two models."""

import argparse
from pathlib import Path

from orchestration.commands.options import CONFIGURED, Command, Option, load, place, say
from pipelines.dataset.errors import ConfigError

MAX_PORT = 65_535


def _vote(options: argparse.Namespace) -> None:
    from orchestration.votes.session import hold_session

    first, second = options.models
    out = None if options.out is None else Path(options.out).expanduser()
    hold_session(load(options), (first, second), suite=options.suite, port=_port(options.port), out=out, say=say)


def _port(text: str) -> int:
    """Return a port number.

    Raises:
        ConfigError: It is not one.
    """
    if not (text.isascii() and text.isdecimal()) or int(text) > MAX_PORT:
        raise ConfigError(f"--port {text}: not a port", f"give a number up to {MAX_PORT}, or 0 for any free port")
    return int(text)


COMMANDS = (
    Command(
        "scores vote",
        "serve a page on this machine to vote blindly on two models' images; the votes become scores",
        _vote,
        (
            *CONFIGURED,
            Option("--models", "two models of `evaluate.models`", "A B", is_required=True, num_values=2),
            Option("--suite", "a suite of `evaluate.suites`; by default the first", "NAME"),
            Option("--port", "port of the page on 127.0.0.1; 0 for any free one", "N", default="0"),
            Option("--out", "journal of the votes; by default named after run, suite and models", "FILE", type=place),
        ),
    ),
)
