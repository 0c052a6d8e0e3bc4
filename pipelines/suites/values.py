"""Values of prompts: checked, averaged over a prompt's images or a tag's prompts, and paired between two models."""

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.suites.resampling import Vector

Numbers = Sequence[float] | NDArray[Any]


@dataclass(frozen=True)
class Paired:
    """Values of two models on the prompts that both have, ordered by prompt_id."""

    a: Vector
    b: Vector
    prompt_ids: tuple[str, ...]
    num_left_out: int
    """Number of prompts that do not have a value of both."""


@dataclass(frozen=True)
class TagMeans:
    """Mean over the prompts of each tag, and the mean of these means."""

    macro: float
    tags: dict[str, float]


def per_prompt(values: Numbers, prompt_ids: Sequence[str]) -> dict[str, float]:
    """Return prompt_id -> mean over the prompt's images, ordered by prompt_id.

    Args:
        values: One value per image; failed scores left out.
        prompt_ids: Prompt of each image.

    Raises:
        ValueError: A value is not finite, lengths differ, or nothing is given.
    """
    return _means("per_prompt", values, prompt_ids)


def by_tag(values: Numbers, tags: Sequence[str]) -> TagMeans:
    """Return the mean over each tag's prompts, and the mean of these means, in which all tags count the same.

    Args:
        values: One value per prompt.
        tags: Tag of each prompt.

    Raises:
        ValueError: A value is not finite, lengths differ, or nothing is given.
    """
    means = _means("by_tag", values, tags)
    return TagMeans(macro=math.fsum(means.values()) / len(means), tags=means)


def paired(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> Paired:
    """Pair two models by prompt, leaving out prompts that do not have a value of both.

    Args:
        a: prompt_id -> value; None, or no entry, if scoring failed.
        b: The other model's.

    Raises:
        ValueError: No prompt is left, or a value is not finite.
    """
    prompt_ids = a.keys() | b.keys()
    both = {
        each: (x, y) for each in sorted(prompt_ids) if (x := a.get(each)) is not None and (y := b.get(each)) is not None
    }
    if not both:
        raise ValueError(
            f"paired: none of {len(prompt_ids)} prompts has a value of both models ({len(a)} and {len(b)})."
        )
    values = [numbers("paired", name, [pair[place] for pair in both.values()]) for place, name in enumerate("ab")]
    return Paired(values[0], values[1], tuple(both), len(prompt_ids) - len(both))


def numbers(function: str, name: str, values: Numbers) -> Vector:
    """Return the values as float64, 1-D.

    Raises:
        ValueError: There is none, one is not finite, or they are not 1-D.
    """
    checked = np.asarray(values, dtype=np.float64)
    if checked.ndim != 1 or checked.size == 0:
        raise ValueError(
            f"{function}: {name} has the shape {list(checked.shape)}; give one value or more, in one dimension."
        )
    wrong = np.flatnonzero(~np.isfinite(checked))
    if wrong.size:
        raise ValueError(
            f"{function}: {wrong.size} of {checked.size} values of {name} are not finite, such as {checked[wrong[0]]}"
            f" at place {wrong[0]}. Leave failed scores out, for both models (`paired`)."
        )
    return checked


def differences(function: str, a: Numbers, b: Numbers) -> Vector:
    """Return a - b, both checked."""
    first, second = numbers(function, "a", a), numbers(function, "b", b)
    same_length(function, a=first, b=second)
    return first - second


def same_length(function: str, **each: Sized) -> None:
    """Raise ValueError unless all have one length."""
    if len({len(values) for values in each.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(values)}" for name, values in each.items())
        raise ValueError(f"{function}: lengths differ: {lengths}.")


def _means(function: str, values: Numbers, groups: Sequence[str]) -> dict[str, float]:
    """Return group -> mean, ordered by group; exact sums, so that the order of values does not matter."""
    same_length(function, values=values, groups=groups)
    members: dict[str, list[float]] = {}
    for group, value in zip(groups, numbers(function, "values", values).tolist(), strict=True):
        members.setdefault(group, []).append(value)
    return {group: math.fsum(members[group]) / len(members[group]) for group in sorted(members)}
