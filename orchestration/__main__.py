"""`python -m orchestration` is the `mapo` command."""

from orchestration.cli import entry

entry()
