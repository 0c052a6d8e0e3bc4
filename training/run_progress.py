"""Where a training is, as its workers write it to `progress.json`: the one place that makes and reads that JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class WorkerIdentity:
    """What a worker is, as its engine reports it."""

    rank: int
    world_size: int
    pid: int
    node: str
    device: str
    backend: str
    engine: str
    zero_stage: int


@dataclass(frozen=True)
class RunProgress:
    """A training's place.

    Args:
        key: Of the training.
        step: Finished optimizer steps.
        max_steps: Of so many.
        starts: How often workers were started.
        started_at: When the present ones were, in seconds since 1970.
        start_up_s: How long each part of that start took.
        workers: Who works, by rank.
        notes: What the run wants to be read.
        last: The newest numbers, those of validations with a prefix.
    """

    key: str
    step: int
    max_steps: int
    starts: int
    started_at: float
    start_up_s: Mapping[str, float]
    workers: Sequence[WorkerIdentity]
    notes: Sequence[str]
    last: Mapping[str, float]

    def to_json(self) -> bytes:
        """Return the content of `progress.json`."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def parse(data: bytes) -> "RunProgress":
        """Read what `to_json` gave.

        Raises:
            ValueError: It is something else, such as the progress of another version.
        """
        fields = json.loads(data)
        try:
            workers = [WorkerIdentity(**worker) for worker in fields.pop("workers")]
            return RunProgress(workers=workers, **fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no progress of this version: {error}") from error
