"""Trainings that go on where a shorter one of the same settings ended: with a constant rate, `max_steps` may grow."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from training.state.checkpoint_format import STATE, list_checkpoints

if TYPE_CHECKING:
    from orchestration.run.context import Run
    from training.spec import TrainSpec


def as_extended(run: Run, spec: TrainSpec) -> TrainSpec:
    """Return a training as the extension of the run's shorter one, if there is one; otherwise as it is.

    With a constant rate no step depends on `max_steps`, so the shorter training is the beginning of the longer one: its
    key stays, and its newest checkpoint is where it goes on. With other schedules every step has another rate.

    Args:
        run: The run.
        spec: The training, as the configuration states it.
    """
    if spec.config.lr_schedule != "constant" or list_checkpoints(run.storage, spec.checkpoints):
        return spec
    for begun, key in _begun(run):
        shorter = replace(spec, begun_max_steps=begun)
        if begun != spec.config.max_steps and shorter.key == key:
            return shorter
    return spec


def _begun(run: Run) -> list[tuple[int, str]]:
    """Return the `max_steps` that trainings of this run began with, and their keys; the longest first."""
    record, newest = run.journal.record("train"), {}
    for manifest in list_checkpoints(run.storage, f"{run.folder}/checkpoints"):
        newest[manifest.folder.split("/")[-2]] = manifest
    found = []
    for key, manifest in newest.items():
        data = run.storage.read_if_there(f"{manifest.folder}/{STATE}")
        begun = None if data is None else json.loads(data).get("max_steps")
        if begun is None and record is not None and record.key == key:  # written before checkpoints said it
            begun = record.details.get("config", {}).get("max_steps")
        if begun is not None:
            found.append((int(begun), key))
    return sorted(found, reverse=True)


def num_finished(run: Run, spec: TrainSpec) -> int:
    """Return the steps that the recorded training has; 0 if the record is of another training."""
    record = run.journal.record("train")
    if record is None or record.key != spec.key:
        return 0
    return int(record.details.get("steps", spec.config.max_steps))


def extension_notes(run: Run, spec: TrainSpec) -> list[str]:
    """Return the plan's remarks on a `max_steps` that is not the one of the run's training."""
    wanted, finished = spec.config.max_steps, num_finished(run, spec)
    if finished > wanted:
        return [
            f"this training already has {finished:,} steps, more than max_steps {wanted:,}; it stays as it is. Train "
            "under another `name` for fewer"
        ]
    if spec.begun_max_steps is not None:
        return [
            f"extends the training of {spec.begun_max_steps:,} steps to {wanted:,}: with a constant rate it goes on "
            "from its last checkpoint, as one long training would"
        ]
    record = run.journal.record("train")
    before = None if record is None else record.details.get("config", {}).get("max_steps")
    if record is None or before in (None, wanted) or replace(spec, begun_max_steps=int(before)).key != record.key:
        return []
    old, schedule = run.storage.uri(record.details["checkpoint"]), spec.config.lr_schedule
    return [
        f"max_steps went from {before:,} to {wanted:,}, and with lr_schedule {schedule} the rate of every step depends "
        f"on it: this is another training, from the first step. The old one stays in {old}. To go on from its model, "
        f"set `encode.model: {run.storage.uri(run.model)}` and another `name`"
    ]
