"""CLIP's part of T2I-CompBench's complex prompts: does the image show what happens, whatever it looks like?"""

from collections.abc import Sequence
from typing import ClassVar

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.result import Failure, Result
from pipelines.scores.scorers.subject import ClipT

WITHOUT_ADJECTIVES = "without_adjectives"
NO_TEXT = "the prompt has no text without its adjectives"


class CompbenchClipComplex(ClipT):
    """CLIP ViT-B/32, image against the prompt without its adjectives.

    score = cos(image, text), where a parser has found the adjectives once; see `compbench.words.without_adjectives`. On
    a GPU the official script computes in float16. Source: Karine-Huang/T2I-CompBench 1b70949,
    CLIPScore_eval/CLIP_similarity.py with `--complex`.
    """

    name: ClassVar[str] = "compbench-clip-complex"
    description: ClassVar[str] = (
        "Does the image follow the prompt without its adjectives? (OpenAI's CLIP ViT-B/32, T2I-CompBench)"
    )
    needs: ClassVar[tuple[str, ...]] = ("image", "prompt", WITHOUT_ADJECTIVES)
    reads: ClassVar[str] = WITHOUT_ADJECTIVES

    def _results(self, batch: Batch) -> Sequence[Result]:
        texts = batch.extra[WITHOUT_ADJECTIVES]
        if all(text is None for text in texts):
            return [Failure(NO_TEXT)] * len(batch)
        found = super()._results(batch)
        return [Failure(NO_TEXT) if text is None else result for text, result in zip(texts, found, strict=True)]
