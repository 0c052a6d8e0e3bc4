"""The curves of a training that has not finished: what its newest checkpoint holds, and what was seen since.

Workers keep every number in their checkpoints and write the newest ones to `progress.json`, every few seconds. Whoever
watches that file has the steps since the checkpoint: all of them where steps are slower than looks, else some.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipelines.dataset.errors import MapoError
from pipelines.dataset.storage import Storage
from training.state.checkpoint_format import STATE, committed

PROGRESS = "progress.json"
SEEN = "report/seen.json"
MAX_SEEN = 4000  # steps since a checkpoint; with more, every second one is forgotten
HELD_OUT = "validation_"

Rows = list[dict[str, float]]


def read_json(storage: Storage, name: str) -> dict[str, Any] | None:
    """An object as plain data; None if it is not there, or not whole."""
    try:
        found = json.loads(storage.read(name)) if storage.exists(name) else None
    except (MapoError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class SeenSteps:
    """What was seen of the training of a run since its newest checkpoint; kept beside the report for other readers.

    Args:
        storage: Of the run.
        folder: The run's folder.
        validate_every: `train.validate_every`: the progress tells no step of a validation.
    """

    def __init__(self, storage: Storage, folder: str, *, validate_every: int) -> None:
        self._storage, self._folder, self._validate_every = storage, folder, validate_every
        before = read_json(storage, f"{folder}/{SEEN}") or {}
        self.key: str = before.get("key", "")
        self.steps: Rows = before.get("steps", [])
        self.validations: Rows = before.get("validations", [])

    def look(self) -> None:
        """Take in the newest numbers."""
        progress = read_json(self._storage, f"{self._folder}/{PROGRESS}")
        if progress is not None:
            self.take(progress)

    def take(self, progress: Mapping[str, Any]) -> None:
        """The same from what the file holds."""
        if progress["key"] != self.key:
            self.key, self.steps, self.validations = progress["key"], [], []
        last = {name: value for name, value in progress["last"].items() if not name.startswith(HELD_OUT)}
        held_out = {name.removeprefix(HELD_OUT): v for name, v in progress["last"].items() if name.startswith(HELD_OUT)}
        if "step" not in last:
            return
        step = last["step"]
        if not self.steps or self.steps[-1]["step"] != step:
            self.steps = [row for row in self.steps if row["step"] < step]  # workers may have started again before it
            self.validations = [row for row in self.validations if row["step"] <= step]
            self.steps.append(last)
        newest = (
            {name: value for name, value in self.validations[-1].items() if name != "step"} if self.validations else {}
        )
        if held_out and held_out != newest:
            is_last = step == progress["max_steps"]
            at = step if is_last else step // self._validate_every * self._validate_every
            self.validations = [row for row in self.validations if row["step"] < at]
            self.validations.append({"step": at, **held_out})
        if len(self.steps) > MAX_SEEN:
            self.steps = [*self.steps[:-1:2], self.steps[-1]]

    def save(self) -> None:
        """Keep what the newest checkpoint does not have yet."""
        if not self.key:
            return
        at, _, measured = checkpoint_history(self._storage, self._folder, self.key)
        last = measured[-1]["step"] if measured else -1
        self.steps = [row for row in self.steps if row["step"] > at]
        self.validations = [row for row in self.validations if row["step"] > last]
        kept = {"key": self.key, "steps": self.steps, "validations": self.validations}
        self._storage.write(f"{self._folder}/{SEEN}", json.dumps(kept).encode())


def checkpoint_history(storage: Storage, folder: str, key: str) -> tuple[int, Rows, Rows]:
    """Step and history of the newest whole checkpoint of a training; 0 and nothing before the first.

    Args:
        storage: Of the run.
        folder: The run's folder.
        key: Of the training.
    """
    for manifest in reversed(committed(storage, f"{folder}/checkpoints/{key}") if key else []):
        try:
            data = storage.read(f"{manifest.folder}/{STATE}")
        except MapoError:  # it may be deleted for a newer one at this moment
            continue
        if hashlib.sha256(data).hexdigest() == manifest.sha256.get(STATE):
            history = json.loads(data)["history"]
            return manifest.step, history["steps"], history["validations"]
    return 0, [], []


def live_history(
    storage: Storage, folder: str, progress: Mapping[str, Any], *, validate_every: int
) -> tuple[Rows, Rows]:
    """Steps and validations of a training that has not finished, as far as the storage has them.

    Args:
        storage: Of the run.
        folder: The run's folder.
        progress: What `progress.json` holds.
        validate_every: `train.validate_every`.
    """
    at, steps, validations = checkpoint_history(storage, folder, progress["key"])
    seen = SeenSteps(storage, folder, validate_every=validate_every)
    seen.take(progress)
    last = validations[-1]["step"] if validations else -1
    return (
        [*steps, *(row for row in seen.steps if row["step"] > at)],
        [*validations, *(row for row in seen.validations if row["step"] > last)],
    )
