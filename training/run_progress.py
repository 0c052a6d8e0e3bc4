"""The progress of a training, which its workers write to `progress.json`; the only code that writes or reads it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class WorkerIdentity:
    """The identity of a worker, as its engine reports it."""

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
    """Progress of a training.

    Args:
        key: The training's key.
        step: Finished optimizer steps.
        max_steps: Optimizer steps in all.
        starts: How often workers were started.
        started_at: When the current workers were started, in seconds since 1970.
        start_up_s: Duration of each part of that start, in seconds.
        workers: The workers, by rank.
        notes: Notes for the user.
        last: The newest metrics, those of validations with a prefix.
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
        """Parse the output of `to_json`.

        Raises:
            ValueError: The data is something else, such as the progress file of another version.
        """
        fields = json.loads(data)
        try:
            workers = [WorkerIdentity(**worker) for worker in fields.pop("workers")]
            return RunProgress(workers=workers, **fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a progress file of this version: {error}") from error
