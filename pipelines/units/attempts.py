"""How often each unit was begun, so that one that kills its actor does not do so for ever.

Ray starts an actor that died again and gives it its units back, without end: right when a node is gone, wrong when the
unit itself is the cause, such as an image that takes more memory than there is.
"""

from collections import Counter
from typing import Any

from pipelines.dataset.errors import EncodingError

MAX_ATTEMPTS = 8


class Attempts:
    """Counts; a Ray actor of the driver's job.

    Args:
        most: How often a unit may be begun.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._begun: Counter[str] = Counter()

    def begin(self, unit: str) -> int | None:
        """Count an attempt; None if it may be made, else how many failed."""
        self._begun[unit] += 1
        return None if self._begun[unit] <= self._most else self._begun[unit] - 1


def new_attempts(most: int = MAX_ATTEMPTS) -> Any:
    """A handle to a fresh count. Lost with its node, it begins anew."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote(most)


def begin(attempts: Any, unit: str, what: str) -> None:
    """Count an attempt at a unit.

    Args:
        attempts: From `new_attempts`.
        unit: Its id.
        what: Named in the error: what the unit is made of.

    Raises:
        EncodingError: Too many actors died of it.
    """
    import ray

    if (failed := ray.get(attempts.begin.remote(unit))) is not None:
        raise EncodingError(
            f"actors died {failed} times while they encoded {what} (unit {unit})",
            "did they run out of memory? lower `encode.batch_size`, or give the nodes more; what is encoded stays",
        )
