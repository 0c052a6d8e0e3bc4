"""Shared by the commands: their description, exit codes, output without secrets, durations."""

import argparse
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from orchestration.run.console import note, say, write
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.secrets import has_credentials, redact

if TYPE_CHECKING:
    from orchestration.config import RunConfig

__all__ = [
    "CONFIG",
    "CONFIGURED",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "JSON",
    "OVERRIDE",
    "Command",
    "MaskedFormatter",
    "Option",
    "load",
    "note",
    "parse_duration",
    "place",
    "say",
    "say_json",
    "write",
]  # fmt: skip

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
"""Exit code 2, for a wrong command or configuration, comes from argparse and `ConfigError`."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Option:
    """An argument of a command, for argparse and for the reference.

    Args:
        name: The name as typed, such as `--address`; positional arguments are in capitals.
        help: Its purpose, in one phrase.
        metavar: Placeholder for its value; an option without one is a switch.
        default: The value if it is left out, shown in the help; makes a positional argument optional.
        type: Converts the text to a value.
        dest: The attribute for the value, if not the name.
        is_required: Whether an option must be given.
        is_repeated: Whether it may be given several times.
        choices: The allowed values.
        num_values: Number of values, each with a word of the placeholder.
    """

    name: str
    help: str
    metavar: str = ""
    default: str | float | None = None
    type: Callable[[str], object] = str
    dest: str | None = None
    is_required: bool = False
    is_repeated: bool = False
    choices: tuple[str, ...] | None = None
    num_values: int = 1

    @property
    def is_positional(self) -> bool:
        """Whether the argument is positional."""
        return not self.name.startswith("-")

    @property
    def shown(self) -> str:
        """The argument as typed: `CONFIG`, `--json`, `--address URL`."""
        return f"{self.name} {self.metavar}".strip()

    @property
    def usage(self) -> str:
        """The argument in a usage line."""
        if self.is_required or (self.is_positional and self.default is None):
            return f"{self.shown} [{self.shown} ...]" if self.is_repeated else self.shown
        return f"[{self.shown} ...]" if self.is_repeated else f"[{self.shown}]"

    @property
    def meaning(self) -> str:
        """The help, with the default."""
        return self.help if self.default is None else f"{self.help} (default: {self.default})"

    def add_to(self, command: argparse.ArgumentParser) -> None:
        """Add the argument to argparse's description of a command."""
        text = self.meaning.replace("%", "%%")
        if self.is_positional:
            nargs = None if self.default is None else "?"
            command.add_argument(
                self.name.lower(), metavar=self.name, nargs=nargs, type=self.type, default=self.default, help=text
            )
        elif not self.metavar:
            command.add_argument(self.name, action="store_true", dest=self.dest, help=text)
        else:
            is_one = self.num_values == 1
            command.add_argument(
                self.name, metavar=self.metavar if is_one else tuple(self.metavar.split()), dest=self.dest,
                nargs=None if is_one else self.num_values, required=self.is_required, type=self.type,
                action="append" if self.is_repeated else "store", choices=self.choices, help=text,
                default=[] if self.is_repeated and not self.is_required else self.default,
            )  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command of `mapo`.

    Args:
        name: The words after `mapo`: `run`, `data gc`.
        help: What it does, in one phrase.
        action: Runs it with the parsed options; returns the exit code, None for 0.
        options: Its arguments, positional ones first.
    """

    name: str
    help: str
    action: Callable[[argparse.Namespace], int | None]
    options: tuple[Option, ...] = ()

    @property
    def summary(self) -> str:
        """The help as a sentence."""
        return f"{self.help[0].upper()}{self.help[1:]}."

    @property
    def arguments(self) -> tuple[Option, ...]:
        """Its options, and those that every command has."""
        return *self.options, DEBUG


def place(text: str) -> str:
    """Return a path or URL unchanged; reject credentials in it, which libraries repeat in their errors."""
    if has_credentials(text):
        raise argparse.ArgumentTypeError("there are credentials in the URL; set them in the environment instead")
    return text


CONFIG = Option("CONFIG", "YAML file", type=place)
OVERRIDE = Option("-o", "override a setting", metavar="key.path=value", dest="overrides", is_repeated=True)
CONFIGURED = (CONFIG, OVERRIDE)
"""The arguments of every command for a run."""
JSON = Option("--json", "print JSON")
DEBUG = Option("--debug", "show tracebacks")


def say_json(data: object) -> None:
    """Show the user data as JSON, in which a number that is not finite is null."""
    say(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: object) -> object:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


class MaskedFormatter(logging.Formatter):
    """The format of log lines for a terminal, with every secret masked."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return redact(super().format(record))


def load(options: argparse.Namespace) -> "RunConfig":
    """Load the configuration that a command was given, with its overrides and absolute paths."""
    from orchestration import api

    return api.load(options.config, options.overrides, say=say)


def parse_duration(text: str, option: str) -> timedelta:
    """Parse a number and a unit: 90m, 6h, 7d.

    Args:
        text: The value as given.
        option: The option's name, for the error.

    Raises:
        ConfigError: The text is not a duration.
    """
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if match is None:
        raise ConfigError(f"{option} {text}: not a duration", "give a number and one of s, m, h, d: 90m, 12h, 7d")
    return timedelta(seconds=int(match[1]) * UNITS[match[2]])
