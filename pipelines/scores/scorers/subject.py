"""Fidelity to a subject, as DreamBooth measures it: DINO, CLIP-I and CLIP-T."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.cosine import CosineScorer
from pipelines.scores.scorers.result import Result, Score
from pipelines.scores.scorers.scorer import BuiltIn
from pipelines.scores.scorers.text import CUT

if TYPE_CHECKING:
    from pipelines.scores.scorers.trunks.trunk import ImageTrunk


class ReferenceScorer(BuiltIn):
    """Scorer by the mean cosine of an image and each of its references, which are real images of the subject.

    Over all images of a subject their mean is the mean over all pairs of a sample and a real image.
    """

    scale: ClassVar[str] = "cos, 0 to 1"
    needs: ClassVar[tuple[str, ...]] = ("image", "references")
    _images: "ImageTrunk"

    def _results(self, batch: Batch) -> Sequence[Result]:
        images_BD, references = batch.embed_images(self._images), batch.embed_references(self._images)
        return [float(cosines(image_D, each).mean()) for image_D, each in zip(images_BD, references, strict=True)]


def cosines(image_D: Any, references_RD: Any) -> Any:
    """Return the cosine of an embedding and each of its references."""
    image_D = image_D / image_D.norm()
    return (references_RD / references_RD.norm(dim=-1, keepdim=True)) @ image_D


class Dino(ReferenceScorer):
    """DINO ViT-S/16: the class token after the last norm; images at 256, cropped to 224.

    DreamBooth's own code is not published; this is the common reading of the paper.
    """

    name: ClassVar[str] = "dino"
    description: ClassVar[str] = "Is it this very subject? (DINO ViT-S/16)"
    parts: ClassVar[tuple[str, ...]] = ("dino-vits16",)
    preprocessing: ClassVar[str] = "dino-224"

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        from pipelines.scores.scorers.trunks.vit import load_dino

        self._images = load_dino(folders[self.parts[0]], self.preprocessing, device)


class ClipI(ReferenceScorer):
    """CLIP-I: OpenAI's ViT-B/32, image against image."""

    name: ClassVar[str] = "clip-i"
    description: ClassVar[str] = "Is it a subject of this kind? (OpenAI's CLIP ViT-B/32)"
    licence: ClassVar[str] = "MIT"
    parts: ClassVar[tuple[str, ...]] = ("clip-b32-openai",)
    preprocessing: ClassVar[str] = "clip-224"

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        from pipelines.scores.scorers.trunks.clip import OPENAI, load_images

        self._images = load_images(folders[self.parts[0]], self.preprocessing, OPENAI, device)


class ClipT(CosineScorer):
    """CLIP-T: OpenAI's ViT-B/32, image against prompt, whose words should name the class and not the rare token."""

    name: ClassVar[str] = "clip-t"
    description: ClassVar[str] = "Does the image follow the prompt about the subject? (OpenAI's CLIP ViT-B/32)"
    scale: ClassVar[str] = "cos, about 0.2 to 0.35"
    licence: ClassVar[str] = "MIT"
    parts: ClassVar[tuple[str, ...]] = ("clip-b32-openai", "clip-tokenizer")
    preprocessing: ClassVar[str] = "clip-224"
    hidden_act: ClassVar[str] = "quick_gelu"

    def _results(self, batch: Batch) -> Sequence[Result]:
        return [Score(cosine, {CUT: share}) for cosine, share in zip(*self._cosines(batch), strict=True)]
