"""The context of a run for its stages: configuration, storage, journal, output."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.config import RunConfig
from orchestration.run.journal import Journal
from pipelines.dataset.layout import RUNS
from pipelines.dataset.storage import Storage

if TYPE_CHECKING:
    from orchestration.run.encode_ahead import EncodeAhead
    from pipelines.sources.unit import SourceUnit

EVALUATION, RESULTS, OLD_RESULTS = "evaluation", "results.json", "evaluation.json"
"""The folder of a run's evaluation, the file of its results in it, and that of versions before December 2026."""
Say = Callable[[str], None]
"""Shows one line to the user."""


@dataclass(frozen=True)
class Run:
    """A configuration, its storage, its journal, and where lines go.

    Args:
        config: The run's configuration.
        storage: The storage of the data set and the runs.
        journal: The run's durable record.
        say: Shows a line to the user.
        goal: The stages that this command brings up to date.
    """

    config: RunConfig
    storage: Storage
    journal: Journal
    say: Say
    goal: tuple[str, ...] = ()

    @staticmethod
    def open(config: RunConfig, say: Say, goal: Sequence[str] = ()) -> "Run":
        """Open the run of a configuration."""
        storage = Storage(config.storage)
        return Run(config, storage, Journal(storage, config.name), say, tuple(goal))

    @cached_property
    def units(self) -> "list[SourceUnit]":
        """The units of all sources, listed once per command."""
        from pipelines.ingest.execution import plan_units

        assert self.config.ingest
        return plan_units(self.config.ingest)

    @cached_property
    def ahead(self) -> "EncodeAhead":
        """The thread that encodes while ingest runs."""
        from orchestration.run.encode_ahead import EncodeAhead

        return EncodeAhead(self.storage, self.say)

    @property
    def folder(self) -> str:
        """The run's folder on the storage."""
        return f"{RUNS}/{self.config.name}"

    @property
    def report(self) -> str:
        """The report's name on the storage."""
        return f"{self.folder}/report/index.html"

    @property
    def leaderboard(self) -> str:
        """The name of the evaluation's leaderboard on the storage; an evaluation deletes the one before it."""
        return f"{self.folder}/{EVALUATION}/leaderboard.html"

    @property
    def model(self) -> str:
        """The exported model's name on the storage."""
        return f"{self.folder}/model"


OWN_PROGRAMS = ("mapo", "mapo_entry.py", "__main__.py")
"""Files that start the command: the script, `python -m mapo_entry`, `python -m orchestration`."""


def command_line() -> str:
    """Return the command line of this process, as a user would type it."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return shlex.join(["mapo" if program in OWN_PROGRAMS else program, *sys.argv[1:]])


@dataclass(frozen=True)
class Outcome:
    """The result of a stage: a line for people, and details for later stages and the report."""

    summary: str
    details: dict[str, Any] = field(default_factory=dict)
