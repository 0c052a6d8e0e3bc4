"""VQAScore: the probability that a vision-language model answers yes when asked whether the image shows the prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.dataset.errors import ModelError
from pipelines.dataset.values import JsonObject
from pipelines.scores.scorers.qwen import QwenScorer
from pipelines.scores.scorers.result import Score

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
YES = ("Yes", "yes", "YES", " Yes", " yes", " YES")
NO = ("No", "no", "NO", " No", " no", " NO")
"""Spellings whose probabilities are summed, each if it is one token; the first must be."""


class VqaScoreQwen3Vl8b(QwenScorer):
    """VQAScore with Qwen3-VL-8B-Instruct.

    score = the summed probability of all spellings of yes as the first token of the answer, without any sampling
    setting. Components: `yes_token`, that of "Yes" alone, which t2v_metrics 3.1 reports; `no`, that of all spellings of
    no. The VQAScore of the paper has CLIP-FlanT5-XXL as its judge, which transformers 5 cannot load: another judge is
    another metric, whose numbers do not compare.
    Source: linzhiqiu/t2v_metrics (question and answer).
    """

    name: ClassVar[str] = "vqascore-qwen3-vl-8b"
    description: ClassVar[str] = (
        "Would Qwen3-VL-8B say yes, the image shows this? (VQAScore with another judge than the paper's CLIP-FlanT5)"
    )
    scale: ClassVar[str] = "probability, 0 to 1"
    parts: ClassVar[tuple[str, ...]] = ("qwen3-vl-8b", "qwen3-vl-processor")

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        from pipelines.scores.scorers.trunks.qwen_vl import load_chat_model

        part, processor = self.parts
        self._model = load_chat_model(folders[part], part, folders[processor], device)
        self._yes, self._no = (spellings(self._model.prompts.tokenizer, words) for words in (YES, NO))

    def shaping(self, digests: Mapping[str, str]) -> JsonObject:
        """Return everything that shapes a score, for weights with these digests by part."""
        return {**super().shaping(digests), "preprocessing": "qwen", "question": QUESTION}

    def _scores(self, images: "list[Image]", prompts: list[str]) -> list[Score]:
        questions = [QUESTION.format(prompt) for prompt in prompts]
        return [self._score(each_V) for each_BV in self._model.first_tokens(images, questions) for each_V in each_BV]

    def _score(self, probabilities_V: "Tensor") -> Score:
        yes, no = (float(probabilities_V[tokens].sum()) for tokens in (self._yes, self._no))
        return Score(yes, {"yes_token": float(probabilities_V[self._yes[0]]), "no": no})


class VqaScoreQwen3Vl2b(VqaScoreQwen3Vl8b):
    """VQAScore with Qwen3-VL-2B-Instruct."""

    name: ClassVar[str] = "vqascore-qwen3-vl-2b"
    description: ClassVar[str] = (
        "Would Qwen3-VL-2B say yes, the image shows this? (VQAScore with another judge than the paper's CLIP-FlanT5)"
    )
    parts: ClassVar[tuple[str, ...]] = ("qwen3-vl-2b", "qwen3-vl-processor")


class VqaScoreQwen2Vl7b(VqaScoreQwen3Vl8b):
    """VQAScore with Qwen2-VL-7B-Instruct."""

    name: ClassVar[str] = "vqascore-qwen2-vl-7b"
    description: ClassVar[str] = (
        "Would Qwen2-VL-7B say yes, the image shows this? (VQAScore with another judge than the paper's CLIP-FlanT5)"
    )
    parts: ClassVar[tuple[str, ...]] = ("qwen2-vl-7b", "qwen2-vl-processor")


def spellings(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Return the tokens that are spellings of a word, the first first.

    Raises:
        ModelError: The first word is not one token.
    """
    found = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    if len(found[0]) != 1:
        raise ModelError(
            f"the tokenizer reads {words[0]!r} as {len(found[0])} tokens, so no single probability is its own",
            "is this the tokenizer of the judge? fetch it again",
        )
    return list(dict.fromkeys(ids[0] for ids in found if len(ids) == 1))
