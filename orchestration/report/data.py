"""Gathers what the report shows from the storage alone."""

import json
import platform
import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from orchestration.config import RunConfig
from orchestration.report.cost import cost_of
from orchestration.report.course import STAGES_SHOWN, UNDONE, Course, is_alive, read_course
from orchestration.report.live_curves import PROGRESS, live_history, read_json
from orchestration.report.timeline import timeline
from orchestration.rounds.series import rounds_of
from orchestration.run.context import EVALUATION, RESULTS
from orchestration.run.journal import Journal, StageRecord, now
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.secrets import redact
from pipelines.dataset.storage import Storage
from pipelines.maintenance.describe import describe_dataset, describe_encoding, summary_line
from training.schedule import of_average

PACKAGES = ("mapo", "torch", "ray", "deepspeed", "accelerate", "diffusers", "transformers", "deltalake", "webdataset")
MAX_GRIDS = 6  # of samples while training: each may be 200 KB of the page
TIME = "%Y-%m-%dT%H:%M:%SZ"

T = TypeVar("T")


class Gathered:
    """What was read from the storage before and cannot change, so that a page that is written often costs little."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Any] = {}
        self._events: dict[str, dict[str, Any]] = {}

    def once(self, *what: Any, read: Callable[[], T]) -> T:
        """The result of `read`, which is called at the first time."""
        if what not in self._known:
            self._known[what] = read()
        found: T = self._known[what]
        return found

    def events(self, storage: Storage, folder: str) -> list[dict[str, Any]]:
        """The events of a journal, oldest first; none is ever rewritten."""
        for name in storage.names(f"{folder}/journal"):
            if name not in self._events:
                self._events[name] = json.loads(storage.read(name))
        return [self._events[name] for name in sorted(self._events)]


def report_data(
    config: RunConfig,
    storage: Storage,
    journal: Journal,
    *,
    command: str,
    is_driven: bool | None = None,
    gathered: Gathered | None = None,
) -> dict[str, Any]:
    """Everything on the page, as plain data; sections of stages that have not run are None.

    Args:
        config: The run's.
        storage: Its storage.
        journal: Of the run.
        command: What brings the run to its end.
        is_driven: Whether a driver works on the run; by default its lease is asked.
        gathered: What an earlier call has read.
    """
    gathered, time = gathered or Gathered(), datetime.now(UTC)
    records = {name: journal.record(name) for name in STAGES_SHOWN}
    is_driven = is_alive(storage, journal.folder, time) if is_driven is None else is_driven
    events = gathered.events(storage, journal.folder)
    course = read_course(events, records, now=time, is_driven=is_driven)
    progress = unfinished_training(storage, journal.folder, records["train"], course)
    trained, exported, evaluated = (records[name] for name in ("train", "export", "evaluate"))
    snapshot = trained.details["snapshot"] if trained else {}
    if progress is not None:
        trained, snapshot = None, read_json(storage, f"{journal.folder}/snapshot.json") or {}
    dataset = _dataset(storage, snapshot.get("pairs_version"), gathered)
    training = None
    if trained is not None:
        training = _training(config, trained, sample_grids(storage, journal.folder, trained.key))
    elif progress is not None:
        training = _live_training(config, storage, journal.folder, progress)
    workers = training["workers"] if training else []
    return {
        "name": config.name,
        "created_at": now(),
        "command": redact(course.command or command),
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "state": course.state,
        "stage": course.stage,
        "message": redact(course.message),
        "stages": [_stage(name, records[name], dataset, course) for name in STAGES_SHOWN],
        "timeline": timeline(course),
        "started_at": course.started.strftime(TIME) if course.started else None,
        "cost": cost_of(course, config, records, workers),
        "places": _places(workers, records["encode"]),
        "sources": _sources(config),
        "rounds": [_round(each) for each in rounds_of(storage, journal.folder)],
        "dataset": dataset,
        "fingerprints": {k: snapshot[f"{k}_fingerprint"] for k in ("latents", "text")} if snapshot else None,
        "encoding": _encoding(storage, snapshot, records["encode"], gathered),
        "training": training,
        "evaluation": _evaluation(storage, journal.folder, evaluated),
        "model": storage.uri(exported.details["model"]) if exported else None,
    }


def unfinished_training(
    storage: Storage, folder: str, record: StageRecord | None, course: Course
) -> dict[str, Any] | None:
    """Where a training is that has no record yet; None if the last one finished, or none has begun."""
    progress = read_json(storage, f"{folder}/{PROGRESS}") if course.state != "finished" else None
    if progress is None or (record is not None and record.key == progress["key"]):
        return None
    attempt = course.newest("train")
    return progress if attempt is not None and attempt.state != "done" else None


def _stage(name: str, record: StageRecord | None, dataset: dict[str, Any] | None, course: Course) -> dict[str, Any]:
    state, attempt = course.stages[name], course.newest(name)
    found: dict[str, Any] = {"name": name, "seconds": None, "summary": "", "status": state, "began": None}
    if state == "running" and attempt is not None:
        return found | {"seconds": attempt.seconds(course.now), "began": attempt.began.strftime(TIME)}
    if state in UNDONE and attempt is not None:
        seconds = attempt.seconds(course.now)
        return found | {"seconds": seconds or None, "summary": attempt.message, "began": attempt.began.strftime(TIME)}
    if record is not None:
        return found | {"seconds": record.seconds, "summary": record.summary}
    if (
        state == "not run" and name in ("ingest", "encode") and dataset is not None
    ):  # another run of this storage did it
        return found | {"summary": summary_line(dataset), "status": "up to date"}
    return found


def _places(workers: list[dict[str, Any]], encoded: StageRecord | None) -> list[dict[str, Any]]:
    """Where training ran, by node and device, and on what encoding did."""
    counted = Counter((worker["node"], worker["device"]) for worker in workers)
    found = [{"node": node, "device": device, "count": n, "what": "train"} for (node, device), n in counted.items()]
    speeds = [each for each in (encoded.details.get("speed") or {}).values() if each] if encoded else []
    actors = {
        each["device"]: max(int(e["num_actors"]) for e in speeds if e["device"] == each["device"]) for each in speeds
    }
    return found + [{"node": None, "device": d, "count": n, "what": "encode"} for d, n in actors.items()]


def _sources(config: RunConfig) -> list[dict[str, str]]:
    sources = config.ingest.sources if config.ingest else ()
    return [{"format": each.format, "path": redact(each.path)} for each in sources]


def _round(record: dict[str, Any]) -> dict[str, Any]:
    names = ("round", "key", "steps", "finished_at", "checkpoint")
    parent = record.get("parent")
    found = {name: record.get(name) for name in names} | {"parent": parent["round"] if parent else None}
    return found | {"pairs_version": record["snapshot"]["pairs_version"], "num_pairs": record.get("num_pairs")}


def versions() -> dict[str, str]:
    """Python and the packages that shape a run."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _dataset(storage: Storage, version: int | None, gathered: Gathered) -> dict[str, Any] | None:
    """The snapshot that was trained on; the newest one before training."""
    version = pairs_table(storage).version if version is None else version
    if version is None:
        return None
    description = gathered.once("dataset", version, read=lambda: describe_dataset(storage, version))
    return description | {"shards": len(description["shards"])}


def _training(config: RunConfig, trained: StageRecord, samples: list[dict[str, Any]]) -> dict[str, Any]:
    details = trained.details
    return {
        **_settings(config, details["workers"], details["starts"]),
        "steps": details["steps"],
        "max_steps": details["steps"],
        "is_over": True,
        "notes": [],
        "history": details["history"]["steps"],
        **_held_out(config, details["history"]["validations"]),
        "samples": samples,
    }


def _held_out(config: RunConfig, validations: list[dict[str, float]]) -> dict[str, Any]:
    """The held-out numbers of the weights that are exported, and what to call them."""
    average = of_average(validations) if config.export.weights != "raw" else None
    if average is None:
        return {"validation": validations, "held_out": "held out"}
    return {"validation": average, "held_out": "held out, average"}


def _live_training(config: RunConfig, storage: Storage, folder: str, progress: dict[str, Any]) -> dict[str, Any]:
    """A training that has not finished, as far as it has come."""
    assert config.train is not None
    steps, validations = live_history(storage, folder, progress, validate_every=config.train.validate_every)
    return {
        **_settings(config, progress["workers"], progress["starts"]),
        "steps": int(progress["step"]),
        "max_steps": progress["max_steps"],
        "is_over": False,
        "notes": [redact(note) for note in progress["notes"]],
        "history": steps,
        **_held_out(config, validations),
        "samples": sample_grids(storage, folder, progress["key"]),
    }


def _settings(config: RunConfig, workers: list[dict[str, Any]], starts: int) -> dict[str, Any]:
    assert config.train is not None
    return {
        "method": config.train.method,
        "loss": config.train.loss_parameters,
        "zero_stage": workers[0]["zero_stage"],
        "world_size": workers[0]["world_size"],
        "precision": config.train.precision,
        "global_batch_size": config.train.global_batch_size,
        "num_starts": starts,
        "workers": workers,
    }


def sample_grids(storage: Storage, folder: str, key: str) -> list[dict[str, Any]]:
    """The grids that training drew of itself: MAX_GRIDS at most, evenly chosen, always the first and the newest.

    Args:
        storage: Of the run.
        folder: The run's folder.
        key: Of the training: another training's grids of this run are not shown.
    """
    names = storage.names(f"{folder}/samples/{key}")
    found = [(int(step[1]), name) for name in names if (step := re.search(r"/step-(\d+)\.jpg$", name))]
    last = len(found) - 1
    chosen = sorted({round(i * last / (MAX_GRIDS - 1)) for i in range(MAX_GRIDS)}) if found else []
    return [{"step": found[i][0], "image": found[i][1].removeprefix(f"{folder}/")} for i in chosen]


def _encoding(
    storage: Storage, snapshot: dict[str, Any], record: StageRecord | None, gathered: Gathered
) -> dict[str, Any] | None:
    """What is encoded under the fingerprints that were trained on; how fast, and how it looks, if this run did it."""
    details = record.details if record else {}
    latents = snapshot.get("latents_fingerprint") or details.get("latents")
    text = snapshot.get("text_fingerprint") or details.get("text")
    if latents is None or text is None:
        return None
    is_ours = (details.get("latents"), details.get("text")) == (latents, text)
    speed = details.get("speed", {}) if is_ours else {}
    tables = pairs_table(storage), latents_table(storage, latents), text_table(storage, text)
    versions_now = [table.version for table in tables]
    described = gathered.once(
        "encoding", latents, text, *versions_now, read=lambda: describe_encoding(storage, latents, text)
    )
    return {
        **described,
        "speed": speed if any(speed.values()) else None,
        "contact": details.get("contact", []) if is_ours else [],
    }


def _evaluation(storage: Storage, folder: str, record: StageRecord | None) -> dict[str, Any] | None:
    """What the last evaluation found; without its samples while those of another one take their place."""
    if record is None:
        return None
    is_replaced = not storage.exists(f"{folder}/{EVALUATION}/{RESULTS}")
    return {**record.details, "samples": []} if is_replaced else record.details


def page_images(storage: Storage, folder: str, data: dict[str, Any]) -> dict[str, bytes]:
    """The bytes of every sample, grid of samples and image of the contact sheet, by the names that the page has."""
    samples = data["evaluation"]["samples"] if data["evaluation"] else []
    names = {sample[model]: f"{EVALUATION}/{sample[model]}" for sample in samples for model in ("base", "aligned")}
    contact = data["encoding"]["contact"] if data["encoding"] else []
    grids = data["training"]["samples"] if data["training"] else []
    names |= {grid["image"]: grid["image"] for grid in grids}
    names |= {image[what]: image[what] for image in contact for what in ("source", "decoded")}
    return {name: storage.read(f"{folder}/{where}") for name, where in names.items()}
