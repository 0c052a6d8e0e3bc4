"""Closeness to reference images in style: CSD and Gram matrices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.result import Result
from pipelines.scores.scorers.scorer import BuiltIn
from pipelines.scores.scorers.subject import cosines


class Csd(BuiltIn):
    """Contrastive Style Descriptors: the style projection of a CLIP ViT-L/14.

    score = max(0, largest cosine with a reference). Source: learn2phoenix/CSD, CSD/model.py; the maximum and the cut at
    0 are OneIG-Bench's. The authors say that the published weights do not reproduce their paper.
    """

    name: ClassVar[str] = "csd"
    description: ClassVar[str] = "Is the image in the style of its references? (CSD)"
    scale: ClassVar[str] = "cos, 0 to 1"
    licence: ClassVar[str] = "MIT"
    needs: ClassVar[tuple[str, ...]] = ("image", "references")
    parts: ClassVar[tuple[str, ...]] = ("csd-vit-l",)
    preprocessing: ClassVar[str] = "clip-224"

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        from pipelines.scores.scorers.trunks.csd import load_csd

        self._images = load_csd(folders[self.parts[0]], self.preprocessing, device)

    def _results(self, batch: Batch) -> Sequence[Result]:
        images_BD, references = batch.embed_images(self._images), batch.embed_references(self._images)
        pairs = zip(images_BD, references, strict=True)
        return [float(cosines(image_D, each).max().clamp(min=0)) if len(each) else 0.0 for image_D, each in pairs]


class Gram(BuiltIn):
    """Distance of Gram matrices of VGG-19's features (Gatys et al. 2016), which only ranks images among themselves.

    score = smallest, over the references, mean over five layers of the mean squared difference of F F^T / (C H W),
    F = features (C, H W) after the first ReLU of each block; images resized to 512 and cropped.
    """

    name: ClassVar[str] = "gram"
    description: ClassVar[str] = "How far are the image's textures from those of its references? (VGG-19)"
    scale: ClassVar[str] = "mean squared difference, 0 and up"
    higher_is_better: ClassVar[bool] = False
    licence: ClassVar[str] = "BSD-3-Clause"
    needs: ClassVar[tuple[str, ...]] = ("image", "references")
    parts: ClassVar[tuple[str, ...]] = ("vgg19-features",)
    preprocessing: ClassVar[str] = "vgg-512"

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        from pipelines.scores.scorers.trunks.vgg import load_vgg

        self._images = load_vgg(folders[self.parts[0]], self.preprocessing, device)

    def _results(self, batch: Batch) -> Sequence[Result]:
        images_BD, references = batch.embed_images(self._images), batch.embed_references(self._images)
        pairs = zip(images_BD, references, strict=True)
        return [float((each - image_D).square().sum(dim=-1).min()) if len(each) else 0.0 for image_D, each in pairs]
