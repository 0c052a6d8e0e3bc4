"""The stage `evaluate`: samples of models for suites of prompts, their scores, and what the scores show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestration.run.context import Outcome, Run
from orchestration.run.journal import StageRecord
from orchestration.stages.stage import Look, Notes, digest
from pipelines.config import ALIGNED, CHECKPOINTS
from pipelines.dataset.layout import pairs_table

if TYPE_CHECKING:
    from orchestration.stages.evaluation import Evaluation
    from pipelines.suites.evaluation import EvaluationRecord

VERSION = 2
"""Version of what is recorded. Version 1 drew other noise and kept no tables; its evaluations are made anew."""
NOT_IN_KEY = {"batch_size", "num_workers"}
"""Settings of `evaluate` that say how the work is done, not what comes out."""


def look(run: Run) -> Look:
    """Compare the models, suites and scorers with those of the last evaluation."""
    from orchestration.stages.judged_models import models_identity, wanted_models
    from orchestration.stages.judged_suites import suites_identity

    trained, exported = run.journal.record("train"), run.journal.record("export")
    needs = {ALIGNED, CHECKPOINTS}.intersection(model for model in wanted_models(run) if isinstance(model, str))
    if run.config.encode is None or (needs and (exported is None or trained is None)):
        return Look(waits_for="export")
    evaluation = _evaluation(run, trained, exported)
    version = evaluation.held_out.version
    settings = run.config.evaluate.model_dump(mode="json", exclude=NOT_IN_KEY)
    key = digest(
        VERSION, models_identity(run, trained, exported), suites_identity(run.config), _scorers(run, evaluation),
        settings, run.config.encode.resolution, run.config.seed, version,
    )  # fmt: skip
    record = run.journal.record("evaluate")
    is_done = record is not None and record.key == key
    return Look(
        key,
        is_done,
        lambda: _evaluate(evaluation),
        amount=lambda: {"samples": sum(evaluation.missing.values())},
        notes=lambda: Notes() if is_done else _notes(record),
    )


def _evaluation(run: Run, trained: StageRecord | None, exported: StageRecord | None) -> Evaluation:
    """Return the evaluation of the last export; its pairs are those that were trained on, or the newest ones."""
    from orchestration.stages.evaluation import Evaluation

    if run.config.train is not None and trained is not None:
        version = trained.details["snapshot"]["pairs_version"]
    else:
        trained, exported, version = None, None, pairs_table(run.storage).version
    return Evaluation(run, trained, exported, version)


def _scorers(run: Run, evaluation: Evaluation) -> list[list[str]]:
    """Return name and fingerprint of every scorer."""
    from orchestration.stages.judged_scorers import judges_of

    judges = judges_of(run, evaluation.suites, evaluation.held_out)
    return sorted([judge.name, judge.fingerprint] for each in judges.values() for judge in each)


def _evaluate(evaluation: Evaluation) -> Outcome:
    record = evaluation.run()
    return Outcome(_summary(record), record.to_json())


def _summary(record: EvaluationRecord) -> str:
    """Return the first suite's numbers in one line: samples, and each scorer's means."""
    suite = next(iter(record.results.suites.values()))
    count = suite.num_prompts * suite.images_per_prompt
    parts = [f"{count} sample{'s' if count != 1 else ''} each"]
    for scorer in suite.scorers:
        means = [model.scores[scorer].mean for model in suite.models.values()]
        if len(means) <= 2 and None not in means:
            parts.append(f"{scorer} {' → '.join(f'{mean:.2f}' for mean in means)}")
    return ", ".join(parts)


def _notes(record: StageRecord | None) -> Notes:
    if record is None or record.details.get("version", 1) >= VERSION:
        return Notes()
    return Notes(
        remarks=(
            "an earlier version evaluated this model: its samples had other noise, so all of them are drawn and scored "
            "once more",
        )
    )


def estimate(run: Run, rows: int) -> Mapping[str, int]:
    """Bound the samples of all models from above, as far as the prompts are known."""
    from orchestration.stages.judged_models import wanted_models

    num_models = sum(model != CHECKPOINTS for model in wanted_models(run))
    return {"samples": num_models * run.config.evaluate.num_samples}


def check(run: Run) -> None:
    """Check models, prompts and scorers before anything starts."""
    from orchestration.stages.judged_models import check_models
    from orchestration.stages.judged_scorers import check_scorers
    from orchestration.stages.judged_suites import suites_without_pairs

    check_models(run)
    check_scorers(run, suites_without_pairs(run.config))
