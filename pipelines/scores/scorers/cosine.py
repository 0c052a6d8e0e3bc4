"""The base of scorers that compare an image with its prompt in CLIP's space."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.result import Result, Score
from pipelines.scores.scorers.scorer import PROMPT, BuiltIn
from pipelines.scores.scorers.text import CUT


class CosineScorer(BuiltIn):
    """Scorer by the cosine of an image's and its prompt's embedding; `parts` are a CLIP model and its tokenizer."""

    hidden_act: ClassVar[str] = "gelu"
    """The activation of the model: OpenAI's weights need `quick_gelu`."""
    as_open_clip: ClassVar[bool] = False
    """Whether prompts are cleaned with ftfy first."""
    reads: ClassVar[str] = PROMPT
    """The text that images are compared with: the prompt, or a further text among `needs`."""

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        from pipelines.scores.scorers.trunks.clip import load_images, load_texts

        model, tokenizer = (folders[part] for part in self.parts)
        self._images = load_images(model, self.preprocessing, self.hidden_act, device)
        self._texts = load_texts(model, tokenizer, self.hidden_act, device, as_open_clip=self.as_open_clip)

    def _cosines(self, batch: Batch) -> tuple[list[float], list[float]]:
        """Return for each image the cosine, and the share of its prompt's tokens that did not fit."""
        images_BD = batch.embed_images(self._images)
        texts_BD, cut = batch.embed_prompts(self._texts, self.reads)
        images_BD, texts_BD = (each / each.norm(dim=-1, keepdim=True) for each in (images_BD, texts_BD))
        cosines: list[float] = (images_BD * texts_BD).sum(dim=-1).tolist()
        return cosines, cut

    def _results(self, batch: Batch) -> Sequence[Result]:
        return [Score(100 * cosine, {CUT: share}) for cosine, share in zip(*self._cosines(batch), strict=True)]
