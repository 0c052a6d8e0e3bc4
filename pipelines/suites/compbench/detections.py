"""Detected objects of one image, and the two ways to judge them: as the official code does, or without its faults."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Protocol = Literal["official", "ours"]
"""`official`: the numbers of Karine-Huang/T2I-CompBench at 1b70949, faults included. `ours`: without these faults."""
PEOPLE = ("girl", "boy", "man", "woman")
"""Words that the detector has no classes for; it finds a person."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the detector's image, whose longer side is 480."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.x_max - self.x_min) * (self.y_max - self.y_min)

    @property
    def centre(self) -> tuple[float, float]:
        """Column and row of the centre."""
        return (self.x_min + self.x_max) / 2, (self.y_min + self.y_max) / 2


@dataclass(frozen=True)
class Detected:
    """An object that was found in an image.

    Args:
        label: Name of its class.
        score: The detector's confidence.
        box: Where it is.
    """

    label: str
    score: float
    box: Box


def as_detected(labels: Sequence[str], scores: Sequence[float], boxes: Sequence[Sequence[float]]) -> list[Detected]:
    """Return objects from a detector's lists, in its order; a box is x_min, y_min, x_max, y_max."""
    if not len(labels) == len(scores) == len(boxes):
        raise ValueError(f"{len(labels)} labels, {len(scores)} scores and {len(boxes)} boxes; give one of each.")
    return [
        Detected(label, float(score), Box(*map(float, box)))
        for label, score, box in zip(labels, scores, boxes, strict=True)
    ]


def overlap(first: Box, second: Box) -> float:
    """Return the intersection over the union of two boxes; 0 for two boxes without an area."""
    across = max(0, min(first.x_max, second.x_max) - max(first.x_min, second.x_min))
    down = max(0, min(first.y_max, second.y_max) - max(first.y_min, second.y_min))
    shared = across * down
    union = first.area + second.area - shared
    return shared / union if union else 0.0


def box_depth(depth_HW: "NDArray[np.float32]", box: Box, protocol: Protocol) -> float:
    """Return the mean depth inside a box; larger is nearer.

    The official code takes columns for rows: it looks at the box mirrored at the diagonal. Beyond the map's edge
    nothing is left of it, and the mean is NaN.
    """
    columns, rows = slice(int(box.x_min), int(box.x_max)), slice(int(box.y_min), int(box.y_max))
    inside = depth_HW[columns, rows] if protocol == "official" else depth_HW[rows, columns]
    return float(inside.mean()) if inside.size else float("nan")
