"""Rounds: a run's trainings on one snapshot after another, each from the base or from the model of the one before.

Which round is next, and what it starts from, follows from the storage: the record of the last finished round
(`stages/train.json`), its export, and the versions of the tables.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from orchestration.run.context import Run
from orchestration.run.journal import StageRecord, now
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.layout import PAIRS
from pipelines.dataset.pair import Status
from pipelines.dataset.secrets import redact
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject
from pipelines.dataset.versions import Version, versions_after
from training.spec import Parent, Snapshot, TrainSpec, base_digest
from training.state.checkpoint_format import MANIFEST, remove_checkpoints

if TYPE_CHECKING:
    from training.launch import TrainingResult

REWRITES = ("compact", "optimize")
"""Operations that move rows and bytes without changing anything that training reads."""


@dataclass(frozen=True)
class Round:
    """A round to train: the next one, or an earlier one again.

    Args:
        number: The round's number, from 1.
        snapshot: The snapshot that it reads.
        parent: The model it starts from; None for the base.
    """

    number: int
    snapshot: Snapshot
    parent: Parent | None


def next_round(run: Run, newest: Snapshot) -> Round:
    """Return the round that brings the run up to date.

    On the snapshot of the last finished round it is that round again, from the same parent: with the same settings it
    is up to date, with other settings it is repeated. On another snapshot it is the next round.

    Args:
        run: The run, with a section `train`.
        newest: The newest versions of the tables.

    Raises:
        ModelError: The checkpoint to start from is missing.
    """
    assert run.config.train is not None
    record = run.journal.record("train")
    if record is None or "snapshot" not in record.details:  # an old record tells too little to start from
        return Round(1, newest, None)
    done, number = Snapshot(**record.details["snapshot"]), int(record.details.get("round", 1))
    if run.config.train.rounds == "restart":
        return Round(number if done == newest else number + 1, newest, None)
    if reads_the_same(run.storage, done, newest):
        before = record.details.get("parent")
        return Round(number, done, None if before is None else Parent(**before))
    begun = _begun(run)
    if begun is not None and begun != done and reads_the_same(run.storage, begun, newest):
        newest = begun
    return Round(number + 1, newest, parent_of(run, record))


def _begun(run: Run) -> Snapshot | None:
    """Return the snapshot of the newest training, finished or not."""
    name = f"{run.folder}/snapshot.json"
    data = run.storage.read_if_there(name)
    return None if data is None else Snapshot(**json.loads(data))


def reads_the_same(storage: Storage, old: Snapshot, new: Snapshot) -> bool:
    """Return whether training would read the same pairs, labels and tensors from both, judging by the table's log.

    It would if, since the older one, shards and files were only repacked, or no kept rows were added.
    """
    prints = [(each.latents_fingerprint, each.text_fingerprint) for each in (old, new)]
    if prints[0] != prints[1] or new.pairs_version < old.pairs_version:
        return False
    changes = versions_after(storage.child(PAIRS), old.pairs_version)
    return all(not _brings(storage, each) for each in changes if each.number <= new.pairs_version)


def _brings(storage: Storage, version: Version) -> bool:
    """Return whether a version may have changed what training reads."""
    if version.operation in REWRITES:
        return False
    if version.dropped:
        return True
    for file in version.added:
        try:
            with storage.fs.open(storage.path(f"{PAIRS}/{file}"), "rb") as opened:
                statuses = pq.read_table(opened, columns=["status"])["status"].unique().to_pylist()
        except FileNotFoundError:  # `mapo data gc` took it
            return True
        if str(Status.KEPT) in statuses:
            return True
    return False


def parent_of(run: Run, record: StageRecord) -> Parent:
    """Return the last aligned model: the one that `export` wrote, or would write, for the last finished round.

    Raises:
        ModelError: Its checkpoint is missing.
    """
    details, exported = record.details, run.journal.record("export")
    checkpoint, weights = exported_of(run, record)
    if exported is not None and exported.details.get("training") == record.key:
        checkpoint, weights = exported.details["checkpoint"], exported.details["kind"]
    checkpoint = checkpoint or details["checkpoint"]
    manifest = details.get("manifests", {}).get(checkpoint) or _manifest_digest(run.storage, checkpoint)
    lora = details.get("config", {}).get("lora")
    number = int(details.get("round", 1))
    return Parent(number, record.key, checkpoint, manifest, weights, details.get("base_digest", ""), lora)


def exported_of(run: Run, record: StageRecord) -> tuple[str | None, str]:
    """Return what `export` would export with the current configuration: a checkpoint's folder, and `raw` or `ema`.

    The best checkpoint is the one whose exported weights were the best; a record from before December 2026 only has
    the best one of the raw weights. The folder is None if the record, an even older one, has none.
    """
    export, details = run.config.export, record.details
    has_average = bool(details.get("config", {}).get("ema"))
    kind = "ema" if export.weights == "ema" or (export.weights == "auto" and has_average) else "raw"
    if export.checkpoint == "last":
        return details.get("checkpoint"), kind
    best = details.get("best_checkpoint")
    return details.get("best_average_checkpoint", best) if kind == "ema" else best, kind


def _manifest_digest(storage: Storage, checkpoint: str) -> str:
    name = f"{checkpoint}/{MANIFEST}"
    data = storage.read_if_there(name)
    if data is None:
        raise ModelError(
            f"there is no complete checkpoint {storage.uri(checkpoint)} to start from",
            "restore it from a copy, or train from the base model with `train.rounds: restart`",
        )
    return hashlib.sha256(data).hexdigest()


def check_parent(spec: TrainSpec) -> None:
    """Check that a round can start from its parent.

    Raises:
        ConfigError: The parent was trained from another base, or with other adapters.
    """
    if spec.parent is not None:
        lora = None if spec.config.lora is None else spec.config.lora.model_dump(mode="json")
        _check(spec.round, str(spec.parent), (spec.parent.base_digest, spec.base_digest), (spec.parent.lora, lora))


def check_next_round(run: Run) -> None:
    """Check that the next round can start, before ingest and encode have made its snapshot.

    Raises:
        ConfigError: See `check_parent`.
        ModelError: The base model is missing or damaged.
    """
    record, config = run.journal.record("train"), run.config
    if record is None or config.encode is None or config.train is None or config.train.rounds != "continue":
        return
    number, lora = int(record.details.get("round", 1)), config.train.lora
    digest = base_digest(config.encode.source)
    bases = (record.details.get("base_digest", digest), digest)
    loras = (record.details.get("config", {}).get("lora"), None if lora is None else lora.model_dump(mode="json"))
    _check(number + 1, f"round {number} ({record.details['checkpoint']})", bases, loras)


def _check(number: int, parent: str, bases: tuple[str, str], loras: tuple[Any, Any]) -> None:
    differences = []
    # A parent takes the place of the adapters that the first round started from.
    loras = tuple(lora and {key: value for key, value in lora.items() if key != "weights"} for lora in loras)  # type: ignore[assignment]
    if bases[0] != bases[1]:
        differences.append(f"the base model has the digest {bases[1]}, but it was trained from {bases[0]}")
    if loras[0] != loras[1]:
        differences.append(f"train.lora is {loras[1]}, but it was trained with {loras[0]}")
    if differences:
        raise ConfigError(
            f"round {number} cannot start from {parent}: {'; '.join(differences)}",
            "restore these settings, start from the base with `train.rounds: restart`, or choose another `name`",
        )


def rounds_of(storage: Storage, folder: str) -> Iterator[JsonObject]:
    """Yield the records of a run's finished rounds, by number.

    Args:
        storage: The run's storage.
        folder: The run's folder.
    """
    for name in storage.names(f"{folder}/rounds"):
        yield json.loads(storage.read(name))


def finish_round(run: Run, spec: TrainSpec, trained: "TrainingResult", *, num_pairs: int, num_seen: int) -> JsonObject:
    """Write the record of a finished round, once; return its details for the stage's record.

    Args:
        run: The run.
        spec: The training.
        trained: The training's result.
        num_pairs: Training pairs in the snapshot.
        num_seen: Pairs of them that were trained on.
    """
    storage, name = run.storage, f"{run.folder}/rounds/{spec.round:04d}.json"
    parent = None if spec.parent is None else asdict(spec.parent)
    checkpoints = {trained.checkpoint, trained.best_checkpoint, trained.best_average_checkpoint}
    manifests = {checkpoint: _manifest_digest(storage, checkpoint) for checkpoint in sorted(checkpoints)}
    data = storage.read_if_there(name)
    before = None if data is None else json.loads(data)
    if before is None or before["key"] != spec.key or before["steps"] != trained.steps:
        found = describe_round(
            number=spec.round,
            key=spec.key,
            details=asdict(trained) | made_from(spec) | {"parent": parent, "manifests": manifests},
            finished_at=now(),
        )
        sources = run.config.ingest.sources if run.config.ingest else ()
        found |= {"num_pairs": num_pairs, "num_seen": num_seen}
        found |= {"sources": [{"format": each.format, "path": each.path} for each in sources]}
        storage.write(name, redact(json.dumps(found, indent=1)).encode())
    return {"round": spec.round, "parent": parent, "manifests": manifests}


def made_from(spec: TrainSpec) -> JsonObject:
    """Return the inputs of a training for its record."""
    return {
        "snapshot": asdict(spec.snapshot),
        "base_digest": spec.base_digest,
        "seed": spec.seed,
        "config": spec.config.model_dump(mode="json"),
    }


def describe_round(*, number: int, key: str, details: JsonObject, finished_at: str) -> JsonObject:
    """Describe a round as plain data, from the details of its training: inputs, settings and results."""
    config, seed = details.get("config", {}), details.get("seed", 0)
    order = {name: config.get(name) for name in ("micro_batch_size", "global_batch_size", "labels")}
    settings = json.dumps([config, seed], sort_keys=True)
    return {
        "round": number,
        "key": key,
        "parent": details.get("parent"),
        "snapshot": details["snapshot"],
        "base_digest": details.get("base_digest"),
        "settings": hashlib.sha256(settings.encode()).hexdigest()[:16],
        "method": config.get("method"),
        "order": order | {"seed": seed},
        "checkpoint": details["checkpoint"],
        "best_checkpoint": details["best_checkpoint"],
        "manifests": details.get("manifests", {}),
        "steps": details["steps"],
        "digest": details["digest"],
        "seconds": round(sum(step.get("step_s", 0.0) for step in details["history"]["steps"]), 3),
        "finished_at": finished_at,
    }


def forget_old_rounds(run: Run) -> None:
    """Delete the checkpoints of all but the newest `train.keep_rounds` finished rounds; their records stay.

    They are counted back from the round in the record of the stage `train`: the next round and an export start from
    that round, so it always stays.
    """
    record = run.journal.record("train")
    if record is None or run.config.train is None or "round" not in record.details:
        return
    oldest = int(record.details["round"]) - run.config.train.keep_rounds + 1
    found = list(rounds_of(run.storage, run.folder))
    kept = {record.key, *(each["key"] for each in found if each["round"] >= oldest)}
    for each in found:
        if each["round"] < oldest and each["key"] not in kept:
            num_files = remove_checkpoints(run.storage, f"{run.folder}/checkpoints/{each['key']}")
            if num_files:
                run.say(
                    f"train     round {each['round']}: checkpoints deleted, {num_files:,} files (train.keep_rounds)"
                )
