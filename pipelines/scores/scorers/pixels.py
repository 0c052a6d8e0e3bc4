"""Statistics of pixels, without weights: they show what a gain in another score was paid with.

They describe; `higher_is_better` only says which way the number of a healthy image lies.
Letters: H rows, W columns, C channels.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.images import Picture
from pipelines.scores.scorers.result import Result
from pipelines.scores.scorers.scorer import BuiltIn

Array = NDArray[np.float64]
DARK = 0.1
"""Luma below which a pixel is dark, 0..1."""
EDGE = 0.1
"""Gradient of luma, per pixel at EDGE_SIDE, above which a pixel lies on an edge."""
EDGE_SIDE = 256
COLOUR_BINS = 8
"""Bins for each channel of the colour histogram."""
GRID = 8
"""Pixels of one latent of the VAE."""


def rgb(picture: Picture) -> Array:
    """Return the colours of an image in 0..1: H, W, C. Nothing is kept: 64 large images would take 1.6 GB."""
    return np.asarray(picture.rgb, dtype=np.float64) / 255


def luma(picture: Picture) -> Array:
    """Return the luma (Rec. 601) of an image in 0..1: H, W."""
    values: Array = rgb(picture) @ np.array([0.299, 0.587, 0.114])
    return values


class PixelScorer(BuiltIn):
    """Base of the statistics: one number from one image."""

    licence: ClassVar[str] = "none needed: no weights"
    needs: ClassVar[tuple[str, ...]] = ("image",)

    def _results(self, batch: Batch) -> Sequence[Result]:
        nothing = float("nan")
        return [nothing if picture.unreadable else self.of(picture) for picture in batch.pictures]

    def of(self, picture: Picture) -> float:
        """Return the number of one image."""
        raise NotImplementedError


class DarkShare(PixelScorer):
    """Share of pixels whose luma is below 0.1."""

    name: ClassVar[str] = "dark_share"
    description: ClassVar[str] = "Share of the image that is nearly black"
    scale: ClassVar[str] = "share, 0 to 1"
    higher_is_better: ClassVar[bool] = False

    def of(self, picture: Picture) -> float:
        """Return the share."""
        return float((luma(picture) < DARK).mean())


class Saturation(PixelScorer):
    """Mean saturation in HSV: (max - min) / max over the channels of a pixel, 0 for black."""

    name: ClassVar[str] = "saturation"
    description: ClassVar[str] = "How strong the colours are on average"
    scale: ClassVar[str] = "mean of HSV saturation, 0 to 1"

    def of(self, picture: Picture) -> float:
        """Return the mean."""
        colours_HWC = rgb(picture)
        most_HW, least_HW = colours_HWC.max(axis=-1), colours_HWC.min(axis=-1)
        return float(((most_HW - least_HW) / np.where(most_HW > 0, most_HW, 1)).mean())


class EdgeDensity(PixelScorer):
    """Share of pixels on an edge, at a shorter side of 256 pixels: the gradient of luma is above 0.1 a pixel."""

    name: ClassVar[str] = "edge_density"
    description: ClassVar[str] = "Share of the image that lies on an edge: detail, or noise"
    scale: ClassVar[str] = "share, 0 to 1"

    def of(self, picture: Picture) -> float:
        """Return the share."""
        small = Picture(picture.shortest(EDGE_SIDE, Image.Resampling.BOX))
        if min(small.rgb.size) < 2:
            return 0.0
        down_HW, across_HW = np.gradient(luma(small))
        return float((np.hypot(down_HW, across_HW) > EDGE).mean())


class ColourEntropy(PixelScorer):
    """Entropy of the colour histogram of 8 x 8 x 8 bins, in bits: 0 for one colour, 9 for all of them alike."""

    name: ClassVar[str] = "colour_entropy"
    description: ClassVar[str] = "How many different colours the image has"
    scale: ClassVar[str] = "bits, 0 to 9"

    def of(self, picture: Picture) -> float:
        """Return the entropy."""
        bins_N3 = np.asarray(picture.rgb, dtype=np.int64).reshape(-1, 3) * COLOUR_BINS // 256
        counts = np.bincount(bins_N3 @ np.array([COLOUR_BINS**2, COLOUR_BINS, 1]), minlength=COLOUR_BINS**3)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log2(shares)).sum()) + 0.0


class GridEnergy(PixelScorer):
    """Strength of a pattern that repeats every 8 pixels, the size of a latent, at the image's own resolution.

    score = variation coefficient, over the 8 phases, of the mean absolute step between neighbours; mean of both
    directions. 0: no grid; sqrt(7) = 2.65: steps at one phase alone. An image without steps has 0.
    """

    name: ClassVar[str] = "grid_energy"
    description: ClassVar[str] = "Visible grid of the VAE's latents"
    scale: ClassVar[str] = "variation coefficient, 0 to 2.65"
    higher_is_better: ClassVar[bool] = False

    def of(self, picture: Picture) -> float:
        """Return the mean of both directions."""
        return float(np.mean([_phase_variation(luma(picture), axis) for axis in (0, 1)]))


def _phase_variation(values_HW: Array, axis: int) -> float:
    steps = np.abs(np.diff(values_HW, axis=axis)).mean(axis=1 - axis)
    whole = steps[: len(steps) // GRID * GRID]
    if not len(whole):
        return 0.0
    phases = whole.reshape(-1, GRID).mean(axis=0)
    mean = float(phases.mean())
    return float(phases.std()) / mean if mean > 0 else 0.0
