"""LAION's improved aesthetic predictor: an affine map of OpenAI's CLIP ViT-L/14."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.result import Result
from pipelines.scores.scorers.scorer import BuiltIn


class Aesthetic(BuiltIn):
    """LAION's improved aesthetic predictor (sac+logos+ava1-l14-linearMSE), "v2" in many papers.

    score = w . e / |e| + b, e = CLIP's projected image embedding. The published head is five linear layers without
    activations between them, which `fetch` multiplies out.
    Source: christophschuhmann/improved-aesthetic-predictor, simple_inference.py.
    """

    name: ClassVar[str] = "aesthetic"
    description: ClassVar[str] = "How would people rate the beauty of the image, whatever it shows?"
    scale: ClassVar[str] = "rating, about 1 to 10"
    needs: ClassVar[tuple[str, ...]] = ("image",)
    parts: ClassVar[tuple[str, ...]] = ("clip-l14-openai", "aesthetic-sac-logos-ava1")
    preprocessing: ClassVar[str] = "clip-224"

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        from pipelines.scores.scorers.trunks.clip import OPENAI, load_images
        from pipelines.scores.scorers.trunks.head import load_affine

        clip, head = (folders[part] for part in self.parts)
        self._images = load_images(clip, self.preprocessing, OPENAI, device)
        self._head = load_affine(head, self._images.model.config.projection_dim, device)

    def _results(self, batch: Batch) -> Sequence[Result]:
        embeds_BD = batch.embed_images(self._images)
        ratings: list[float] = self._head(embeds_BD / embeds_BD.norm(dim=-1, keepdim=True)).tolist()
        return ratings
