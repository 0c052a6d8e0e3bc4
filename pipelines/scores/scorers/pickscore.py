"""PickScore: CLIP ViT-H/14 trained on Pick-a-Pic."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.cosine import CosineScorer
from pipelines.scores.scorers.result import Result, Score
from pipelines.scores.scorers.text import CUT


class PickScore(CosineScorer):
    """PickScore v1.

    score = 100 * cos(image, prompt); component `logit` = exp(logit_scale) * cos, whose softmax over two images is the
    probability that each is preferred.
    Source: yuvalkirstain/PickScore, README (calc_probs). Other programs divide the logit by 26.
    """

    name: ClassVar[str] = "pickscore"
    description: ClassVar[str] = "Which image would users of Pick-a-Pic prefer for this prompt?"
    scale: ClassVar[str] = "100 cos, about 15 to 26"
    licence: ClassVar[str] = "MIT"
    parts: ClassVar[tuple[str, ...]] = ("pickscore-v1", "clip-tokenizer")
    preprocessing: ClassVar[str] = "clip-224-hf"

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        super()._load(folders, device)
        from pipelines.scores.scorers.trunks.clip import logit_scale

        self._logit_scale = logit_scale(folders[self.parts[0]])

    def _results(self, batch: Batch) -> Sequence[Result]:
        cosines, cut = self._cosines(batch)
        return [
            Score(100 * cosine, {"logit": self._logit_scale * cosine, CUT: share})
            for cosine, share in zip(cosines, cut, strict=True)
        ]
