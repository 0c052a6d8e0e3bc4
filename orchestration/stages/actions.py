"""What each stage does, and the key of what it is made from. Heavy imports happen where the work is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from orchestration.run.context import Outcome, Run
from pipelines.dataset.errors import ConfigError, MapoError
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.pair import EMPTY_PROMPT_ID, VALIDATION
from pipelines.maintenance.describe import MAX_TOKENS, describe_dataset, describe_encoding, summary_line

if TYPE_CHECKING:
    from orchestration.config import RunConfig
    from pipelines.config import EncodeConfig
    from pipelines.dataset.storage import Storage
    from training.config import TrainConfig
    from training.launch import Progress
    from training.spec import Snapshot, TrainSpec

REPORT_VERSION = 3  # raise it when the page changes
EXPORT_VERSION = 2
LINEAGE_VERSION = 1


def digest(*parts: Any) -> str:
    """16 hex digits of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_model(config: EncodeConfig) -> None:
    """Find a wrong base model, or settings that it cannot be run with, before hours of ingest and not after."""
    from pipelines.encode.plan import check_settings

    check_settings(config)


def check_training(config: TrainConfig) -> None:
    """Find what training could not be tracked with before anything starts."""
    from training.tracking.trackers import check_trackers

    check_trackers(config.trackers)


def check_rounds(run: Run) -> None:
    """Find what the next round could not go on from before its data is made."""
    from orchestration.rounds.series import check_next_round

    check_next_round(run)


def check_export(config: RunConfig) -> None:
    """Find what could not be exported as it is asked for before anything is trained.

    Raises:
        ConfigError: The training will not have it, or the hub will not take it.
    """
    train, export = config.train, config.export
    if train is not None and export.weights == "ema" and train.ema is None:
        raise ConfigError("export.weights is ema, but training keeps no average", "set `train.ema: {decay: 0.9999}`")
    if train is not None and export.checkpoint == "best" and not train.keep_best:
        raise ConfigError("export.checkpoint is best, but train.keep_best is false", "set `train.keep_best: true`")
    if export.push_to_hub is not None:
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE or not get_token():
            raise ConfigError(
                f"export.push_to_hub is {export.push_to_hub}, which needs HF_TOKEN and no HF_HUB_OFFLINE",
                "set them so; or leave it out, and `mapo export` with it once the model is there",
            )


# ingest: the table itself says which units it has


def ingest_key(run: Run) -> str:
    """The units of all sources."""
    from pipelines.ingest.policy import Policy

    assert run.config.ingest
    policy = Policy.of(run.config.ingest)
    return digest(sorted(unit.id for unit in run.units), asdict(policy))


def ingest_is_done(run: Run, key: str) -> bool:
    """Every unit is in the table, every row as the policy has it, and no more dropped than is allowed.

    Asked of the table only if it has changed since an ingest of this run found it so.
    """
    from pipelines.ingest.execution import check_drop_budget, is_up_to_date

    assert run.config.ingest
    record = run.journal.record("ingest")
    if record is not None and record.details.get("checked") == ingest_check(run, key):
        return True
    if not is_up_to_date(run.config.ingest, run.storage, run.units):
        return False
    check_drop_budget(run.config.ingest, run.storage)
    return True


def ingest_check(run: Run, key: str) -> list[Any]:
    """What a record of the ingest says was checked: what is asked, and of which version of the table."""
    assert run.config.ingest
    return [key, run.config.ingest.max_drop_ratio, pairs_table(run.storage).version]


def run_ingest(run: Run, key: str) -> Outcome:
    """Sources to pair shards."""
    from pipelines.ingest.execution import ingest

    assert run.config.ingest
    if "encode" in run.goal and run.config.encode:
        run.ahead.begin(run.config.ingest, run.config.encode)
    ingest(run.config.ingest, run.storage, run.units)
    details: dict[str, Any] = {} if (ahead := run.ahead.speed()) is None else {"encoded_ahead": [ahead.to_json()]}
    checked = ingest_check(run, key)  # before the look: another run may commit at any time
    if ingest_is_done(run, key):
        details["checked"] = checked
    return Outcome(summary_line(describe_dataset(run.storage)), details)


# encode: the tables say what they have under this fingerprint


def encode_key(run: Run) -> str | None:
    """Both fingerprints and the snapshot of the pairs."""
    version = pairs_table(run.storage).version
    return None if version is None else digest(*_fingerprints(run), version)


def _fingerprints(run: Run) -> tuple[str, str]:
    from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint

    assert run.config.encode
    return latents_fingerprint(run.config.encode), text_fingerprint(run.config.encode)


def encode_is_done(run: Run, key: str) -> bool:
    """No kept pair and no prompt is missing; asked of the tables only if one has changed since a run found it so."""
    from pipelines.encode.plan import is_encoded

    assert run.config.encode
    record = run.journal.record("encode")
    if record is not None and record.details.get("versions") == encode_check(run, pairs_table(run.storage).version):
        return True
    return is_encoded(run.config.encode, run.storage, include_empty_prompt=run.config.wants_empty_prompt)


def encode_check(run: Run, pairs_version: int | None) -> list[Any]:
    """Which version of the pairs was encoded, under which fingerprints, and the versions of their tables."""
    latents, text = _fingerprints(run)
    tables = latents_table(run.storage, latents), text_table(run.storage, text)
    beside = [EMPTY_PROMPT_ID] if run.config.wants_empty_prompt else []
    return [pairs_version, latents, text, *(table.version for table in tables), *beside]


def run_encode(run: Run, key: str) -> Outcome:
    """Pair shards to latent and text shards, and a contact sheet that shows whether they are right.

    What went on beside ingest comes first: it holds devices.
    """
    from orchestration.stages.contact_sheet import write_contact_sheet
    from pipelines.encode.execution import encode

    config = run.config.encode
    assert config
    version = pairs_table(run.storage).version  # what others commit meanwhile may not be encoded
    rest = run.ahead.finish()
    done = encode(config, run.storage, include_empty_prompt=run.config.wants_empty_prompt)
    done["latents"] = done["latents"] or rest
    speed = {kind: each and each.to_json() for kind, each in done.items()}
    latents, text = _fingerprints(run)
    facts = describe_encoding(run.storage, latents, text)
    contact = write_contact_sheet(config, run.storage, run.folder)
    summary = f"{facts['pairs']:,} pairs, {facts['prompts']:,} prompts"
    if facts["truncated_prompts"]:
        summary += f", {facts['truncated_prompts']:,} of them cut at {MAX_TOKENS} tokens"
    details = {"latents": latents, "text": text, "speed": speed, "contact": contact}
    details["versions"] = encode_check(run, version)
    return Outcome(summary, details)


# train


def train_spec(run: Run) -> TrainSpec | None:
    """The run's next round, pinned to the newest snapshot; None while something is not encoded."""
    from orchestration.rounds.series import check_parent, next_round
    from pipelines.encode.empty_prompt import text_version_without_empty_prompt
    from pipelines.encode.plan import with_absolute_paths
    from training.spec import Snapshot, TrainSpec, base_digest, stated_prediction
    from training.state.float32_base import float32_beside

    config = run.config
    if config.encode is None or config.train is None:
        raise ConfigError("training needs the sections `encode` (for the base model) and `train`")
    if pairs_table(run.storage).version is None or not encode_is_done(run, ""):
        return None
    latents, text = _fingerprints(run)
    versions = [pairs_table(run.storage).version, latents_table(run.storage, latents).version]
    newest = text_table(run.storage, text).version
    versions.append(newest if config.wants_empty_prompt else text_version_without_empty_prompt(run.storage, text))
    assert None not in versions
    base = with_absolute_paths(config.encode).source
    snapshot = Snapshot(versions[0], latents, versions[1], text, versions[2])  # type: ignore[arg-type]
    following = next_round(run, snapshot)
    pinned = following.snapshot
    if config.wants_empty_prompt and not has_empty_prompt(run.storage, pinned):  # of a training that did not want it
        pinned = replace(pinned, text_version=snapshot.text_version)
    spec = TrainSpec(
        storage_url=run.storage.url,
        run=config.name,
        base=base,
        base_digest=base_digest(base),
        seed=config.seed,
        config=config.train,
        snapshot=pinned,
        round=following.number,
        parent=following.parent,
        is_predicted_by_file=config.train.prediction_type == stated_prediction(base),
    )
    if spec.is_whole_in_16_bits:
        spec = replace(spec, beside=float32_beside(base))
    spec = as_begun(run, spec)
    check_parent(spec)
    return spec


def has_empty_prompt(storage: Storage, snapshot: Snapshot) -> bool:
    """Return whether a snapshot's text embeddings have that of ""."""
    import pyarrow.compute as pc

    from pipelines.dataset.pair import EMPTY_PROMPT_ID

    table = text_table(storage, snapshot.text_fingerprint, snapshot.text_version)
    return bool(table.read(["prompt_id"], pc.field("prompt_id") == EMPTY_PROMPT_ID).num_rows)


def as_begun(run: Run, spec: TrainSpec) -> TrainSpec:
    """Return a training as this run has it on storage: one of before December 2026 stays what it is.

    It is up to date where it has finished, and goes on where it has not, with the arithmetic that it began with.
    """
    from training.state.checkpoint_format import committed

    before, record = spec.as_before(), run.journal.record("train")
    recorded = None if record is None else record.key
    if spec.key in (before.key, recorded):
        return spec
    if recorded == before.key:
        return before
    is_begun_anew = committed(run.storage, spec.checkpoints)
    return before if not is_begun_anew and committed(run.storage, before.checkpoints) else spec


def train_key(run: Run) -> str | None:
    """All that shapes the weights."""
    spec = train_spec(run)
    return None if spec is None else spec.key


def train_refusal(run: Run) -> MapoError | None:
    """Which fingerprints training lacks, and what differs in those that are there; None before any ingest."""
    from pipelines.encode.stale import refusal

    if run.config.encode is None or pairs_table(run.storage).version is None:
        return None
    return refusal(run.config.encode, run.storage, include_empty_prompt=run.config.wants_empty_prompt)


def run_train(run: Run, key: str) -> Outcome:
    """MaPO on DeepSpeed ZeRO, from the last checkpoint of this key if there is one."""
    from orchestration.rounds.seen_pairs import count_pairs
    from orchestration.rounds.series import finish_round, forget_old_rounds, made_from
    from orchestration.stages.gpu_wait import GpuWait
    from orchestration.stages.training_view import TrainingView
    from training.launch import train
    from training.state.parent import check_parent_is_there

    spec = train_spec(run)
    assert spec is not None
    forget_old_rounds(run)
    check_parent_is_there(spec)
    if spec.parent is not None:
        run.say(f"train     round {spec.round} goes on from {spec.parent}")
    # From now on `mapo data gc` keeps what this training reads, however long it takes.
    run.storage.write(f"{run.folder}/snapshot.json", json.dumps(asdict(spec.snapshot)).encode())
    with TrainingView(spec, run.say) as view:
        trained = train(spec, view.watch, wait_for_gpus=GpuWait(spec).look)
    for worker in trained.workers:
        run.say(
            f"train     rank {worker['rank']} of world size {worker['world_size']}: trained on "
            f"{worker['num_pairs']:,} pairs, digest of their keys {worker['digest']}"
        )
    run.say(f"train     all ranks: digest of the pairs of every step {trained.digest}")
    summary = f"{trained.steps:,} steps of {spec.config.method}"
    summary += describe_change(trained.history["validations"], of_average=run.config.export.weights != "raw")
    if spec.round > 1:
        summary = f"round {spec.round}: {summary}"
    num_pairs, num_seen = count_pairs(spec, trained.steps)
    of_round = finish_round(run, spec, trained, num_pairs=num_pairs, num_seen=num_seen)
    return Outcome(summary, asdict(trained) | made_from(spec) | of_round)


# export


def export_key(run: Run) -> str | None:
    """The trained weights, and what is to be done with them."""
    weights = _exported_weights(run)
    return None if weights is None else digest(weights, run.config.export.push_to_hub, LINEAGE_VERSION)


def _exported_weights(run: Run) -> str | None:
    """What is to be written of the trained weights; where it is pushed to does not change a sample."""
    from orchestration.rounds.series import exported_of

    if run.config.encode is None:
        raise ConfigError("export needs the section `encode`: the base model is named there", "add `encode`")
    trained = run.journal.record("train")
    if trained is None:
        return None
    checkpoint, _ = exported_of(run, trained)
    if checkpoint is None:
        return None
    return digest(EXPORT_VERSION, trained.key, checkpoint, run.config.export.model_dump(exclude={"push_to_hub"}))


def export_is_done(run: Run, key: str) -> bool:
    """The record is of these weights and the folder is complete."""
    from training.export import marker

    record = run.journal.record("export")
    is_complete = run.storage.exists(f"{run.model}/{marker(run.config.export)}")
    return record is not None and record.key == key and is_complete


def run_export(run: Run, key: str) -> Outcome:
    """A checkpoint as a diffusers model."""
    from orchestration.rounds.record import LINEAGE, lineage_of
    from orchestration.rounds.series import exported_of, forget_old_rounds
    from orchestration.stages.model_card import model_card, trained_with
    from pipelines.dataset.layout import LATENTS
    from pipelines.encode.fingerprint import noted_parts
    from training.export import export_model
    from training.spec import base_digest

    trained = run.journal.record("train")
    assert trained is not None
    assert run.config.encode is not None
    source, (checkpoint, kind) = run.config.encode.source, exported_of(run, trained)
    assert checkpoint is not None
    if trained.details.get("base_digest", digest_now := base_digest(source)) != digest_now:
        raise ConfigError(
            f"{source.model} is not the base that the weights were trained from",
            "export with the `encode` section that they were trained with, or `mapo run` to train anew",
        )
    lineage = lineage_of(run, trained, checkpoint, kind)
    latents = noted_parts(run.storage, LATENTS, trained.details["snapshot"]["latents_fingerprint"])
    export_model(
        run.storage,
        checkpoint=checkpoint,
        source=source,
        target=run.model,
        card=model_card(run.config, trained, checkpoint, lineage["rounds"], weights=kind, latents=latents),
        config=run.config.export,
        lora=trained_with(run.config, trained).lora,
        beside={LINEAGE: json.dumps(lineage, indent=1).encode()},
        prediction_type=trained_with(run.config, trained).prediction_type,
    )
    forget_old_rounds(run)
    made = {"model": run.model, "weights": _exported_weights(run)}
    return Outcome(run.storage.uri(run.model), made | {"training": trained.key, "checkpoint": checkpoint, "kind": kind})


# evaluate


def evaluate_key(run: Run) -> str | None:
    """The exported model and how it is sampled."""
    exported = run.journal.record("export")
    if exported is None or run.config.encode is None:
        return None
    weights, settings = exported.details.get("weights", exported.key), run.config.evaluate.model_dump(mode="json")
    return digest(weights, settings, run.config.encode.resolution, run.config.seed)


def run_evaluate(run: Run, key: str) -> Outcome:
    """Samples and scores of base and aligned model."""
    from orchestration.stages.evaluation import evaluate

    trained, exported = run.journal.record("train"), run.journal.record("export")
    assert trained is not None
    assert exported is not None
    manifest = trained.details.get("manifests", {}).get(exported.details.get("checkpoint"))
    weights = [exported.details.get("weights", exported.key), manifest]
    version = trained.details["snapshot"]["pairs_version"]
    results = evaluate(run.config, run.storage, folder=run.folder, version=version, weights=weights)
    parts = [f"{s['name']} {s['base']['mean']:.2f} → {s['aligned']['mean']:.2f}" for s in results["scores"]]
    held_out = "" if results["split"] == VALIDATION else " of training prompts, for none is held out"
    return Outcome(", ".join([f"{results['num_samples']} samples each{held_out}", *parts]), results)


# report


def report_key(run: Run) -> str | None:
    """The records of all stages before it."""
    from orchestration.config import comparable

    records = [run.journal.record(name) for name in ("ingest", "encode", "train", "export", "evaluate")]
    made = [[r.stage, r.key, r.finished_at] for r in records if r]
    return digest(REPORT_VERSION, made, comparable(run.config))


def report_is_done(run: Run, key: str) -> bool:
    """The record is of these results and the page is there."""
    record = run.journal.record("report")
    return record is not None and record.key == key and run.storage.exists(run.report)


def run_report(run: Run, key: str) -> Outcome:
    """One self-contained page, and the index of all runs."""
    from orchestration.report.writer import write_report
    from orchestration.run.context import command_line

    return Outcome(run.storage.uri(write_report(run, command=command_line(), is_driven=False)))


def describe_change(validations: list[dict[str, float]], *, of_average: bool) -> str:
    """Return the held-out accuracy before and after a training, of the weights that will be exported."""
    from training.schedule import of_average as measured_on_average

    average = measured_on_average(validations) if of_average else None
    measured = average or validations
    if not measured:
        return ""
    first, last = (each["implicit_accuracy"] for each in (measured[0], measured[-1]))
    return f", held-out implicit accuracy{' of the average' if average else ''} {first:.2f} → {last:.2f}"


def describe_progress(progress: Progress) -> str:
    """A run's place in one line."""
    last = progress["last"]
    shown = [f"step {int(progress['step']):,} of {progress['max_steps']:,}"]
    for name, label in (("loss", "loss"), ("implicit_accuracy", "accuracy"), ("pairs_per_s", "pairs/s")):
        if name in last:
            shown.append(f"{label} {last[name]:.3g}")
    return ", ".join(shown)
