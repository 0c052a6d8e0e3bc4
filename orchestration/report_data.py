"""Gathers what the report shows from the storage alone."""

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from orchestration.config import RunConfig
from orchestration.dataset_view import describe_dataset, describe_encoding, summary_line
from orchestration.evaluation import EVALUATION
from orchestration.journal import Journal, StageRecord, now
from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.storage import Storage

PACKAGES = ("mapo", "torch", "ray", "deepspeed", "accelerate", "diffusers", "transformers", "deltalake", "webdataset")
MAX_GRIDS = 6  # of samples while training: each may be 200 KB of the page
STAGES_SHOWN = ("ingest", "encode", "train", "export", "evaluate")


def report_data(config: RunConfig, storage: Storage, journal: Journal, *, command: str) -> dict[str, Any]:
    """Everything on the page, as plain data; sections of stages that have not run are None."""
    records = {name: journal.record(name) for name in STAGES_SHOWN}
    trained, exported, evaluated = (records[name] for name in ("train", "export", "evaluate"))
    snapshot = trained.details["snapshot"] if trained else {}
    dataset = _dataset(storage, snapshot.get("pairs_version"))
    return {
        "name": config.name,
        "created_at": now(),
        "command": command,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "stages": [_stage(name, record, dataset) for name, record in records.items()],
        "dataset": dataset,
        "fingerprints": {k: snapshot[f"{k}_fingerprint"] for k in ("latents", "text")} if snapshot else None,
        "encoding": _encoding(storage, snapshot, records["encode"]),
        "training": _training(config, trained, sample_grids(storage, journal.folder, trained)) if trained else None,
        "evaluation": evaluated.details if evaluated else None,
        "model": storage.uri(exported.details["model"]) if exported else None,
    }


def _stage(name: str, record: StageRecord | None, dataset: dict[str, Any] | None) -> dict[str, Any]:
    if record is not None:
        return {"name": name, "seconds": record.seconds, "summary": record.summary, "status": "done"}
    if name in ("ingest", "encode") and dataset is not None:  # another run of this storage did it
        return {"name": name, "seconds": None, "summary": summary_line(dataset), "status": "up to date"}
    return {"name": name, "seconds": None, "summary": "", "status": "not run"}


def versions() -> dict[str, str]:
    """Python and the packages that shape a run."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _dataset(storage: Storage, version: int | None) -> dict[str, Any] | None:
    """The snapshot that was trained on; the newest one before training."""
    try:
        description = describe_dataset(storage, version)
    except SnapshotError:
        return None
    return description | {"shards": len(description["shards"])}


def _training(config: RunConfig, trained: StageRecord, samples: list[dict[str, Any]]) -> dict[str, Any]:
    assert config.train is not None
    details, workers = trained.details, trained.details["workers"]
    return {
        "method": config.train.method,
        "loss": config.train.loss_parameters,
        "steps": details["steps"],
        "zero_stage": workers[0]["zero_stage"],
        "world_size": workers[0]["world_size"],
        "precision": config.train.precision,
        "global_batch_size": config.train.global_batch_size,
        "num_starts": details["starts"],
        "workers": workers,
        "history": details["history"]["steps"],
        "validation": details["history"]["validations"],
        "samples": samples,
    }


def sample_grids(storage: Storage, folder: str, trained: StageRecord) -> list[dict[str, Any]]:
    """The grids that training drew of itself: MAX_GRIDS at most, evenly chosen, always the first and the newest.

    They lie below the key of this training: another training's grids of this run are not shown.
    """
    names = storage.names(f"{folder}/samples/{trained.key}")
    found = [(int(step[1]), name) for name in names if (step := re.search(r"/step-(\d+)\.jpg$", name))]
    last = len(found) - 1
    chosen = sorted({round(i * last / (MAX_GRIDS - 1)) for i in range(MAX_GRIDS)}) if found else []
    return [{"step": found[i][0], "image": found[i][1].removeprefix(f"{folder}/")} for i in chosen]


def _encoding(storage: Storage, snapshot: dict[str, Any], record: StageRecord | None) -> dict[str, Any] | None:
    """What is encoded under the fingerprints that were trained on; how fast, and how it looks, if this run did it."""
    details = record.details if record else {}
    latents = snapshot.get("latents_fingerprint") or details.get("latents")
    text = snapshot.get("text_fingerprint") or details.get("text")
    if latents is None or text is None:
        return None
    is_ours = (details.get("latents"), details.get("text")) == (latents, text)
    speed = details.get("speed", {}) if is_ours else {}
    return {
        **describe_encoding(storage, latents, text),
        "speed": speed if any(speed.values()) else None,
        "contact": details.get("contact", []) if is_ours else [],
    }


def page_images(storage: Storage, folder: str, data: dict[str, Any]) -> dict[str, bytes]:
    """The bytes of every sample, grid of samples and image of the contact sheet, by the names that the page has."""
    samples = data["evaluation"]["samples"] if data["evaluation"] else []
    names = {sample[model]: f"{EVALUATION}/{sample[model]}" for sample in samples for model in ("base", "aligned")}
    contact = data["encoding"]["contact"] if data["encoding"] else []
    grids = data["training"]["samples"] if data["training"] else []
    names |= {grid["image"]: grid["image"] for grid in grids}
    names |= {image[what]: image[what] for image in contact for what in ("source", "decoded")}
    return {name: storage.read(f"{folder}/{where}") for name, where in names.items()}
