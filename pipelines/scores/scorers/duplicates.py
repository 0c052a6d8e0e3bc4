"""Near duplicates among the images of a prompt: a model that has collapsed draws the same image again."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.images import Picture
from pipelines.scores.scorers.result import Result, Score
from pipelines.scores.scorers.scorer import BuiltIn

SIDE, KEPT = 32, 8
"""Side of the thumbnail, and of its block of low frequencies that makes the hash."""
NEAR_BITS = 10
"""Most differing bits, of 63, of two images that count as near duplicates; unrelated images differ in about 31."""


def perceptual_hash(picture: Picture) -> NDArray[np.bool_]:
    """Return 63 bits: which low frequencies of the 32 x 32 luma lie above their median; the mean is left out."""
    found: NDArray[np.bool_] = picture.remember("perceptual_hash", lambda: _hash(picture))
    return found


def _hash(picture: Picture) -> NDArray[np.bool_]:
    small = picture.rgb.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    places = np.arange(SIDE)
    waves = np.cos(np.pi * np.outer(places[:KEPT], 2 * places + 1) / (2 * SIDE))  # DCT-II, the scale does not matter
    low = (waves @ np.asarray(small, dtype=np.float64) @ waves.T).ravel()[1:].round(6)
    bits: NDArray[np.bool_] = low > np.median(low)
    return bits


class NearDuplicates(BuiltIn):
    """Share of the other images of the same prompt that are near duplicates by perceptual hash.

    `siblings`: for each image the other images of its prompt, itself left out. Component `nearest_bits`: differing bits
    of the nearest one.
    """

    name: ClassVar[str] = "near_duplicates"
    description: ClassVar[str] = "Share of the prompt's other images that look the same"
    scale: ClassVar[str] = "share, 0 to 1"
    higher_is_better: ClassVar[bool] = False
    licence: ClassVar[str] = "none needed: no weights"
    needs: ClassVar[tuple[str, ...]] = ("image", "siblings")

    def _results(self, batch: Batch) -> Sequence[Result]:
        failures = batch.failures(self.needs)
        return [failures.get(row) or self._of(batch, row) for row in range(len(batch))]

    def _of(self, batch: Batch, row: int) -> Score:
        own = perceptual_hash(batch.pictures[row])
        others = [perceptual_hash(batch.picture(image)) for image in batch.extra["siblings"][row]]
        bits = [int((own != other).sum()) for other in others]
        return Score(float(np.mean([each <= NEAR_BITS for each in bits])), {"nearest_bits": float(min(bits))})
