"""Curves of a live training: those of its newest checkpoint, and the steps seen since.

Workers keep all metrics in their checkpoints and write the newest ones to `progress.json` every few seconds. A watcher
of that file sees the steps since the checkpoint: all of them if a step takes longer than the interval between two
reads, otherwise some.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.report.records import Row, WorkerRow
from pipelines.dataset.errors import MapoError
from pipelines.dataset.storage import Storage
from training.state.checkpoint_format import STATE, list_checkpoints

PROGRESS = "progress.json"
SEEN = "report/seen.json"
MAX_SEEN = 4000  # steps since a checkpoint; beyond that every second one is dropped
HELD_OUT = "validation_"


@dataclass(frozen=True)
class LiveProgress:
    """Progress of a training, from `progress.json`.

    Args:
        key: The training's key.
        step: The newest step.
        max_steps: Steps to do.
        starts: How often the workers were started.
        workers: The workers.
        notes: Their notes.
        last: Metrics of the newest step; those of the newest validation are prefixed with HELD_OUT.
    """

    key: str
    step: int
    max_steps: int
    starts: int
    workers: Sequence[WorkerRow]
    notes: Sequence[str]
    last: Row

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "LiveProgress":
        """Return the progress in the file."""
        return LiveProgress(
            key=data["key"],
            step=int(data["step"]),
            max_steps=data["max_steps"],
            starts=data["starts"],
            workers=[WorkerRow.from_json(each) for each in data["workers"]],
            notes=data["notes"],
            last=data["last"],
        )

    @property
    def newest(self) -> Row:
        """Metrics of the newest step."""
        return {name: value for name, value in self.last.items() if not name.startswith(HELD_OUT)}

    @property
    def held_out(self) -> Row:
        """Metrics of the newest validation, without its step, which the file does not have."""
        return {name.removeprefix(HELD_OUT): v for name, v in self.last.items() if name.startswith(HELD_OUT)}


@dataclass(frozen=True)
class Curves:
    """Metrics of steps and of validations, up to a step."""

    step: int = 0
    steps: Sequence[Row] = ()
    validations: Sequence[Row] = ()

    @property
    def last_validation(self) -> float:
        """Step of the last validation; -1 without one."""
        return self.validations[-1]["step"] if self.validations else -1


def read_json(storage: Storage, name: str) -> Mapping[str, Any] | None:
    """Read a JSON object; return None if it is missing or damaged."""
    try:
        found = json.loads(storage.read_if_there(name) or b"null")
    except (MapoError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_progress(storage: Storage, folder: str) -> LiveProgress | None:
    """Read `progress.json` of a run; return None if it is missing or damaged."""
    found = read_json(storage, f"{folder}/{PROGRESS}")
    return None if found is None else LiveProgress.from_json(found)


class SeenSteps:
    """Steps seen since the newest checkpoint of a run's training; stored with the report for other readers.

    Args:
        storage: The run's storage.
        folder: The run's folder.
        validate_every: `train.validate_every`: `progress.json` does not have the step of a validation.
    """

    def __init__(self, storage: Storage, folder: str, *, validate_every: int) -> None:
        self._storage, self._folder, self._validate_every = storage, folder, validate_every
        before = read_json(storage, f"{folder}/{SEEN}") or {}
        self.key: str = before.get("key", "")
        self.steps: list[Row] = before.get("steps", [])
        self.validations: list[Row] = before.get("validations", [])

    def look(self) -> None:
        """Read `progress.json` and add its numbers."""
        progress = read_progress(self._storage, self._folder)
        if progress is not None:
            self.take(progress)

    def take(self, progress: LiveProgress) -> None:
        """Add the numbers of a progress."""
        if progress.key != self.key:
            self.key, self.steps, self.validations = progress.key, [], []
        if "step" in progress.newest:
            self._take_step(progress.newest)
            self._take_validation(progress)

    def _take_step(self, newest: Row) -> None:
        step = newest["step"]
        if not self.steps or self.steps[-1]["step"] != step:  # restarted workers may have gone back behind it
            self.steps = [*_before(self.steps, step), newest]
            self.validations = _before(self.validations, step + 1)
        if len(self.steps) > MAX_SEEN:
            self.steps = [*self.steps[:-1:2], self.steps[-1]]

    def _take_validation(self, progress: LiveProgress) -> None:
        known = dict(self.validations[-1]) if self.validations else {}
        known.pop("step", None)
        if progress.held_out and progress.held_out != known:
            step = progress.newest["step"]
            is_last = step == progress.max_steps
            at = step if is_last else step // self._validate_every * self._validate_every
            self.validations = [*_before(self.validations, at), {"step": at, **progress.held_out}]

    def save(self) -> None:
        """Store the steps that the newest checkpoint does not have yet."""
        if not self.key:
            return
        saved = read_checkpoint(self._storage, self._folder, self.key)
        self.steps = _after(self.steps, saved.step)
        self.validations = _after(self.validations, saved.last_validation)
        kept = {"key": self.key, "steps": self.steps, "validations": self.validations}
        self._storage.write(f"{self._folder}/{SEEN}", json.dumps(kept).encode())


def read_checkpoint(storage: Storage, folder: str, key: str) -> Curves:
    """Return the curves in the newest complete checkpoint of a training; empty before the first.

    Args:
        storage: The run's storage.
        folder: The run's folder.
        key: The training's key.
    """
    for manifest in reversed(list_checkpoints(storage, f"{folder}/checkpoints/{key}") if key else []):
        try:
            data = storage.read(f"{manifest.folder}/{STATE}")
        except MapoError:  # it may be deleted for a newer one at this moment
            continue
        if hashlib.sha256(data).hexdigest() == manifest.sha256.get(STATE):
            history = json.loads(data)["history"]
            return Curves(manifest.step, history["steps"], history["validations"])
    return Curves()


def live_curves(storage: Storage, folder: str, progress: LiveProgress, *, validate_every: int) -> Curves:
    """Return the curves of a live training, as far as the storage has them.

    Args:
        storage: The run's storage.
        folder: The run's folder.
        progress: Its progress.
        validate_every: `train.validate_every`.
    """
    saved = read_checkpoint(storage, folder, progress.key)
    seen = SeenSteps(storage, folder, validate_every=validate_every)
    seen.take(progress)
    return Curves(
        step=progress.step,
        steps=[*saved.steps, *_after(seen.steps, saved.step)],
        validations=[*saved.validations, *_after(seen.validations, saved.last_validation)],
    )


def _before(rows: Sequence[Row], step: float) -> list[Row]:
    return [row for row in rows if row["step"] < step]


def _after(rows: Sequence[Row], step: float) -> list[Row]:
    return [row for row in rows if row["step"] > step]
