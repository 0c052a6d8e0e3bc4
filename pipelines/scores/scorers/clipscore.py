"""CLIPScore with a named tower: scores of different towers have different scales."""

from collections.abc import Sequence
from typing import ClassVar

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.cosine import CosineScorer
from pipelines.scores.scorers.result import Result, Score
from pipelines.scores.scorers.text import CUT


class ClipScoreL14(CosineScorer):
    """CLIPScore with OpenAI's ViT-L/14.

    score = 100 * max(cos(image, prompt), 0), the scale of torchmetrics, without a prefix. The paper (Hessel et al.,
    2021) prints 2.5 * max(cos, 0) of ViT-B/32 with "A photo depicts " before the caption.
    """

    name: ClassVar[str] = "clipscore-l14"
    description: ClassVar[str] = "Does the image show what the prompt says? (OpenAI's CLIP ViT-L/14)"
    scale: ClassVar[str] = "100 max(cos, 0), about 15 to 35"
    licence: ClassVar[str] = "MIT"
    parts: ClassVar[tuple[str, ...]] = ("clip-l14-openai", "clip-tokenizer")
    preprocessing: ClassVar[str] = "clip-224"
    hidden_act: ClassVar[str] = "quick_gelu"

    def _results(self, batch: Batch) -> Sequence[Result]:
        cosines, cut = self._cosines(batch)
        return [
            Score(max(100 * cosine, 0.0), {"cosine": cosine, CUT: share})  # NaN stays NaN in this order
            for cosine, share in zip(cosines, cut, strict=True)
        ]


class ClipScore(ClipScoreL14):
    """CLIPScore with the tower of `clipscore-l14`."""

    name: ClassVar[str] = "clipscore"


class ClipScoreB32(ClipScoreL14):
    """CLIPScore with OpenAI's ViT-B/32, the tower of the paper."""

    name: ClassVar[str] = "clipscore-b32"
    description: ClassVar[str] = "Does the image show what the prompt says? (OpenAI's CLIP ViT-B/32)"
    parts: ClassVar[tuple[str, ...]] = ("clip-b32-openai", "clip-tokenizer")


class ClipScoreH14(ClipScoreL14):
    """CLIPScore with LAION's ViT-H/14, which has plain GELU."""

    name: ClassVar[str] = "clipscore-h14"
    description: ClassVar[str] = "Does the image show what the prompt says? (LAION's CLIP ViT-H/14)"
    scale: ClassVar[str] = "100 max(cos, 0), about 15 to 45"
    parts: ClassVar[tuple[str, ...]] = ("clip-h14-laion", "clip-tokenizer")
    hidden_act: ClassVar[str] = "gelu"
