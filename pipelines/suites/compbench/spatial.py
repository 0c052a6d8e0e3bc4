"""Spatial relations of T2I-CompBench++: do two objects lie as the prompt says?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.suites.compbench.detections import PEOPLE, Box, Detected, Protocol, box_depth, overlap
from pipelines.suites.compbench.words import Objects

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEAR_PIXELS = 150
MAX_OVERLAP = 0.1
"""Of two objects beside each other."""
MIN_DEPTH_OVERLAP = 0.5
"""Of two objects in front of each other."""
LEAST_2D = 0.5
"""A lower score of a relation in the plane counts as 0."""
BESIDE = ("next to", "on side of", "near")


def score_2d(
    objects: Objects, relation: str | None, detected: Sequence[Detected], *, protocol: Protocol = "official"
) -> float:
    """Score a relation in the plane, 0 to 1: a quarter of each object's confidence, and half of the position's score.

    Args:
        objects: The two objects of the prompt, from `objects_of` or `objects_of_complex`.
        relation: From `relation_of`.
        detected: What was found with a confidence of at least 0.5, in the detector's order.
        protocol: The official evaluator knows `on the top of` alone. A prompt that says `on top of`, as 32 of the 58
            spatial complex prompts do, gets its confidences alone, which are below 0.5 unless both are exactly 1: 0.

    Returns:
        0 if neither object was found, or the score is below 0.5.
    """
    if objects is None:
        return 0.0
    first, second = (_first(name, detected) for name in _as_classes(objects))
    score = 0.25 * first.score if first else 0.0
    score += 0.25 * second.score if second else 0.0
    if first and second:
        if protocol == "ours" and relation == "on top of":
            relation = "on the top of"
        score += position_score(relation, first.box, second.box) / 2
    return 0.0 if score < LEAST_2D else score


def score_3d(
    objects: Objects,
    relation: str | None,
    detected: Sequence[Detected],
    depth_HW: "NDArray[np.float32]",
    *,
    protocol: Protocol = "official",
) -> float:
    """Score a relation in depth, 0 to 1; unlike in the plane a low score stays.

    Args:
        objects: The two objects of the prompt, from `objects_of`.
        relation: From `relation_of` with DEPTH_RELATIONS.
        detected: What was found, in the detector's order.
        depth_HW: Depth at the detector's size; larger is nearer.
        protocol: The official code takes rows for columns when it looks up the depth of a box.
    """
    if objects is None:
        return 0.0
    names = _as_classes(objects)
    first, second = _pair_containing(names, detected)
    if first and second:
        score = 0.25 * first.score + 0.25 * second.score
        depths = (box_depth(depth_HW, each.box, protocol) for each in (first, second))
        return score + depth_score(relation, first.box, second.box, *depths) / 2
    found = next((each for name in names if (each := _containing(name, detected))), None)
    return 0.25 * found.score if found else 0.0


def position_score(relation: str | None, first: Box, second: Box) -> float:
    """Score how the first object lies to the second one in the plane, 0 to 1; 0 for an unknown relation."""
    across, down = (theirs - own for own, theirs in zip(first.centre, second.centre, strict=True))
    if relation in BESIDE:
        is_near = abs(across) < NEAR_PIXELS or abs(down) < NEAR_PIXELS
        return 1.0 if is_near else NEAR_PIXELS / max(abs(across), abs(down))
    along, aside = {
        "on the right of": (-across, down),
        "on the left of": (across, down),
        "on the bottom of": (-down, across),
        "on the top of": (down, across),
    }.get(relation or "", (0.0, 0.0))
    if along <= abs(aside):
        return 0.0
    shared = overlap(first, second)
    return 1.0 if shared < MAX_OVERLAP else MAX_OVERLAP / shared


def depth_score(relation: str | None, first: Box, second: Box, first_depth: float, second_depth: float) -> float:
    """Score how the first object lies to the second one in depth, 0 to 1; an overlap of exactly a half scores 0."""
    nearer = first_depth - second_depth
    is_right = {"in front of": nearer > 0, "behind": nearer < 0, "hidden": nearer < 0}.get(relation or "", False)
    shared = overlap(first, second)
    if not is_right or shared == MIN_DEPTH_OVERLAP:
        return 0.0
    return min(1.0, shared / MIN_DEPTH_OVERLAP)


def _as_classes(objects: tuple[str, str]) -> list[str]:
    return ["person" if name in PEOPLE else name for name in objects]


def _first(name: str, detected: Sequence[Detected]) -> Detected | None:
    return next((each for each in detected if each.label == name), None)


def _containing(name: str, detected: Sequence[Detected]) -> Detected | None:
    return next((each for each in detected if name in each.label), None)


def _pair_containing(names: Sequence[str], detected: Sequence[Detected]) -> tuple[Detected | None, Detected | None]:
    """Return the objects whose labels contain two names: of each the last one before both are known."""
    found: list[Detected | None] = [None, None]
    for each in detected:
        for place, name in enumerate(names):
            if name in each.label:
                found[place] = each
        if all(found):
            break
    return found[0], found[1]
