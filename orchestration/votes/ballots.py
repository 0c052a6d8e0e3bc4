"""The images that a session of votes compares: samples of two models for one suite, which an evaluation has drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestration.run.context import Run
from orchestration.stages.evaluate import evaluation_of
from orchestration.stages.judged_suites import names_of_suites
from pipelines.config import CHECKPOINTS, OF_CHECKPOINT
from pipelines.dataset.errors import ConfigError, SnapshotError
from pipelines.samples.execution import read_samples
from pipelines.samples.plan import count_missing
from pipelines.scores.votes import Pairing, pair_samples

if TYPE_CHECKING:
    from orchestration.config import RunConfig
    from orchestration.stages.evaluation import Cell

DTYPES = {"cpu": ("float32",), "gpu": ("float16",), "auto": ("float16", "float32")}
"""What `evaluate.dtype: auto` stands for, by `encode.device`; what was drawn is taken, so that no cluster is asked."""


class Contest:
    """Two models of a run and one of its suites.

    Args:
        run: The run.
        models: Names of the two models.
        suite: Name of the suite, with its version or without; None for the first of the configuration.

    Raises:
        ConfigError: A model or the suite is not of the configuration, or the models are the same.
        SnapshotError: Samples are not drawn.
    """

    def __init__(self, run: Run, models: tuple[str, str], suite: str | None) -> None:
        self._run, self.models = run, models
        check_models(run.config, models)
        self._suite = wanted_suite(run.config, suite)
        self.cells = self._drawn_cells()

    @property
    def suite(self) -> str:
        """Name and version of the suite, with its deviations."""
        found = self.cells[0].suite
        return "; ".join((found.label, *found.deviations))

    @property
    def samples(self) -> tuple[str, str]:
        """The fingerprints of the samples of both models."""
        return self.cells[0].drawing.fingerprint, self.cells[1].drawing.fingerprint

    def pairing(self) -> Pairing:
        """Return the pairs of images.

        Raises:
            SnapshotError: There is none.
        """
        found = pair_samples(*(read_samples(self._run.storage, cell.drawing) for cell in self.cells))
        if not found.ballots:
            raise SnapshotError(
                f"{' and '.join(self.models)} have no two images to compare on {self.suite}: {found.num_equal:,} are"
                f" equal and {found.num_absent:,} could not be drawn",
                "choose other models or another suite",
            )
        return found

    def _drawn_cells(self) -> tuple[Cell, Cell]:
        """Return the samples of both models, in the type that they were drawn in."""
        config = self._run.config
        assert config.encode is not None  # checked with the models
        dtypes = DTYPES[config.encode.device] if config.evaluate.dtype == "auto" else (config.evaluate.dtype,)
        for dtype in dtypes:
            cells = self._cells(dtype)
            missing = [count_missing(self._run.storage, cell.drawing) for cell in cells]
            if not any(missing):
                return cells
        counts = ", ".join(f"{count:,} of {model}" for model, count in zip(self.models, missing, strict=True))
        raise SnapshotError(
            f"samples of the suite {self._suite} are not drawn yet: {counts}",
            "`mapo evaluate CONFIG` draws them; vote with the same configuration",
        )

    def _cells(self, dtype: str) -> tuple[Cell, Cell]:
        """Return the samples of both models if they were drawn in this type; no other model is looked at."""
        config = self._run.config
        entries = [
            each
            for each, name in zip(config.evaluate.models, config.evaluate.model_names, strict=True)
            if name in self.models or name == CHECKPOINTS
        ]
        changes = {"models": tuple(entries), "against": self.models[0], "suites": (self._suite,), "dtype": dtype}
        narrowed = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})
        run = Run(narrowed, self._run.storage, self._run.journal, self._run.say)
        evaluation = evaluation_of(run, run.journal.record("train"), run.journal.record("export"))
        names = names_of_suites(narrowed)
        suite = evaluation.suites[names.index(self._suite)]
        found = {model.name: model for model in evaluation.models}
        if absent := [name for name in self.models if name not in found]:
            raise ConfigError(f"there is no checkpoint {absent[0]}", f"choose from {', '.join(found)}")
        first, second = (evaluation.cell(suite, found[name]) for name in self.models)
        return first, second


def check_models(config: RunConfig, models: Sequence[str]) -> None:
    """Check the names of two models of a configuration.

    Raises:
        ConfigError: One is not there, they are the same, or there is no base model.
    """
    if config.encode is None:
        raise ConfigError("the configuration has no section `encode`, so it draws no samples", "name its base model")
    known = config.evaluate.model_names
    for name in models:
        if name not in known and not (CHECKPOINTS in known and OF_CHECKPOINT.fullmatch(name)):
            raise ConfigError(
                f"there is no model {name} in `evaluate.models`",
                f"choose two of {', '.join(each for each in known if each != CHECKPOINTS)}",
            )
    if models[0] == models[1]:
        raise ConfigError(f"{models[0]} is compared with itself", "name two models")


def wanted_suite(config: RunConfig, suite: str | None) -> str:
    """Return a suite of a configuration by its name, with its version or without; by default the first one.

    Raises:
        ConfigError: There is no such suite.
    """
    names = names_of_suites(config)
    if suite is None:
        return names[0]
    found = next((name for name in names if suite in (name, name.partition("@")[0])), None)
    if found is None:
        raise ConfigError(f"there is no suite {suite} in `evaluate.suites`", f"choose from {', '.join(names)}")
    return found
