"""Gather the data of a report from the storage alone."""

import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from orchestration import __version__
from orchestration.config import RunConfig
from orchestration.report.cost import Used, cost_of
from orchestration.report.course import STAGES_SHOWN, UNDONE, Course, JournalEvent, is_alive, read_course
from orchestration.report.encoding import described, recorded_fingerprints, with_own_work
from orchestration.report.evaluation import evaluation_section, shown_gallery
from orchestration.report.live_curves import read_json
from orchestration.report.records import (
    DatasetSection,
    DeviceUse,
    EncodingSection,
    EvaluationSection,
    Fingerprints,
    ReportData,
    RoundRow,
    SourceRow,
    StageRow,
    TrainingSection,
)
from orchestration.report.timeline import timeline
from orchestration.report.training_section import finished_training, live_training, unfinished_progress
from orchestration.rounds.series import rounds_of
from orchestration.run.context import EVALUATION, OLD_RESULTS, RESULTS
from orchestration.run.journal import Journal, StageRecord, now
from orchestration.stages.registry import STAGES, stages_of
from orchestration.stages.stage import StageState
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.secrets import redact
from pipelines.dataset.storage import Storage
from pipelines.maintenance.accounting import kinds_line, summary_line
from pipelines.maintenance.describe import describe_dataset

PACKAGES = ("torch", "ray", "deepspeed", "accelerate", "diffusers", "transformers", "deltalake", "webdataset")
TIME = "%Y-%m-%dT%H:%M:%SZ"

T = TypeVar("T")


class Gathered:
    """Cache of immutable data already read, so that rewriting a page often is cheap."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Any] = {}
        self._events: dict[str, JournalEvent] = {}

    def once(self, *what: object, read: Callable[[], T]) -> T:
        """Return the result of `read`, which is only called the first time."""
        if what not in self._known:
            self._known[what] = read()
        found: T = self._known[what]
        return found

    def events(self, storage: Storage, folder: str) -> list[JournalEvent]:
        """Return the events of a journal, oldest first; none is ever rewritten."""
        for name in storage.names(f"{folder}/journal"):
            if name not in self._events:
                self._events[name] = JournalEvent.from_json(json.loads(storage.read(name)))
        return [self._events[name] for name in sorted(self._events)]


def report_data(
    config: RunConfig,
    storage: Storage,
    journal: Journal,
    *,
    command: str,
    is_driven: bool | None = None,
    gathered: Gathered | None = None,
) -> ReportData:
    """Gather everything that the page shows; sections of stages that have not run are None.

    Args:
        config: The run's configuration.
        storage: The run's storage.
        journal: The run's journal.
        command: The command to continue the run, if the journal does not know it.
        is_driven: Whether a driver is working on the run; by default read from its lease.
        gathered: Data that an earlier call has read.
    """
    gathered, time, folder = gathered or Gathered(), datetime.now(UTC), journal.folder
    records = {name: journal.record(name) for name in STAGES_SHOWN}
    is_driven = is_alive(storage, folder, time) if is_driven is None else is_driven
    own = stages_of(config)
    shown = {name: record for name, record in records.items() if name in own or record is not None}
    course = read_course(gathered.events(storage, folder), shown, now=time, is_driven=is_driven)
    training, snapshot = _training(config, storage, folder, records["train"], course)
    trained_on = _fingerprints(snapshot)
    dataset = _dataset(storage, snapshot.get("pairs_version"), gathered)
    used = _used(records["encode"], training)
    return ReportData(
        name=config.name,
        created_at=now(),
        command=redact(course.command or command),
        config=config.model_dump(mode="json"),
        versions=versions(),
        state=course.state,
        stage=course.stage,
        message=redact(course.message),
        stages=[_stage(name, records[name], dataset, course) for name in shown],
        timeline=timeline(course),
        started_at=course.started.strftime(TIME) if course.started else None,
        cost=cost_of(course, config, records["ingest"], used),
        places=_places(used),
        sources=_sources(config),
        rounds=[_round(record) for record in rounds_of(storage, folder)],
        dataset=dataset,
        fingerprints=trained_on,
        encoding=_encoding(storage, trained_on, records["encode"], gathered),
        training=training,
        evaluation=_evaluation(storage, folder, records["evaluate"]),
        model=_model(storage, records["export"]),
    )


def _training(
    config: RunConfig, storage: Storage, folder: str, record: StageRecord | None, course: Course
) -> tuple[TrainingSection | None, Mapping[str, Any]]:
    """Return the training to show, and the snapshot that it reads: the live one, else the finished one."""
    progress = unfinished_progress(storage, folder, record, course)
    if progress is not None:
        snapshot = read_json(storage, f"{folder}/snapshot.json") or {}
        return live_training(config, storage, folder, progress), snapshot
    if record is not None:
        return finished_training(config, storage, folder, record), record.details["snapshot"]
    return None, {}


def _fingerprints(snapshot: Mapping[str, Any]) -> Fingerprints | None:
    return Fingerprints(snapshot["latents_fingerprint"], snapshot["text_fingerprint"]) if snapshot else None


def _stage(name: str, record: StageRecord | None, dataset: DatasetSection | None, course: Course) -> StageRow:
    state, newest = course.stages[name], course.newest(name)
    if newest is not None and state in (StageState.RUNNING, *UNDONE):
        seconds, began = newest.seconds(course.now), newest.began.strftime(TIME)
        if state == StageState.RUNNING:
            return StageRow(name, state, seconds, began=began)
        return StageRow(name, state, seconds or None, newest.message, began)
    if record is not None:
        return StageRow(name, state, record.seconds, record.summary)
    if state == StageState.NOT_RUN and STAGES[name].shares_data and dataset is not None:
        return StageRow(name, StageState.UP_TO_DATE, summary=dataset.summary)  # another run of this storage did it
    return StageRow(name, state)


def _used(encoded: StageRecord | None, training: TrainingSection | None) -> Used:
    workers = training.workers if training else ()
    return Used.of_records(encoded, [(worker.node, worker.device) for worker in workers])


def _places(used: Used) -> list[DeviceUse]:
    """Return the devices that training and encoding ran on, by node and kind."""
    counted = Counter(used.workers)
    found = [DeviceUse("train", count, device, node) for (node, device), count in counted.items()]
    actors: dict[str, int] = {}
    for device, num_actors in used.encoders:
        actors[device] = max(num_actors, actors.get(device, 0))
    return found + [DeviceUse("encode", count, device, None) for device, count in actors.items()]


def _sources(config: RunConfig) -> list[SourceRow]:
    sources = config.ingest.sources if config.ingest else ()
    return [SourceRow(each.format, redact(each.path)) for each in sources]


def _round(record: Mapping[str, Any]) -> RoundRow:
    parent = record.get("parent")
    return RoundRow(
        round=record["round"],
        parent=parent["round"] if parent else None,
        pairs_version=record["snapshot"]["pairs_version"],
        num_pairs=record.get("num_pairs"),
        steps=record["steps"],
        finished_at=record["finished_at"],
        checkpoint=record["checkpoint"],
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape a run."""
    found = {"python": platform.python_version(), "mapo": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _dataset(storage: Storage, version: int | None, gathered: Gathered) -> DatasetSection | None:
    """Return the snapshot that was trained on; before training, the newest version."""
    version = pairs_table(storage).version if version is None else version
    return None if version is None else gathered.once("dataset", version, read=lambda: _describe(storage, version))


def _describe(storage: Storage, version: int) -> DatasetSection:
    found = describe_dataset(storage, version)
    return DatasetSection(
        storage=found.storage,
        version=found.version,
        rows=found.rows,
        reasons=found.reasons,
        splits=found.splits,
        prompts=found.prompts,
        shards=len(found.shards),
        bytes=found.bytes,
        summary=summary_line(found),
        num_singles=found.num_singles,
        kinds=kinds_line(found.kinds, found.verdicts),
    )


def _encoding(
    storage: Storage, trained_on: Fingerprints | None, record: StageRecord | None, gathered: Gathered
) -> EncodingSection | None:
    """Return the encodings that were trained on; before training, those of the run itself."""
    fingerprints = trained_on or recorded_fingerprints(record)
    if fingerprints is None:
        return None
    latents, text = fingerprints.latents, fingerprints.text
    tables = pairs_table(storage), latents_table(storage, latents), text_table(storage, text)
    known_by = ("encoding", fingerprints, *(table.version for table in tables))
    section = gathered.once(*known_by, read=lambda: described(storage, fingerprints))
    return with_own_work(section, fingerprints, record)


def _evaluation(storage: Storage, folder: str, record: StageRecord | None) -> EvaluationSection | None:
    """Return the last evaluation; without its samples while those of the next one replace them."""
    if record is None:
        return None
    files = (f"{folder}/{EVALUATION}/{name}" for name in (OLD_RESULTS, RESULTS))
    return evaluation_section(record.details, has_samples=any(map(storage.exists, files)))


def _model(storage: Storage, exported: StageRecord | None) -> str | None:
    return storage.uri(exported.details["model"]) if exported else None


def page_images(storage: Storage, folder: str, data: ReportData) -> dict[str, bytes]:
    """Read every sample, sample grid and image of the contact sheet; return their bytes by the page's names.

    A sample that is not there is left out, and the page says that it is missing.
    """
    contact = data.encoding.contact if data.encoding else ()
    grids = data.training.samples if data.training else ()
    names = {grid.image: grid.image for grid in grids}
    names |= {name: name for image in contact for name in (image.source, image.decoded)}
    samples = {
        image.name: f"{EVALUATION}/{image.name}"
        for entry in shown_gallery(data.evaluation)
        for image in entry.images.values()
    }
    there = set(storage.names(f"{folder}/{EVALUATION}")) if samples else set()
    names |= {name: where for name, where in samples.items() if f"{folder}/{where}" in there}
    return {name: storage.read(f"{folder}/{where}") for name, where in names.items()}
