"""What a scorer returns for one image: a number, a number with its components, or the reason why there is none."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """The score of one image."""

    value: float
    components: Mapping[str, float] = field(default_factory=dict)
    """Numbers behind the value, such as the share of the prompt that the model did not see."""


@dataclass(frozen=True)
class Failure:
    """The reason why an image has no score; never a number.

    Args:
        reason: The reason.
        transient: Whether the reason lies outside the image and its scorer, such as a server that did not answer. Such
            a failure is counted and told, but not committed: the next run tries the image again.
    """

    reason: str
    transient: bool = False


Result = float | Score | Failure
"""What a scorer returns for one image."""
UNANSWERED = "unanswered"
"""The status of a transient failure on its way to the driver; no table has it."""
NOT_FINITE = "the score is not a finite number"


def checked(result: Result) -> Result:
    """Return a result, or a failure in place of a value that is not a finite number."""
    if isinstance(result, Failure):
        return result
    value = result.value if isinstance(result, Score) else float(result)
    if not math.isfinite(value):
        return Failure(NOT_FINITE)
    return result if isinstance(result, Score) else value
