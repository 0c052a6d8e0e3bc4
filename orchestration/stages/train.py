"""The stage `train`: a preference loss on DeepSpeed ZeRO, on a pinned snapshot of the encoded data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from orchestration.run.context import Outcome, Run
from orchestration.stages import encode
from orchestration.stages.stage import Look, Notes
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.pair import EMPTY_PROMPT_ID

if TYPE_CHECKING:
    from pipelines.dataset.storage import Storage
    from training.spec import Snapshot, TrainSpec


def look(run: Run) -> Look:
    """Pin the run's next round to the newest snapshot; exactly this training is then run and recorded."""
    from orchestration.rounds.extension import num_finished

    spec = train_spec(run)
    if spec is None:
        from pipelines.encode.stale import refusal

        assert run.config.encode
        if pairs_table(run.storage).version is None:
            return Look(waits_for="ingest")
        why = refusal(run.config.encode, run.storage, include_empty_prompt=run.config.wants_empty_prompt)
        return Look(waits_for="encode", refusal=why)
    is_done = num_finished(run, spec) >= spec.config.max_steps
    return Look(
        spec.key,
        is_done,
        lambda: _train(run, spec),
        amount=lambda: _amount(run, spec),
        notes=lambda: _notes(run, spec, is_done=is_done),
    )


def train_spec(run: Run) -> TrainSpec | None:
    """Return the run's next round, pinned to the newest snapshot; None while something is not encoded.

    Raises:
        ConfigError: A section is missing, or the round cannot start from its parent.
    """
    from orchestration.rounds.extension import as_extended
    from orchestration.rounds.series import check_parent, next_round
    from pipelines.encode.plan import with_absolute_paths
    from training.adapter_file import pinned_digest
    from training.spec import TrainSpec, base_digest, stated_prediction
    from training.state.float32_base import float32_weights_digest

    config = run.config
    if config.encode is None or config.train is None:
        raise ConfigError("training needs the sections `encode` (for the base model) and `train`")
    newest = _newest_snapshot(run)
    if newest is None:
        return None
    following = next_round(run, newest)
    pinned = following.snapshot
    if config.wants_empty_prompt and not _has_empty_prompt(run.storage, pinned):  # of a training that did not want it
        pinned = replace(pinned, text_version=newest.text_version)
    base = with_absolute_paths(config.encode).source
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
        adapter_digest=pinned_digest(run.storage, run.folder, config.train.lora) if following.parent is None else None,
        is_prediction_type_stated=config.train.prediction_type == stated_prediction(base),
    )
    if spec.is_whole_in_16_bits:
        spec = replace(spec, float32_digest=float32_weights_digest(base))
    spec = as_extended(run, as_begun(run, spec))
    check_parent(spec)
    return spec


def _newest_snapshot(run: Run) -> Snapshot | None:
    """Return the newest versions of the tables; None while something is not encoded."""
    from pipelines.encode.empty_prompt import text_version_without_empty_prompt
    from training.spec import Snapshot

    pairs_version = pairs_table(run.storage).version
    if pairs_version is None:
        return None
    prints = latents, text = encode.fingerprints(run)
    if not encode.is_done(run, pairs_version, prints):
        return None
    latents_version, text_version = latents_table(run.storage, latents).version, text_table(run.storage, text).version
    if not run.config.wants_empty_prompt:
        text_version = text_version_without_empty_prompt(run.storage, text)
    assert latents_version is not None
    assert text_version is not None
    return Snapshot(pairs_version, latents, latents_version, text, text_version)


def _has_empty_prompt(storage: Storage, snapshot: Snapshot) -> bool:
    """Return whether a snapshot's text embeddings include that of ""."""
    import pyarrow.compute as pc

    table = text_table(storage, snapshot.text_fingerprint, snapshot.text_version)
    return bool(table.read(["prompt_id"], pc.field("prompt_id") == EMPTY_PROMPT_ID).num_rows)


def as_begun(run: Run, spec: TrainSpec) -> TrainSpec:
    """Return a training as it is on the storage: one that an earlier version began keeps its identity.

    If it has finished it is up to date; otherwise it resumes with the arithmetic that it began with.
    """
    from training.state.checkpoint_format import list_checkpoints

    before, record = spec.as_legacy(), run.journal.record("train")
    recorded = None if record is None else record.key
    if spec.key in (before.key, recorded):
        return spec
    if recorded == before.key:
        return before
    is_begun_anew = list_checkpoints(run.storage, spec.checkpoints)
    return before if not is_begun_anew and list_checkpoints(run.storage, before.checkpoints) else spec


def _train(run: Run, spec: TrainSpec) -> Outcome:
    """Train from the last checkpoint of this key if there is one."""
    from orchestration.rounds.seen_pairs import count_pairs
    from orchestration.rounds.series import finish_round, forget_old_rounds, made_from
    from orchestration.stages.gpu_wait import GpuWait
    from orchestration.stages.training_view import TrainingView
    from training.adapter_file import keep_adapter
    from training.launch import train
    from training.state.parent import check_parent_is_there

    forget_old_rounds(run)
    check_parent_is_there(spec)
    keep_adapter(spec)
    if spec.parent is not None:
        run.say(f"train     round {spec.round} starts from {spec.parent}")
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


def describe_change(validations: Sequence[Mapping[str, float]], *, of_average: bool) -> str:
    """Return the held-out accuracy before and after a training, of the weights that will be exported."""
    from training.schedule import of_average as measured_on_average

    average = measured_on_average(validations) if of_average else None
    measured = average or validations
    if not measured:
        return ""
    first, last = (each["implicit_accuracy"] for each in (measured[0], measured[-1]))
    return f", held-out implicit accuracy{' of the average' if average else ''} {first:.2f} → {last:.2f}"


def check(run: Run) -> None:
    """Check before training that the result can be exported as configured.

    Raises:
        ConfigError: The training will not have what `export` needs, or the hub would not accept the model.
    """
    train, export = run.config.train, run.config.export
    if train is not None and export.weights == "ema" and train.ema is None:
        raise ConfigError("export.weights is ema, but training keeps no average", "set `train.ema: {decay: 0.9999}`")
    if train is not None and export.checkpoint == "best" and not train.keep_best:
        raise ConfigError("export.checkpoint is best, but train.keep_best is false", "set `train.keep_best: true`")
    if export.push_to_hub is not None:
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE or not get_token():
            raise ConfigError(
                f"export.push_to_hub is {export.push_to_hub}, which needs HF_TOKEN and no HF_HUB_OFFLINE",
                "set HF_TOKEN and unset HF_HUB_OFFLINE; or leave it out, and run `mapo export` with it later",
            )


def estimate(run: Run, rows: int) -> Mapping[str, int]:
    """Count the steps of a whole training, whose data is not known yet."""
    return _amount(run, None)


def _amount(run: Run, spec: TrainSpec | None) -> Mapping[str, int]:
    from training.state.checkpoint_format import list_checkpoints

    config = run.config.train
    assert config
    manifests = [] if spec is None else list_checkpoints(run.storage, spec.checkpoints)
    steps = max(0, config.max_steps - (manifests[-1].step if manifests else 0))
    work = {"steps": steps, "of_steps": config.max_steps, "pairs": steps * config.global_batch_size}
    return work | {"workers": config.worker_range[0]}


def notes(run: Run) -> Notes:
    """Return the settings of a training that is not pinned yet."""
    return _notes(run, None, is_done=False)


def _notes(run: Run, spec: TrainSpec | None, *, is_done: bool) -> Notes:
    from orchestration.rounds.extension import extension_notes
    from orchestration.stages.training_kinds import kind_notes
    from orchestration.stages.training_notes import training_notes, training_settings, version_notes

    config = run.config.train
    assert config
    if spec is None:
        return Notes(training_settings(config), tuple(training_notes(config)))
    found = [*version_notes(spec), *extension_notes(run, spec), *kind_notes(spec)]
    if is_done:
        return Notes(remarks=tuple(found))
    return Notes(training_settings(config, spec.config), (*training_notes(config, spec.config), *found))
