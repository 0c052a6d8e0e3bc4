"""The `mapo` command. Exit codes: 0 done, 1 the job failed, 2 the command or the configuration is wrong."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from orchestration import __version__
from orchestration.commands import (
    data,
    demo,
    infra,
    init,
    lineage,
    logs,
    report,
    run,
    scorers,
    scores,
    stages,
    status,
    stop,
    submit,
    suites,
    votes,
)
from orchestration.commands.options import EXIT_FAILED, EXIT_INTERRUPTED, MaskedFormatter, note
from pipelines.dataset.errors import MapoError
from pipelines.dataset.secrets import redact

ROOMS = (
    demo, init, run, stages, status, report, submit, logs, stop, lineage, data, suites, scorers, scores, votes, infra,
)  # fmt: skip
COMMANDS = tuple(command for room in ROOMS for command in room.COMMANDS)
"""Every command, in the order of `mapo --help`."""
GROUPS = {
    "data": "inspect and maintain a data set",
    "suites": "list suites, fetch their prompts",
    "scorers": "list scorers, fetch their weights, check their values",
    "scores": "vote on images, import scores that another environment made",
    "infra": "bring up a cluster",
}
"""First words of two-word commands, with their help."""
SECOND_WORDS = {"suites": "show", "scorers": "show"}
"""Second words that may be left out, by the first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    if isinstance(logging.lastResort, logging.Handler):
        logging.lastResort.setFormatter(MaskedFormatter())
    options = parser().parse_args(completed(sys.argv[1:] if arguments is None else arguments))
    try:
        return options.action(options) or 0
    except MapoError as error:
        if options.debug:
            note(traceback.format_exc())
        note(f"{type(error).__name__}: {error}")
        return error.exit_code
    except KeyboardInterrupt as stop:
        note(f"{str(stop) or 'interrupted'}; rerun the same command to resume")
        return EXIT_INTERRUPTED
    except Exception as error:  # a bug of ours: say so in one message, keep the traceback for --debug
        if options.debug:
            note(traceback.format_exc())
        cause = getattr(error, "cause", None) or error  # what a Ray worker raised
        what = f"{type(cause).__name__}: {str(cause).strip() or 'no message'}"
        note(f"{what}\nhint: this looks like a bug in mapo; `--debug` shows where")
        return EXIT_FAILED


def completed(arguments: Sequence[str]) -> list[str]:
    """Add the second word of a command where it may be left out: `scorers NAME` is `scorers show NAME`."""
    if not arguments or arguments[0] not in SECOND_WORDS:
        return list(arguments)
    first, *rest = arguments
    known = {name for group, _, name in (command.name.rpartition(" ") for command in COMMANDS) if group == first}
    return list(arguments) if rest and rest[0] in {*known, "-h", "--help"} else [first, SECOND_WORDS[first], *rest]


def entry() -> None:
    """Run the console script.

    Exits without Python's teardown: Arrow's read-ahead threads may be inside a Python file system at that moment, and
    the interpreter then ends the process with SIGABRT instead of mapo's exit code.
    """
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Parser(argparse.ArgumentParser):
    """A parser that masks secrets in its errors, which repeat the user's input."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Leave with an exit code, and a message to stderr."""
        super().exit(status, redact(message) if message else None)


def parser() -> argparse.ArgumentParser:
    """Return the command line; every command has help."""
    top = Parser(prog="mapo", description="Preference alignment of SDXL at cluster scale.")
    top.add_argument("--version", action="version", version=f"mapo {__version__}")
    commands = {"": top.add_subparsers(title="commands", required=True, metavar="COMMAND")}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in commands:
            text = GROUPS[group]
            added = commands[""].add_parser(group, help=text, description=f"{text[0].upper()}{text[1:]}.")
            commands[group] = added.add_subparsers(title="commands", required=True, metavar="COMMAND")
        described = commands[group].add_parser(name, help=command.help, description=command.summary)
        for option in command.arguments:
            option.add_to(described)
        described.set_defaults(action=command.action)
    return top
