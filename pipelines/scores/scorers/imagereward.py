"""ImageReward: BLIP with a regression head, trained on ratings of images for prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.result import Result, Score
from pipelines.scores.scorers.scorer import BuiltIn
from pipelines.scores.scorers.text import CUT

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the training set."""


class ImageReward(BuiltIn):
    """ImageReward v1.0.

    score = (w . h + b - MEAN) / STD, h = BLIP's text state of [CLS] that has looked at the image. A head of zeros gives
    -0.1618. The model sees 35 tokens: component `cut_token_ratio` is the share of the prompt that it did not.
    Source: THUDM/ImageReward, ImageReward/ImageReward.py (score_gard).
    """

    name: ClassVar[str] = "imagereward"
    description: ClassVar[str] = "How well does the image serve the prompt, by ratings of experts?"
    scale: ClassVar[str] = "standard deviations, about -2 to 2"
    parts: ClassVar[tuple[str, ...]] = ("imagereward-v1.0", "bert-tokenizer")
    preprocessing: ClassVar[str] = "clip-224"

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        from pipelines.scores.scorers.trunks.blip import load_blip

        model, tokenizer = (folders[part] for part in self.parts)
        self._images, self._head = load_blip(model, tokenizer, self.preprocessing, device)

    def _results(self, batch: Batch) -> Sequence[Result]:
        rows = [row for row in range(len(batch)) if row not in batch.failures(self.needs)]
        states_BSD = batch.embed_images(self._images)
        rewards, cut = self._head(states_BSD[rows], [str(batch.prompts[row]) for row in rows])
        scores = [Score((reward - MEAN) / STD, {CUT: share}) for reward, share in zip(rewards, cut, strict=True)]
        results: list[Result] = [float("nan")] * len(batch)
        for row, score in zip(rows, scores, strict=True):
            results[row] = score
        return results
