"""What a prompt requires of its image: a row of GenEval's metadata, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.scores.scorers.geneval.names import COLOURS, OBJECTS, RELATIONS


class UnusableMetadata(ValueError):
    """The metadata of an image says nothing that it can be judged by."""


@dataclass(frozen=True)
class Requirement:
    """One object that an image must or must not show.

    Args:
        name: The object, one of `names.OBJECTS`.
        count: Least number of them; in `exclude`, the number that is too many.
        colour: The colour that each of them must have; None for any.
        relation: Where each of them must lie, seen from the target; None for anywhere.
        target: Position in `include` of the objects that `relation` refers to.
    """

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Requirements:
    """Everything that a prompt requires.

    Args:
        tag: The kind of prompt, such as `counting`, which asks for surer objects.
        include: What the image must show.
        exclude: What it must not show.
    """

    tag: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()


def requirements_of(metadata: Any) -> Requirements:
    """Read a row of GenEval's metadata: `{"tag": …, "include": [{"class": …, "count": …}], "exclude": […]}`.

    The official script gives a row with an unknown object or colour 0; here it is an error.

    Raises:
        UnusableMetadata: It is no such row, with what is wrong.
    """
    if metadata is None:
        raise UnusableMetadata("the image has no metadata")
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("tag"), str):
        raise UnusableMetadata(f"the metadata is not a row of GenEval with a tag: {str(metadata)[:80]}")
    include, exclude = (_listed(metadata, name) for name in ("include", "exclude"))
    if not include and not exclude:
        raise UnusableMetadata("the metadata requires nothing: include and exclude are empty")
    return Requirements(
        metadata["tag"],
        tuple(_requirement(each, f"include {place}", place) for place, each in enumerate(include)),
        tuple(_requirement(each, f"exclude {place}", 0) for place, each in enumerate(exclude)),
    )


def _listed(metadata: Mapping[str, Any], name: str) -> Sequence[Any]:
    found = metadata.get(name) or ()
    if not isinstance(found, list | tuple):
        raise UnusableMetadata(f"metadata: {name} is not a list: {str(found)[:80]}")
    return found


def _requirement(entry: Any, where: str, num_before: int) -> Requirement:
    if not isinstance(entry, Mapping):
        raise UnusableMetadata(f"metadata: {where} is not an object: {str(entry)[:80]}")
    name, count, colour = (entry.get(key) for key in ("class", "count", "color"))
    if name not in OBJECTS:
        raise UnusableMetadata(f"metadata: {where} has class {name!r}, which the detector does not know")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UnusableMetadata(f"metadata: {where} has count {count!r}, not a number from 1 on")
    if colour is not None and colour not in COLOURS:
        raise UnusableMetadata(f"metadata: {where} has color {colour!r}, not one of {', '.join(COLOURS)}")
    relation, target = _position(entry.get("position"), where, num_before)
    return Requirement(name, count, colour, relation, target)


def _position(position: Any, where: str, num_before: int) -> tuple[str | None, int]:
    """Return the relation and its target, which must come before the requirement itself."""
    if position is None:
        return None, 0
    is_pair = isinstance(position, list | tuple) and len(position) == 2
    if not is_pair or position[0] not in RELATIONS or position[1] not in range(num_before):
        raise UnusableMetadata(
            f"metadata: {where} has position {position!r}, not a relation ({', '.join(RELATIONS)}) "
            "and the place of an earlier requirement"
        )
    return position[0], int(position[1])
