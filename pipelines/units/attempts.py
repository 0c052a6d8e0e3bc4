"""Counts the attempts at each unit, so that a unit that kills its actor does not do so forever.

Ray restarts a dead actor with the same units, without limit: right after the loss of a node, wrong when the unit itself
is the cause, such as an image that takes more memory than the machine has.
"""

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipelines.dataset.errors import EncodingError

MAX_ATTEMPTS = 8
_executions = itertools.count()
_counters: dict[str, Any] = {}
"""The driver's counting actor, by node and Ray job: all executions share it, for another process costs a second."""


class Counts:
    """Counts of attempts by execution and unit; a Ray actor of the driver's job."""

    def __init__(self) -> None:
        self._begun: Counter[tuple[int, str]] = Counter()

    def begin(self, execution: int, unit: str) -> int:
        """Count an attempt; return the number of those before."""
        self._begun[execution, unit] += 1
        return self._begun[execution, unit] - 1


@dataclass(frozen=True)
class Attempts:
    """The attempts of one execution.

    Args:
        counter: Handle of the counting actor. If its node is lost, it starts again from zero.
        execution: The number of the execution.
        most: How often a unit may be started.
    """

    counter: Any
    execution: int
    most: int = MAX_ATTEMPTS


def new_attempts(most: int = MAX_ATTEMPTS) -> Attempts:
    """Return new counts for one execution."""
    import ray

    context = ray.get_runtime_context()
    job = f"{context.get_node_id()} {context.get_job_id()}"  # the first job of every cluster has the same id
    if job not in _counters:
        _counters.clear()
        _counters[job] = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Counts).remote()
    return Attempts(_counters[job], next(_executions), most)


def begin(attempts: Attempts, unit: str, doing: str, way_out: str) -> None:
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

    failed = ray.get(attempts.counter.begin.remote(attempts.execution, unit))
    if failed >= attempts.most:
        raise EncodingError(f"actors died {failed} times while {doing} (unit {unit})", way_out)
