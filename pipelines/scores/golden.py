"""Published values of scorers: the images they were computed for, where they stand, and a check against them.

The images do not ship with mapo; they are in the repositories named here. Most publishers give no value for any image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.dataset.errors import ModelError
from pipelines.scores.cluster_weights import LocatedPart, locate_parts
from pipelines.scores.scorers import Failure, Score, new_scorer
from pipelines.scores.verified import forget_verification, record_verification


@dataclass(frozen=True)
class PublishedValue:
    """The value of one image, by the name of its file."""

    image: str
    value: float


@dataclass(frozen=True)
class Golden:
    """Published values of one scorer.

    Args:
        source: Where the values stand.
        images: Where the images are.
        prompt: The prompt of all of them.
        values: The values, on our scale.
        tolerance: Largest difference that a device and a decoder explain.
    """

    source: str
    images: str
    prompt: str
    values: tuple[PublishedValue, ...]
    tolerance: float


GOLDEN = {
    "imagereward": Golden(
        source="THUDM/ImageReward, README.md, Example Use",
        images="assets/images of https://github.com/THUDM/ImageReward",
        prompt="a painting of an ocean with clouds and birds, day time, low depth field effect",
        values=(
            PublishedValue("1.webp", 0.58),
            PublishedValue("2.webp", 0.27),
            PublishedValue("3.webp", -1.41),
            PublishedValue("4.webp", -2.03),
        ),
        tolerance=0.02,
    ),
    "hpsv2": Golden(
        source="tgxs002/HPSv2, issue 27 (0.2876, a hundredth of ours)",
        images="assets of https://github.com/tgxs002/HPSv2",
        prompt="A cat with two horns on its head",
        values=(PublishedValue("demo_image.jpg", 28.76),),
        tolerance=0.1,
    ),
}
"""By the scorer's name. The tolerance of `hpsv2` covers the official float16 and its unknown resizing."""


@dataclass(frozen=True)
class CheckedValue:
    """A published value beside the one that was found here."""

    image: str
    published: float
    found: float

    def is_close(self, tolerance: float) -> bool:
        """Return whether they agree."""
        return abs(self.published - self.found) <= tolerance


def check_golden(name: str, images: Path) -> list[CheckedValue]:
    """Check a scorer of this machine against its published values, and record that it gives them.

    Args:
        name: The scorer's name, one of GOLDEN.
        images: The folder with the published images.

    Raises:
        ModelError: Weights or images are missing, or a value differs.
    """
    golden = GOLDEN[name]
    files = [images / each.image for each in golden.values]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{images} lacks {', '.join(missing)}, on which {name} is checked", f"they are in {golden.images}"
        )
    parts = locate_parts(name, new_scorer(name).parts, None)
    checked = _score(name, parts, golden, files)
    wrong = [each for each in checked if not each.is_close(golden.tolerance)]
    if wrong:
        forget_verification(name)
        told = ", ".join(f"{each.found:.4g} for {each.image} ({each.published:.4g} published)" for each in wrong)
        raise ModelError(
            f"{name} differs from its published values by more than {golden.tolerance}: {told} ({golden.source})",
            f"are these the images in {golden.images}? if so, fetch the weights again: mapo scorers fetch {name}",
        )
    values = {each.image: {"published": each.published, "found": each.found} for each in checked}
    record_verification(name, parts, golden.source, values)
    return checked


def _score(name: str, parts: Sequence[LocatedPart], golden: Golden, files: Sequence[Path]) -> list[CheckedValue]:
    from PIL import Image

    scorer = new_scorer(name)
    scorer.load({part.name: Path(str(part.folder)) for part in parts}, "cpu")
    checked = []
    for file, published in zip(files, golden.values, strict=True):
        with Image.open(file) as image:
            (result,) = scorer.score([image], [golden.prompt])
        if isinstance(result, Failure):
            raise ModelError(f"{name} cannot score {file}: {result.reason}", f"the images are in {golden.images}")
        checked.append(CheckedValue(file.name, published.value, result.value if isinstance(result, Score) else result))
    return checked
