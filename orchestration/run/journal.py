"""The durable record of a run on the storage: what each stage did.

`stages/<stage>.json` is the last success of a stage, with the key of its inputs; `journal/` has one small object per
event, in order. A run without work writes nothing.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from pipelines.dataset.errors import StorageError
from pipelines.dataset.layout import RUNS
from pipelines.dataset.secrets import redact
from pipelines.dataset.storage import Storage


@dataclass(frozen=True)
class StageRecord:
    """The last success of a stage.

    Args:
        stage: The stage's name.
        key: Digest of all its inputs.
        summary: One line for people.
        seconds: Duration in seconds.
        finished_at: ISO time, UTC.
        details: Details for later stages and the report.
    """

    stage: str
    key: str
    summary: str
    seconds: float
    finished_at: str
    details: dict[str, Any] = field(default_factory=dict)


class Journal:
    """The records of one run."""

    def __init__(self, storage: Storage, run: str) -> None:
        self._storage = storage
        self.folder = f"{RUNS}/{run}"

    def _name(self, stage: str) -> str:
        return f"{self.folder}/stages/{stage}.json"

    def record(self, stage: str) -> StageRecord | None:
        """Return the last success of a stage, if there was one. Fields of a later version are left out.

        Raises:
            StorageError: The record is damaged.
        """
        name = self._name(stage)
        data = self._storage.read_if_there(name)
        if data is None:
            return None
        try:
            found = json.loads(data)
            known = {each.name: found[each.name] for each in fields(StageRecord) if each.name in found}
            record = StageRecord(**known)
            is_sound = isinstance(record.key, str) and isinstance(record.details, dict)
        except (ValueError, TypeError) as error:
            raise self._damaged(name, repr(error)) from error
        if not is_sound:
            raise self._damaged(name, "key or details are of another type")
        return record

    def _damaged(self, name: str, why: str) -> StorageError:
        return StorageError(
            f"cannot read {self._storage.uri(name)}: {why}", "delete this record; the stage is then looked at anew"
        )

    def finish(self, stage: str, *, key: str, summary: str, seconds: float, details: Mapping[str, Any]) -> StageRecord:
        """Record a success: from now on the stage is up to date for this key."""
        record = StageRecord(stage, key, summary, round(seconds, 3), now(), dict(details))
        self.event("finished", stage=stage, summary=summary, seconds=record.seconds)
        self._storage.write(self._name(stage), redact(json.dumps(asdict(record), indent=1)).encode())
        return record

    @property
    def num_events(self) -> int:
        """Return the number of events."""
        return len(self._storage.names(f"{self.folder}/journal"))

    def events(self) -> list[dict[str, Any]]:
        """Read every event, oldest first."""
        names = self._storage.names(f"{self.folder}/journal")
        return [json.loads(self._storage.read(name)) for name in names]

    def event(self, event: str, **facts: Any) -> None:
        """Append one event."""
        name = f"{self.folder}/journal/{self.num_events + 1:06d}-{uuid.uuid4().hex[:6]}-{event}.json"
        self._storage.write(name, redact(json.dumps({"time": now(), "event": event, **facts})).encode())


def now() -> str:
    """Return the time as ISO text, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
