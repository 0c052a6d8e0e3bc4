"""The stage `export`: a checkpoint of the last finished training, exported as a diffusers model."""

from __future__ import annotations

import json

from orchestration.run.context import Outcome, Run
from orchestration.run.journal import StageRecord
from orchestration.stages.stage import Look, digest
from pipelines.dataset.errors import ConfigError

EXPORT_VERSION = 2
LINEAGE_VERSION = 1


def look(run: Run) -> Look:
    """Compare the trained weights and the export settings with the last export."""
    from orchestration.rounds.series import exported_of
    from training.export import marker

    if run.config.encode is None:
        raise ConfigError("export needs the section `encode`, which names the base model", "add the section `encode`")
    trained = run.journal.record("train")
    checkpoint, kind = (None, "") if trained is None else exported_of(run, trained)
    if trained is None or checkpoint is None:
        return Look(waits_for="train")
    settings = run.config.export.model_dump(exclude={"push_to_hub"})  # where it is pushed to does not change a sample
    weights = digest(EXPORT_VERSION, trained.key, checkpoint, settings)
    key = digest(weights, run.config.export.push_to_hub, LINEAGE_VERSION)
    record = run.journal.record("export")
    is_whole = run.storage.exists(f"{run.model}/{marker(run.config.export)}")
    is_done = record is not None and record.key == key and is_whole
    return Look(key, is_done, lambda: _export(run, trained, checkpoint, kind, weights))


def _export(run: Run, trained: StageRecord, checkpoint: str, kind: str, weights: str) -> Outcome:
    """Write a checkpoint as a diffusers model.

    Args:
        run: The run.
        trained: The record of the training.
        checkpoint: The folder of the checkpoint.
        kind: Which of its weights, `raw` or `ema`.
        weights: Digest of the exported weights.
    """
    from orchestration.rounds.record import LINEAGE, lineage_of
    from orchestration.rounds.series import forget_old_rounds
    from orchestration.stages.model_card import model_card, trained_with
    from pipelines.dataset.layout import LATENTS
    from pipelines.encode.fingerprint import noted_parts
    from training.export import export_model
    from training.spec import base_digest

    assert run.config.encode is not None
    source = run.config.encode.source
    if trained.details.get("base_digest", digest_now := base_digest(source)) != digest_now:
        raise ConfigError(
            f"{source.model} is not the base that the weights were trained from",
            "export with the same `encode` section as in training, or train again with `mapo run`",
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
        extra_files={LINEAGE: json.dumps(lineage, indent=1).encode()},
        prediction_type=trained_with(run.config, trained).prediction_type,
    )
    forget_old_rounds(run)
    made = {"model": run.model, "weights": weights}
    return Outcome(run.storage.uri(run.model), made | {"training": trained.key, "checkpoint": checkpoint, "kind": kind})
