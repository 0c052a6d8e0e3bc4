"""The base of scorers that stand on a vision-language model of Qwen, in this process."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.result import Failure, Result, Score
from pipelines.scores.scorers.scorer import BuiltIn

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ASPECT_RATIO = 200
"""Of an image that Qwen's resizing takes."""


class QwenScorer(BuiltIn):
    """Scorer of images with prompts that a template of Qwen can hold; others are failures."""

    _model: Any

    def _results(self, batch: Batch) -> Sequence[Result]:
        failures = batch.failures(self.needs)
        for row in range(len(batch)):
            if row not in failures and (reason := self._unfit(batch, row)) is not None:
                failures[row] = Failure(reason)
        rows = [row for row in range(len(batch)) if row not in failures]
        found = self._scores([batch.pictures[row].rgb for row in rows], [str(batch.prompts[row]) for row in rows])
        scores: dict[int, Result] = dict(zip(rows, found, strict=True))
        return [failures.get(row) or scores[row] for row in range(len(batch))]

    def _unfit(self, batch: Batch, row: int) -> str | None:
        """Return why the model cannot take an image with its prompt; None if it can."""
        if (mark := self._model.prompts.mark_in(str(batch.prompts[row]))) is not None:
            return f"the prompt contains {mark}, a mark of the model"
        width, height = batch.pictures[row].rgb.size
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            return (
                f"the image has {width} x {height} pixels; one side may be {MAX_ASPECT_RATIO} times the other at most"
            )
        return None

    def _scores(self, images: "list[Image]", prompts: list[str]) -> list[Score]:
        """Return the score of each image."""
        raise NotImplementedError
