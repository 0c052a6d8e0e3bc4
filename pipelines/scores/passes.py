"""Scores the images of a unit in batches, and keeps a fault of one image apart from a fault of the machine."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.dataset.errors import MapoError, ModelError
from pipelines.dataset.status import ScoreStatus
from pipelines.dataset.values import Row
from pipelines.scores.loaded import LoadedJudge, describe
from pipelines.scores.pictures import Item
from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.result import UNANSWERED, Failure, Result, Score
from pipelines.scores.scorers.scorer import BuiltIn
from pipelines.scores.scorers.together import score_batch
from pipelines.units.actor import BatchSize, is_out_of_memory
from pipelines.units.stats import Effort

MAX_REASON = 300
WAY_OUT = "lower the scorer's `batch_size`, use smaller images, or use machines with more memory"
OF_THE_MACHINE = (OSError, ImportError, MemoryError)
"""Errors of a user's scorer that say nothing about its images."""


@dataclass
class Gathered:
    """Images that wait for a full batch of the same judges."""

    judges: tuple[int, ...]
    size: BatchSize
    items: list[Item] = field(default_factory=list)


class Passes:
    """Gathers the images of a unit, and scores whenever a batch is full.

    Judges with the same batch size, which share decoded images and trunks, take the same batches. A judge's batches
    follow from the unit and from its own batch size, whatever other judges there are.

    Args:
        judges: All judges of the actor, loaded.
        sizes: The batch size of each; shared by all units of the actor, and halved when memory runs out.
        effort: Counts the device's time.
    """

    def __init__(self, judges: Sequence[LoadedJudge], sizes: Sequence[BatchSize], effort: Effort) -> None:
        self._judges, self._sizes, self._effort = judges, sizes, effort
        self._waiting: dict[tuple[int, ...], Gathered] = {}
        self.results: list[dict[int, Result]] = [{} for _ in judges]
        """By judge and position of the image."""

    def add(self, item: Item, wanted: Sequence[int]) -> None:
        """Add an image, and the judges, by position, that shall score it."""
        by_size: dict[int, list[int]] = {}
        for position in wanted:
            by_size.setdefault(id(self._sizes[position]), []).append(position)
        for positions in by_size.values():
            judges = tuple(positions)
            gathered = self._waiting.setdefault(judges, Gathered(judges, self._sizes[judges[0]]))
            gathered.items.append(item)
            if len(gathered.items) >= gathered.size.size:
                self._score(self._waiting.pop(judges))

    def finish(self) -> None:
        """Score the rest."""
        for gathered in self._waiting.values():
            self._score(gathered)
        self._waiting.clear()

    def _score(self, gathered: Gathered) -> None:
        items = gathered.items
        while items:
            part = items[: gathered.size.size]
            results = gathered.size.attempt(
                lambda part=part: self._pass(gathered.judges, part),  # type: ignore[misc]
                len(part),
                "score even one image",
                WAY_OUT,
            )
            if results is None:
                continue
            self._effort.num_images += len(part)
            for judge, values in zip(gathered.judges, results, strict=True):
                self.results[judge].update(zip((item.position for item in part), values, strict=True))
            items = items[len(part) :]

    def _pass(self, judges: tuple[int, ...], items: Sequence[Item]) -> list[list[Result]]:
        with self._effort.measured("encode"):
            batch = batch_of(items)
            return [score_apart(self._judges[judge], batch, items) for judge in judges]


def batch_of(items: Sequence[Item]) -> Batch:
    """Return images as scorers take them."""
    names = items[0].extra
    return Batch(
        [item.picture for item in items],
        [item.prompt for item in items],
        {name: [item.extra[name] for item in items] for name in names},
    )


def score_apart(loaded: LoadedJudge, batch: Batch, items: Sequence[Item]) -> list[Result]:
    """Score a batch with one judge; if its scorer raises, score the images one by one, so that only one fails.

    Raises:
        MapoError: The fault is the machine's or the weights'.
        RuntimeError: There is not enough memory.
    """
    try:
        return score_batch(loaded.scorer, batch)
    except Exception as error:
        _raise_if_of_the_machine(loaded, error)
    return [_score_one(loaded, item) for item in items]


def _score_one(loaded: LoadedJudge, item: Item) -> Result:
    try:
        (result,) = score_batch(loaded.scorer, batch_of([item]))
    except Exception as error:
        _raise_if_of_the_machine(loaded, error)
        return Failure(describe(error)[:MAX_REASON])
    return result


def _raise_if_of_the_machine(loaded: LoadedJudge, error: Exception) -> None:
    """Raise an error again unless it may be due to an image."""
    if isinstance(error, MapoError) or is_out_of_memory(error):
        raise error
    if _is_of_device(error) or isinstance(error, OF_THE_MACHINE):
        whose = "" if isinstance(loaded.scorer, BuiltIn) else f"; if not, see `score` of {loaded.judge.entry.name}"
        raise ModelError(
            f"the scorer {loaded.judge.name} failed on this machine: {describe(error)}",
            f"finished scores are kept; check the device and the files it names, then rerun the command{whose}",
        ) from error


def _is_of_device(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    is_of_torch = torch is not None and isinstance(error, torch.AcceleratorError)
    return is_of_torch or (isinstance(error, RuntimeError) and "CUDA" in str(error))


def row_of(result: Result) -> Row:
    """Return the columns of a result: value, components, status and reason; a transient failure is UNANSWERED."""
    if isinstance(result, Failure):
        status = UNANSWERED if result.transient else str(ScoreStatus.FAILED)
        return {"value": None, "components": "{}", "status": status, "reason": result.reason}
    value, components = (result.value, result.components) if isinstance(result, Score) else (result, {})
    told: dict[str, Any] = {name: _finite(each) for name, each in components.items()}
    return {
        "value": float(value),
        "components": json.dumps(told, sort_keys=True),
        "status": str(ScoreStatus.SCORED),
        "reason": None,
    }


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
