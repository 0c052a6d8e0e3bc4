"""Counts the attempts at each unit, so that a unit that kills its actor does not do so forever.

Ray restarts a dead actor with the same units, without limit: right after the loss of a node, wrong when the unit itself
is the cause, such as an image that takes more memory than the machine has.
"""

from collections import Counter
from typing import Any

from pipelines.dataset.errors import EncodingError

MAX_ATTEMPTS = 8


class Attempts:
    """Counts of attempts by unit; a Ray actor of the driver's job.

    Args:
        most: How often a unit may be started.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._begun: Counter[str] = Counter()

    def begin(self, unit: str) -> int | None:
        """Count an attempt; return None if it may start, else the number of failed ones."""
        self._begun[unit] += 1
        return None if self._begun[unit] <= self._most else self._begun[unit] - 1


def new_attempts(most: int = MAX_ATTEMPTS) -> Any:
    """Return a handle to a new count. If its node is lost, it starts again from zero."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote(most)


def begin(attempts: Any, unit: str, doing: str, way_out: str) -> None:
    """Count an attempt at a unit.

    Args:
        attempts: From `new_attempts`.
        unit: The id of the unit.
        doing: The work on it, for the error: `encoding 12 prompts`.
        way_out: The hint of the error.

    Raises:
        EncodingError: The unit killed too many actors.
    """
    import ray

    if (failed := ray.get(attempts.begin.remote(unit))) is not None:
        raise EncodingError(f"actors died {failed} times while {doing} (unit {unit})", way_out)
