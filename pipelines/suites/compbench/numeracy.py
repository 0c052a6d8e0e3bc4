"""Numeracy of T2I-CompBench++: are as many objects there as the prompt says?"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.suites.compbench.detections import PEOPLE, Box, Detected

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
ONE = ("a", "an", "one")
SAME_RATIO = 0.9
"""Two boxes of one class are one object if they share more than this, of their union or of either."""
OTHER_NAMES = {"ship": "boat", "goldfish": "fish", "painting": "picture", "telivision": "tv"}
"""Words that the detector has other classes for, spelt as in the official code, which misses `television` by a letter.
The detector has a class of that name as well."""
_SAME_IN_PLURAL = "fish deer goldfish shrimp sheep"
_WITH_ES = "tomato peach couch"
_IRREGULAR = "knife/knives strawberry/strawberries man/men mouse/mice woman/women butterfly/butterflies person/people"
_REGULAR = """
bottle cup cake bird microwave desk book helmet pillow bowl flag stool toy pen microphone bread camera candle paddle
drum guitar tent kite lemon suitcase pear printer duck hamburger egg ship chicken helicopter swan camel banana balloon
giraffe frog horse rabbit bicycle bee girl painting lamp cow train vase pig airplane phone boy plate computer turtle
bag car backpack dog television cat table sofa key refrigerator clock chair truck boat bear sink apple
"""
PLURALS = {
    **{name: name for name in _SAME_IN_PLURAL.split()},
    **{name: f"{name}es" for name in _WITH_ES.split()},
    **dict(pair.split("/") for pair in _IRREGULAR.split()),
    **{name: f"{name}s" for name in _REGULAR.split()},
}
"""The benchmark's objects, by their singular."""
SINGULARS = {plural: name for name, plural in PLURALS.items()}


@dataclass(frozen=True)
class Counted:
    """An object of a prompt and how many of it there shall be."""

    name: str
    count: int


def counted_in(words: Sequence[str]) -> list[Counted]:
    """Return the objects of a prompt that follow a number, in their order.

    Args:
        words: The words of the prompt, punctuation apart.
    """
    found = []
    for number, name in itertools.pairwise(words):
        if number in ONE and name in PLURALS:
            found.append(Counted(name, 1))
        elif number in NUMBERS and name in SINGULARS:
            found.append(Counted(SINGULARS[name], NUMBERS[number]))
    return found


def score_numeracy(counted: Sequence[Counted], detected: Sequence[Detected]) -> float:
    """Score the numbers of objects, 0 to 1: each object counts half for being there, half for its exact number.

    Args:
        counted: From `counted_in`.
        detected: What was found with a confidence of at least 0.5, in the detector's order. An object without a
            detection of its name takes over those whose labels contain it; later objects see them under that name.

    Raises:
        ValueError: The prompt counts nothing.
    """
    if not counted:
        raise ValueError("score_numeracy: the prompt counts no object of the benchmark.")
    labels = [each.label for each in _distinct(detected)]
    score, weight = 0.0, 1.0 / len(counted)
    for wanted in counted:
        name = "person" if wanted.name in PEOPLE else OTHER_NAMES.get(wanted.name, wanted.name)
        if name not in labels:
            labels = [name if name in label else label for label in labels]
        if name in labels:
            score += 0.5 * weight
            if labels.count(name) == wanted.count:
                score += 0.5 * weight
    return score


def _distinct(detected: Sequence[Detected]) -> list[Detected]:
    """Leave out objects that are another one of their class again."""
    kept: list[Detected] = []
    for each in detected:
        if not any(each.label == other.label and is_same(each.box, other.box) for other in kept):
            kept.append(each)
    return kept


def is_same(first: Box, second: Box) -> bool:
    """Return whether two boxes are of one object; both edges belong to a box."""
    across = max(0, min(first.x_max, second.x_max) - max(first.x_min, second.x_min) + 1)
    down = max(0, min(first.y_max, second.y_max) - max(first.y_min, second.y_min) + 1)
    shared, areas = across * down, [_pixels(first), _pixels(second)]
    return any(shared / whole > SAME_RATIO for whole in (sum(areas) - shared, *areas))


def _pixels(box: Box) -> float:
    return (box.x_max - box.x_min + 1) * (box.y_max - box.y_min + 1)
