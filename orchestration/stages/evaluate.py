"""The stage `evaluate`: samples of the base and of the exported model, and their scores."""

from __future__ import annotations

from collections.abc import Mapping

from orchestration.run.context import Outcome, Run
from orchestration.run.journal import StageRecord
from orchestration.stages.stage import Look, digest
from pipelines.dataset.pair import VALIDATION


def look(run: Run) -> Look:
    """Compare the exported model, and how it is sampled, with the last evaluation."""
    trained, exported = run.journal.record("train"), run.journal.record("export")
    if exported is None or run.config.encode is None:
        return Look(waits_for="export")
    weights, settings = exported.details.get("weights", exported.key), run.config.evaluate.model_dump(mode="json")
    key, record = (
        digest(weights, settings, run.config.encode.resolution, run.config.seed),
        run.journal.record("evaluate"),
    )
    is_done = record is not None and record.key == key
    return Look(key, is_done, lambda: _evaluate(run, trained, exported), amount=lambda: estimate(run, 0))


def _evaluate(run: Run, trained: StageRecord | None, exported: StageRecord) -> Outcome:
    from orchestration.stages.model_samples import evaluate

    assert trained is not None
    manifest = trained.details.get("manifests", {}).get(exported.details.get("checkpoint"))
    weights = [exported.details.get("weights", exported.key), manifest]
    version = trained.details["snapshot"]["pairs_version"]
    results = evaluate(run.config, run.storage, folder=run.folder, version=version, weights=weights)
    parts = [f"{s['name']} {s['base']['mean']:.2f} → {s['aligned']['mean']:.2f}" for s in results["scores"]]
    held_out = "" if results["split"] == VALIDATION else " of training prompts (none are held out)"
    return Outcome(", ".join([f"{results['num_samples']} samples each{held_out}", *parts]), results)


def estimate(run: Run, rows: int) -> Mapping[str, int]:
    """Count the samples of both models."""
    return {"samples": 2 * run.config.evaluate.num_samples}
