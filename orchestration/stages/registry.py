"""The stages of a run, in order: the only list of them.

A stage is one file in this folder and one line here. Names, order, commands and help everywhere in the package are
derived from this list. Imports no stage, so that every room may read it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestration.stages.stage import Look, Notes
from pipelines.dataset.errors import ConfigError

if TYPE_CHECKING:
    from orchestration.config import RunConfig
    from orchestration.run.context import Run


@dataclass(frozen=True)
class Stage:
    """One stage; its work is in the file of its name.

    Args:
        name: Name of the stage, its command and its file.
        help: What it does, for the help of its command.
        section: The configuration section that it requires; None if it requires none.
        needs_ray: Whether its work runs on a cluster.
        reads_base: Whether its work would be lost on a base model that training does not support.
        shares_data: Whether its result belongs to the data set, which other runs on the storage share.
        is_judging: Whether a run that only judges models has it.
    """

    name: str
    help: str
    section: str | None = None
    needs_ray: bool = False
    reads_base: bool = False
    shares_data: bool = False
    is_judging: bool = False

    def look(self, run: Run) -> Look:
        """Look at the stage: see `StageModule.look`."""
        found: Look = self._module().look(run)
        return found

    def estimate(self, run: Run, rows: int) -> Mapping[str, int]:
        """Bound the stage's work from above: see `StageModule.estimate`."""
        found: Mapping[str, int] = self._function("estimate", lambda run, rows: {})(run, rows)
        return found

    def notes(self, run: Run) -> Notes:
        """Return the stage's notes for a plan: see `StageModule.notes`."""
        found: Notes = self._function("notes", lambda run: Notes())(run)
        return found

    def check(self, run: Run) -> None:
        """Check for errors that would occur later: see `StageModule.check`."""
        self._function("check", lambda run: None)(run)

    def _module(self) -> Any:
        return importlib.import_module(f"orchestration.stages.{self.name}")

    def _function(self, name: str, default: Any) -> Any:
        return getattr(self._module(), name, default)


STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "ingest", "bring the table of pairs up to date with the sources", section="ingest", needs_ray=True,
            reads_base=True, shares_data=True,
        ),
        Stage(
            "encode", "write the missing latents and text embeddings", section="encode", needs_ray=True,
            reads_base=True, shares_data=True,
        ),
        Stage(
            "train", "train with DeepSpeed ZeRO on Ray Train; resume from the last checkpoint if there is one",
            section="train", needs_ray=True, reads_base=True,
        ),
        Stage("export", "write the trained model as a diffusers pipeline", section="train"),
        Stage(
            "evaluate", "sample and score the base and the aligned model", section="encode", needs_ray=True,
            is_judging=True,
        ),
        Stage("report", "write the run's page and the index of runs", is_judging=True),
    )
}  # fmt: skip
ALL_STAGES = tuple(STAGES)
REPORT = ALL_STAGES[-1]
"""The stage that reports on all others; it comes last."""


def stages_of(config: RunConfig) -> tuple[str, ...]:
    """Return the names of a run's stages, in order: all, or `evaluate` and `report` if it only judges models."""
    return tuple(stage.name for stage in STAGES.values() if stage.is_judging or not config.only_judges)


def check_sections(config: RunConfig, names: Sequence[str], source: str = "the configuration") -> None:
    """Check that a configuration has the sections that stages need.

    Args:
        config: The configuration.
        names: The stages: one, or those of `mapo run`.
        source: The configuration's name in the error.

    Raises:
        ConfigError: A section is missing; the message names each.
    """
    sections = dict.fromkeys(section for name in names if (section := STAGES[name].section) is not None)
    missing = [section for section in sections if getattr(config, section) is None]
    if not missing:
        return
    hint = "docs/reference/configuration.md has every section with its keys"
    if {"ingest", "train"} <= set(missing):
        hint += "; a run that only judges names its `evaluate.models`, without `aligned` and `checkpoints`"
    command = f"mapo {names[0] if len(names) == 1 else 'run'}"
    raise ConfigError(f"{source} has no `{'`, `'.join(missing)}`, which `{command}` needs", hint)
