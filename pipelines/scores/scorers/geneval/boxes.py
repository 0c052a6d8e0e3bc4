"""Detected objects by class, the box of a mask, and how two boxes lie to each other.

Everything is float32, as a detector says it, so that comparisons at a threshold fall as in the official script.
Letters: N objects, H rows, W columns; 4: left, top, right, bottom in pixels, right and bottom one past the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.scores.scorers.geneval.names import ABOVE, BELOW, LEFT, OBJECTS, RIGHT

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
MAX_OBJECTS = 16
"""Most objects of one class, the surest ones."""
POSITION_MARGIN = np.float32(0.1)
"""Share of the sum of two objects' sizes by which their centres must differ in a direction."""
MIN_OFFSET = 1e-3
"""Offset, in pixels beyond the margin, below which two objects lie on top of each other."""
MIN_SHARE = 0.5
"""Share of the distance between two centres that must lie in a direction, once the margin is taken off."""


@dataclass(frozen=True)
class Objects:
    """Objects of one class in one image, the surest first.

    Args:
        boxes_N4: Their boxes.
        confidences_N: How sure the detector is, 0..1.
        masks: Their masks, H, W each; empty if there are none.
    """

    boxes_N4: Floats
    confidences_N: Floats
    masks: tuple[Mask, ...] = ()

    def __len__(self) -> int:
        return len(self.boxes_N4)

    def first(self, count: int) -> "Objects":
        """Return the surest objects."""
        return Objects(self.boxes_N4[:count], self.confidences_N[:count], self.masks[:count])


NO_OBJECTS = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


def objects_by_class(
    labels_N: NDArray[np.int64], boxes_N4: Floats, confidences_N: Floats, masks: Sequence[Mask], threshold: float
) -> dict[str, Objects]:
    """Return the objects that a judgement counts, by the name of their class.

    They are surer than the threshold, and the surest `MAX_OBJECTS` of their class. Overlapping objects all count.

    Args:
        labels_N: The class of each object, a position in `names.OBJECTS`.
        boxes_N4: Its box.
        confidences_N: How sure the detector is, 0..1.
        masks: Its mask, or nothing at all.
        threshold: The confidence that an object must exceed.
    """
    found = {}
    for label in np.unique(labels_N):
        own = np.flatnonzero(labels_N == label)
        order = own[np.argsort(confidences_N[own], kind="stable")[::-1]]
        kept = order[confidences_N[order] > np.float32(threshold)][:MAX_OBJECTS]
        if len(kept):
            own_masks = tuple(masks[place] for place in kept) if masks else ()
            found[OBJECTS[label]] = Objects(boxes_N4[kept], confidences_N[kept], own_masks)
    return found


def box_of(mask_HW: Mask) -> Floats:
    """Return the box around a mask; all 0 if it is empty."""
    across, down = np.flatnonzero(mask_HW.any(axis=0)), np.flatnonzero(mask_HW.any(axis=1))
    if not len(across):
        return np.zeros(4, np.float32)
    return np.array([across[0], down[0], across[-1] + 1, down[-1] + 1], np.float32)


def relations(box_4: Floats, target_4: Floats) -> set[str]:
    """Return where a box lies, seen from a target: none, one or two of `names.RELATIONS`.

    In each direction the offset of the centres is lessened by a tenth of both sizes; what is left must be more than
    half of the distance between the centres.
    """
    offset_2 = _centre(box_4) - _centre(target_4)
    margin_2 = POSITION_MARGIN * (_size(box_4) + _size(target_4))
    beyond_2 = np.sign(offset_2) * np.maximum(np.abs(offset_2) - margin_2, 0)
    if np.all(np.abs(beyond_2) < MIN_OFFSET):
        return set()
    across, down = beyond_2 / np.linalg.norm(offset_2)
    holds = {
        LEFT: across < -MIN_SHARE, RIGHT: across > MIN_SHARE, ABOVE: down < -MIN_SHARE, BELOW: down > MIN_SHARE,
    }  # fmt: skip
    return {name for name, is_so in holds.items() if is_so}


def _centre(box_4: Floats) -> Any:
    return (box_4[:2] + box_4[2:]) / np.float32(2)


def _size(box_4: Floats) -> Any:
    return np.abs(box_4[2:] - box_4[:2])
