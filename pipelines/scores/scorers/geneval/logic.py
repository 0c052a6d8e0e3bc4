"""Whether detected objects satisfy what a prompt requires: GenEval's rules, without any model.

Source of the rules: djghosh13/geneval (af4902f), evaluation/evaluate_images.py. Only the surest objects that a
requirement counts are tested for colour and position.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.scores.scorers.geneval.boxes import NO_OBJECTS, Objects, relations
from pipelines.scores.scorers.geneval.names import COLOURS
from pipelines.scores.scorers.geneval.requirements import Requirement, Requirements

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Confidence that an object must exceed; the second for prompts about numbers."""
COUNTING = "counting"
Colours = Callable[[str, Objects], Sequence[str]]
"""Returns the colour of each of some objects of a class."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of one image.

    Args:
        include: By requirement of `include`: why it is not met, in GenEval's words; None if it is.
        exclude: The same of `exclude`.
    """

    include: tuple[str | None, ...]
    exclude: tuple[str | None, ...]

    @property
    def is_correct(self) -> bool:
        """Whether all requirements are met."""
        return not self.reasons

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the image is not correct."""
        return tuple(each for each in (*self.include, *self.exclude) if each is not None)


def threshold_of(tag: str) -> float:
    """Return the confidence that an object must exceed for prompts of a tag."""
    return COUNTING_THRESHOLD if tag == COUNTING else THRESHOLD


def judge(wanted: Requirements, objects: Mapping[str, Objects], colours: Colours) -> Verdict:
    """Judge an image by its objects.

    Args:
        wanted: What its prompt requires.
        objects: The objects by class, as `boxes.objects_by_class` returns them.
        colours: Tells colours; called only for requirements of a colour whose objects are there.
    """
    matched: list[Objects | None] = []
    include = []
    for each in wanted.include:
        found = objects.get(each.name, NO_OBJECTS).first(each.count)
        unmet = _miscounted(each, found) or _miscoloured(each, found, colours) or _misplaced(each, found, matched)
        matched.append(found if unmet is None else None)
        include.append(unmet)
    return Verdict(tuple(include), tuple(_too_many(each, objects) for each in wanted.exclude))


def _miscounted(wanted: Requirement, found: Objects) -> str | None:
    if len(found) >= wanted.count:
        return None
    return f"expected {wanted.name}>={wanted.count}, found {len(found)}"


def _miscoloured(wanted: Requirement, found: Objects, colours: Colours) -> str | None:
    if wanted.colour is None:
        return None
    seen = list(colours(wanted.name, found))
    if seen.count(wanted.colour) >= wanted.count:
        return None
    counts = ", ".join(f"{seen.count(colour)} {colour}" for colour in COLOURS if colour in seen)
    return (
        f"expected {wanted.colour} {wanted.name}>={wanted.count}, "
        f"found {seen.count(wanted.colour)} {wanted.colour}; and {counts}"
    )


def _misplaced(wanted: Requirement, found: Objects, matched: Sequence[Objects | None]) -> str | None:
    """Return the first pair of an object and a target that does not lie as required."""
    if wanted.relation is None:
        return None
    target = matched[wanted.target]
    if target is None:
        return f"no target for {wanted.name} to be {wanted.relation}"
    for box_4 in found.boxes_N4:
        for target_4 in target.boxes_N4:
            seen = relations(box_4, target_4)
            if wanted.relation not in seen:
                return f"expected {wanted.name} {wanted.relation} target, found {' and '.join(sorted(seen))} target"
    return None


def _too_many(wanted: Requirement, objects: Mapping[str, Objects]) -> str | None:
    found = len(objects.get(wanted.name, NO_OBJECTS))
    return f"expected {wanted.name}<{wanted.count}, found {found}" if found >= wanted.count else None
