"""GenEval: whether an image shows the objects that its prompt asks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.geneval.logic import Verdict, judge, threshold_of
from pipelines.scores.scorers.geneval.requirements import UnusableMetadata, requirements_of
from pipelines.scores.scorers.result import Failure, Result, Score
from pipelines.scores.scorers.scorer import BuiltIn

if TYPE_CHECKING:
    from pipelines.scores.scorers.geneval.boxes import Objects
    from pipelines.scores.scorers.images import Picture


class GenEval(BuiltIn):
    """GenEval with Meta's weights: 1 if the image shows everything that its prompt asks for, else 0.

    The official script runs mmdet's training of Mask2Former with the same backbone (`mask2former_swin-s…_coco`); this
    one runs Meta's, with the same classes, thresholds and rules. Values lie near the published ones and are not equal
    to them. Over a suite: the mean over images of each tag, and the mean of the six tags.

    `metadata`: for each image the row of GenEval that its prompt comes from. Components: `num_objects`; for each
    requirement `include_0`, `exclude_0` and so on, 1 if it is met.
    """

    name: ClassVar[str] = "geneval"
    description: ClassVar[str] = "Does the image show the objects of the prompt: how many, where, in which colours?"
    scale: ClassVar[str] = "0 or 1"
    licence: ClassVar[str] = "MIT"
    needs: ClassVar[tuple[str, ...]] = ("image", "prompt", "metadata")
    parts: ClassVar[tuple[str, ...]] = ("mask2former-swin-s-coco", "clip-l14-openai", "clip-tokenizer")

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        from pipelines.scores.scorers.geneval.colours import load_colours
        from pipelines.scores.scorers.geneval.detector import load_detector

        mask2former, clip, tokenizer = (folders[part] for part in self.parts)
        self._detector = load_detector(mask2former, device)
        self._colours = load_colours(clip, tokenizer, device)

    def _results(self, batch: Batch) -> Sequence[Result]:
        failures = batch.failures(self.needs)
        rows = zip(batch.pictures, batch.extra["metadata"], strict=True)
        return [failures.get(row) or self._of(*each) for row, each in enumerate(rows)]

    def _of(self, picture: "Picture", metadata: Any) -> Result:
        try:
            wanted = requirements_of(metadata)
        except UnusableMetadata as error:
            return Failure(str(error))
        image = picture.rgb
        objects = self._detector.detect(image, threshold_of(wanted.tag))
        verdict = judge(wanted, objects, lambda name, found: self._colours(image, name, found))
        return Score(float(verdict.is_correct), _components(verdict, objects))


def _components(verdict: Verdict, objects: "dict[str, Objects]") -> dict[str, float]:
    """Return the numbers behind a verdict."""
    met = {f"include_{place}": float(each is None) for place, each in enumerate(verdict.include)}
    met |= {f"exclude_{place}": float(each is None) for place, each in enumerate(verdict.exclude)}
    return {"num_objects": float(sum(map(len, objects.values()))), **met}
