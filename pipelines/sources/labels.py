"""Converts a source's preference into the probability that image 0 is preferred; never guesses.

Every function takes raw values (numbers of any type, text, bytes) and returns 0..1, or the `Reason` why it cannot.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

from pipelines.dataset.status import Reason

LABEL_TOLERANCE = 1e-6
VERDICTS = {"true": True, "yes": True, "good": True, "false": False, "no": False, "bad": False}


def number(value: object) -> float | None:
    """Return a value as a number, whatever its type; None if it is not a number, or not finite."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def from_labels(label_0: object, label_1: object) -> float | Reason:
    """Return the label from the labels of both images, which must add up to 1."""
    if label_0 is None or label_1 is None:
        return Reason.MISSING_LABEL
    first, second = number(label_0), number(label_1)
    if first is None or second is None or not (0 <= first <= 1 and 0 <= second <= 1):
        return Reason.UNREADABLE_LABEL
    return first if abs(first + second - 1) <= LABEL_TOLERANCE else Reason.INCONSISTENT_LABELS


def from_label(label_0: object) -> float | Reason:
    """Return the label from image 0's label alone."""
    if label_0 is None:
        return Reason.MISSING_LABEL
    found = number(label_0)
    return found if found is not None and 0 <= found <= 1 else Reason.UNREADABLE_LABEL


def from_votes(votes_0: object, votes_1: object) -> float | Reason:
    """Return the share of votes (or of vote weights) for image 0; without votes there is no label."""
    if votes_0 is None or votes_1 is None:
        return Reason.MISSING_LABEL
    first, second = number(votes_0), number(votes_1)
    if first is None or second is None or first < 0 or second < 0:
        return Reason.UNREADABLE_LABEL
    return first / (first + second) if first + second > 0 else Reason.MISSING_LABEL


def from_ranks(ranks: object, *, count: int, best: str = "smallest") -> Iterator[tuple[int, int, float | Reason]]:
    """Yield every pair of ranked images, in order, with the label of the first of the two; equal ranks are a tie.

    Args:
        ranks: One rank per image.
        count: The number of images.
        best: `smallest` for ranks, `largest` for scores.
    """
    found = list(ranks) if isinstance(ranks, Sequence) and not isinstance(ranks, str | bytes) else []
    for i, j in combinations(range(count), 2):
        if len(found) != count:
            yield i, j, Reason.MISSING_LABEL if ranks is None else Reason.UNREADABLE_LABEL
        else:
            yield i, j, _compare(found[i], found[j], sign=1 if best == "smallest" else -1)


def _compare(rank_0: object, rank_1: object, *, sign: int) -> float | Reason:
    if rank_0 is None or rank_1 is None:
        return Reason.MISSING_LABEL
    first, second = number(rank_0), number(rank_1)
    if first is None or second is None:
        return Reason.UNREADABLE_LABEL
    return 0.5 if first == second else float(sign * first < sign * second)


def verdict(value: object) -> bool | Reason:
    """Return a verdict on one image, or why it cannot be read: true, yes, good or 1, and false, no, bad or 0."""
    text = text_of(value)
    if text is None or not text.strip():
        return Reason.MISSING_LABEL
    if (found := number(value)) in (0.0, 1.0):
        return found == 1.0
    return VERDICTS.get(text.strip().lower(), Reason.UNREADABLE_LABEL)


def read_weight(value: object) -> float | Reason | None:
    """Return the weight of a row, which is above 0, or why it cannot be read; None without one."""
    text = text_of(value)
    if text is None or not text.strip():
        return None
    found = number(value)
    return found if found is not None and found > 0 else Reason.UNREADABLE_WEIGHT


def is_false(value: object) -> bool:
    """Return whether a flag is false; a missing one is not."""
    text = text_of(value)
    return text is not None and text.strip().lower() in ("false", "0", "0.0", "no", "")


def text_of(value: object) -> str | None:
    """Return a value as text; bytes that are not UTF-8 are replaced."""
    if value is None:
        return None
    return (value if isinstance(value, bytes) else str(value).encode(errors="replace")).decode(errors="replace")
