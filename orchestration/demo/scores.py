"""Scores of the demo: does a sample have the preferred style, and does it still show its photo?

Both learn from held-out pairs of the run's own data set and look only at pixels, so that their verdict can be checked
by eye. Letters in names: N images, F features.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from orchestration.demo.scenes import lightness, subject_of

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

GRID = 16
"""Side of the image on which content is compared, in pixels."""

NUM_BANDS = 4
"""Lightness bands of a palette, from the darkest pixels to the lightest."""


def palette(image: Image.Image) -> Array:
    """Compute colour statistics of an image, each in about -1..1.

    For each quarter of the pixels, from dark to light: their mean blue-difference and red-difference (Rec. 601),
    and the strength of their colour; then the share of the image that is warm, and the spread of both differences.
    """
    rgb = np.asarray(image.convert("RGB"), dtype=np.float64).reshape(-1, 3) / 255
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    blue, red = 0.564 * (rgb[:, 2] - luma), 0.713 * (rgb[:, 0] - luma)
    bands = np.array_split(np.argsort(luma, kind="stable"), NUM_BANDS)
    means = [(blue[band].mean(), red[band].mean(), np.hypot(blue, red)[band].mean()) for band in bands]
    spread = (blue.std(), red.std(), float((red > blue).mean()))
    return np.array([*np.ravel(means), *spread])


class StyleScore:
    """Score of how far a sample's colours are on the side of the chosen images."""

    name = "style"
    description = "Does the sample have the colours of the preferred images? 1: like those, 0: like the rejected ones."

    shrinkage = 0.05
    """Share of the features' mean variance that is added to each variance, so that few references suffice."""

    def fit(self, chosen: Sequence[Image.Image], rejected: Sequence[Image.Image], prompts: Sequence[str]) -> None:
        """Find the direction in palette space that separates both sides (Fisher's linear discriminant).

        Args:
            chosen: Preferred images of held-out pairs.
            rejected: The other image of each pair, in the same order.
            prompts: Not used.

        Raises:
            ValueError: There is no pair, or the sides have different lengths.
        """
        _check(chosen, rejected, prompts)
        sides = [np.stack([palette(image) for image in side]) for side in (chosen, rejected)]
        within = np.asarray(sum(np.cov(side, rowvar=False, bias=True) for side in sides)) / 2
        ridge = self.shrinkage * float(np.trace(within)) / len(within) + 1e-6
        within = within + ridge * np.eye(len(within))
        self.direction: Array = np.linalg.solve(within, sides[0].mean(axis=0) - sides[1].mean(axis=0))
        ends = [float((side @ self.direction).mean()) for side in sides]
        self.middle, self.half = sum(ends) / 2, (ends[0] - ends[1]) / 2

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Score images in 0..1: 0.98 at the mean of the chosen references, 0.02 at that of the rejected ones.

        Raises:
            AttributeError: `fit` was not called.
        """
        places = [(float(palette(image) @ self.direction) - self.middle) / self.half for image in images]
        return [float(1 / (1 + np.exp(-np.log(49) * np.clip(place, -20, 20)))) for place in places]


def structure(image: Image.Image) -> Array:
    """Describe the layout of an image regardless of its colours: one vector of length one.

    Half of it is the lightness on a coarse grid, without its mean and contrast; half are the gradients of the
    lightness, as a histogram of directions in each of 4 by 4 cells.
    """
    small = image.convert("RGB").resize((4 * GRID, 4 * GRID), Image.Resampling.BOX)
    luma = lightness(small)
    ranks = np.argsort(np.argsort(luma, axis=None, kind="stable"), kind="stable").reshape(luma.shape) / luma.size
    coarse = (0.5 * ranks + 0.5 * _standard(luma)).reshape(GRID, 4, GRID, 4).mean(axis=(1, 3))
    down, across = np.gradient(luma)
    strength = np.hypot(down, across)
    direction = ((np.arctan2(down, across) % np.pi) / np.pi * 8).astype(int) % 8
    cells = np.zeros((4, 4, 8))
    rows, columns = np.indices(luma.shape) // GRID
    np.add.at(cells, (rows, columns, direction), strength)
    halves: Array = np.concatenate([_unit(_standard(coarse).ravel()), _unit(np.sqrt(cells).ravel())])
    return halves / float(np.sqrt(2))


def _standard(values: Array) -> Array:
    standard: Array = (values - values.mean()) / (values.std() + 1e-3)
    return standard


def _unit(values: Array) -> Array:
    unit: Array = values / (float(np.linalg.norm(values)) + 1e-9)
    return unit


class ContentScore:
    """Score of whether a sample still recognisably shows the photo that its prompt names."""

    name = "content"
    description = (
        "Does the sample still show the photo in its prompt, whatever the colours? Share of its nearest references."
    )

    num_neighbours = 5
    """Number of nearest references that vote, weighted by likeness."""

    def fit(self, chosen: Sequence[Image.Image], rejected: Sequence[Image.Image], prompts: Sequence[str]) -> None:
        """Remember the structure of both images of each pair.

        Args:
            chosen: Preferred images of held-out pairs.
            rejected: The other image of each pair, in the same order.
            prompts: Their prompts; each names its photo's subject.

        Raises:
            ValueError: There is no pair, the lengths differ, or a prompt is not a caption of the demo.
        """
        _check(chosen, rejected, prompts)
        self.references_NF: Array = np.stack([structure(image) for image in (*chosen, *rejected)])
        self.subjects = [subject_of(prompt) for prompt in (*prompts, *prompts)]

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Score images in 0..1: the share of their nearest references, by likeness, that show their subject.

        Raises:
            AttributeError: `fit` was not called.
            ValueError: A prompt is not a caption of the demo.
        """
        values = []
        for image, prompt in zip(images, prompts, strict=True):
            likeness = self.references_NF @ structure(image)
            nearest = np.argsort(-likeness)[: self.num_neighbours]
            votes = [self.subjects[position] == subject_of(prompt) for position in nearest]
            values.append(float(np.mean(votes)))
        return values


def _check(chosen: Sequence[Image.Image], rejected: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    if not chosen or not len(chosen) == len(rejected) == len(prompts):
        raise ValueError(
            f"the scores need held-out pairs: {len(chosen)} chosen and {len(rejected)} rejected images, "
            f"{len(prompts)} prompts\n"
            "hint: raise `ingest.validation_ratio`"
        )
