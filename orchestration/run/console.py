"""Output of the commands to the user, with every secret masked."""

import sys
from typing import TextIO

from pipelines.dataset.secrets import redact, write_line


def say(line: str) -> None:
    """Show the user a line, on stdout."""
    write(f"{line}\n")


def note(line: str) -> None:
    """Show the user a line on stderr, apart from the command's output."""
    write_line(line)


def write(text: str, stream: TextIO | None = None) -> None:
    """Write text with every secret masked; the only place in which commands write to stdout or stderr.

    Args:
        text: The text, line ends included.
        stream: The stream; by default stdout.
    """
    out = stream or sys.stdout
    out.write(redact(text))
    out.flush()
