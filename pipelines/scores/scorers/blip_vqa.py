"""BLIP-VQA of T2I-CompBench: are the things of the prompt in the image, with their attributes?"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.result import Failure, Result, Score
from pipelines.scores.scorers.scorer import BuiltIn

MAX_WORDS = 50
DROPPED = re.compile(r"[.!\"()*#:;~]")
NO_QUESTION = "the prompt has no question"
NO_TEXTS = "the questions are not a list of texts"


class BlipVqa(BuiltIn):
    """BLIP-VQA.

    score = product over the questions of p(yes) / (p(yes) + p(no)), p = BLIP's probability of the answer's first word.
    As in the official code each p, and the product, is rounded to four digits, and products are of float32. Components:
    `question_0` and so on, the p of each question. The official script counts a prompt without a question as 1; here
    its images fail. Source: Karine-Huang/T2I-CompBench 1b70949, BLIPvqa_eval/BLIP_vqa.py, models/blip_vqa.py.
    """

    name: ClassVar[str] = "blip-vqa"
    description: ClassVar[str] = "Are all things of the prompt there, with their attributes? (BLIP, T2I-CompBench)"
    scale: ClassVar[str] = "product of probabilities, 0 to 1"
    licence: ClassVar[str] = "BSD-3-Clause"
    needs: ClassVar[tuple[str, ...]] = ("image", "prompt", "questions")
    parts: ClassVar[tuple[str, ...]] = ("blip-vqa-capfilt-large", "bert-tokenizer")
    preprocessing: ClassVar[str] = "blip-480"

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        from pipelines.scores.scorers.trunks.blip_vqa import load_blip_vqa

        model, tokenizer = (folders[part] for part in self.parts)
        self._images, self._head = load_blip_vqa(model, tokenizer, self.preprocessing, device)

    def _results(self, batch: Batch) -> Sequence[Result]:
        failures = batch.failures(self.needs)
        asked = [() if row in failures else each for row, each in enumerate(batch.extra["questions"])]
        reasons = [why_unasked(each) for each in asked]
        scores = self._scores(batch, {row: asked[row] for row, reason in enumerate(reasons) if reason is None})
        return [scores[row] if reason is None else Failure(reason) for row, reason in enumerate(reasons)]

    def _scores(self, batch: Batch, asked: Mapping[int, Sequence[str]]) -> dict[int, Score]:
        """Return the scores of images by row, all of which have questions."""
        if not asked:
            return {}
        rows = [row for row, questions in asked.items() for _ in questions]
        cleaned = [clean_question(question) for questions in asked.values() for question in questions]
        found = iter(self._head(batch.embed_images(self._images), rows, cleaned))
        return {row: product([rounded(next(found)) for _ in questions]) for row, questions in asked.items()}


def why_unasked(questions: Any) -> str | None:
    """Return why an image cannot be asked about; None if it can."""
    if not questions:
        return NO_QUESTION
    is_texts = isinstance(questions, list | tuple) and all(isinstance(each, str) for each in questions)
    return None if is_texts else NO_TEXTS


def clean_question(question: str) -> str:
    """Return a question as the official code asks it: lower case, without some marks, at most 50 words."""
    return " ".join(DROPPED.sub("", question.lower()).rstrip(" ").split(" ")[:MAX_WORDS])


def rounded(share: float) -> float:
    """Round to four digits as the official code does, which prints the number."""
    return float(f"{share:.4f}")


def product(shares: Sequence[float]) -> Score:
    """Multiply the answers of one image, in float32 and in their order."""
    found = np.float32(1)
    for share in shares:
        found *= np.float32(share)
    return Score(rounded(float(found)), {f"question_{place}": share for place, share in enumerate(shares)})
