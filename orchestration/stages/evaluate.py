"""The stage `evaluate`: samples of models for suites of prompts, their scores, and what the scores show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestration.run.context import EVALUATION, RESULTS, Outcome, Run
from orchestration.run.journal import StageRecord
from orchestration.stages.stage import Look, Notes, digest
from pipelines.config import ALIGNED, CHECKPOINTS, EvaluateConfig
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.values import JsonObject

if TYPE_CHECKING:
    from orchestration.stages.evaluation import Evaluation
    from pipelines.suites.evaluation import EvaluationRecord
    from pipelines.suites.suite import Suite

VERSION = 2
"""Version of what is recorded. Version 1 drew other noise and kept no tables; see `_look_of_before`."""
BEFORE = {"num_samples": 64, "num_inference_steps": 30, "guidance_scale": 5.0, "batch_size": 16, "scorers": []}
"""The settings of version 1, with their defaults."""
NOT_IN_KEY: Any = {"batch_size": True, "num_workers": True, "prompts": {"path"}}
"""Settings of `evaluate` that say how the work is done, not what comes out; prompts count by their content."""


def look(run: Run) -> Look:
    """Compare the models, suites and scorers with those of the last evaluation."""
    from orchestration.stages.judged_models import models_identity, wanted_models
    from orchestration.stages.judged_scorers import scorers_identity
    from orchestration.stages.judged_suites import suites_identity

    trained, exported = run.journal.record("train"), run.journal.record("export")
    needs = {ALIGNED, CHECKPOINTS}.intersection(model for model in wanted_models(run) if isinstance(model, str))
    if run.config.encode is None or (needs and (exported is None or trained is None)):
        return Look(waits_for="export")
    record = run.journal.record("evaluate")
    if exported is not None and (before := _look_of_before(run, record, exported)) is not None:
        return before
    evaluation = evaluation_of(run, trained, exported)
    version = evaluation.held_out.version
    settings = run.config.evaluate.model_dump(mode="json", exclude=NOT_IN_KEY, exclude_defaults=True)
    key = digest(
        VERSION, models_identity(run, trained, exported), suites_identity(run.config),
        scorers_identity(run, evaluation.held_out),
        settings, run.config.encode.resolution, run.config.seed, version,
    )  # fmt: skip
    is_done = record is not None and record.key == key and _is_current(run, record)
    return Look(
        key,
        is_done,
        lambda: _evaluate(evaluation),
        amount=lambda: _amount(run, evaluation),
        notes=lambda: Notes(remarks=_waits_for(record)) if is_done else _notes(run, record, evaluation),
    )


def _look_of_before(run: Run, record: StageRecord | None, exported: StageRecord) -> Look | None:
    """Return a look that finds the stage done, if version 1 evaluated this very model with these very settings."""
    settings = settings_before(run.config.evaluate)
    if record is None or "version" in record.details or settings is None or run.config.encode is None:
        return None
    weights = exported.details.get("weights", exported.key)
    key = digest(weights, settings, run.config.encode.resolution, run.config.seed)
    return Look(key, is_done=True) if record.key == key else None


def settings_before(config: EvaluateConfig) -> JsonObject | None:
    """Return the settings as version 1 recorded them; None if the configuration asks for something that it had not."""
    found, defaults = config.model_dump(mode="json"), EvaluateConfig().model_dump(mode="json")
    if any(found[key] != defaults[key] for key in found.keys() - BEFORE.keys()):
        return None
    return {key: default if found[key] is None else found[key] for key, default in BEFORE.items()}


def evaluation_of(run: Run, trained: StageRecord | None, exported: StageRecord | None) -> Evaluation:
    """Return the evaluation of the last export; its pairs are those that were trained on, or the newest ones."""
    from orchestration.stages.evaluation import Evaluation

    if run.config.train is not None and trained is not None:
        version = trained.details["snapshot"]["pairs_version"]
    else:
        trained, exported, version = None, None, pairs_table(run.storage).version
    return Evaluation(run, trained, exported, version)


def _is_current(run: Run, record: StageRecord) -> bool:
    """Return whether an evaluation's results are there, and no scores were imported since for a judge without any."""
    from orchestration.stages.missing_judges import have_scores_come

    return _are_results_there(run, record) and not have_scores_come(run.storage, record)


def _waits_for(record: StageRecord | None) -> tuple[str, ...]:
    """Say which judges had no numbers when this was evaluated."""
    from orchestration.stages.missing_judges import recorded

    return tuple(f"{name} has {each.words}" for name, each in recorded(record))


def _are_results_there(run: Run, record: StageRecord) -> bool:
    """Return whether `results.json` is what was recorded: a later evaluation that failed may have replaced it."""
    data = run.storage.read_if_there(f"{run.folder}/{EVALUATION}/{RESULTS}")
    try:
        return data is not None and json.loads(data) == record.details.get("results")
    except ValueError:
        return False


def _amount(run: Run, evaluation: Evaluation) -> Mapping[str, int]:
    """Count the missing samples if that needs neither a cluster nor a download; else bound them from above."""
    return {"samples": sum(evaluation.missing.values())} if evaluation.is_sampling_known else estimate(run, 0)


def _evaluate(evaluation: Evaluation) -> Outcome:
    record = evaluation.run()
    return Outcome(_summary(record), record.to_json())


def _summary(record: EvaluationRecord) -> str:
    """Return the first suite's numbers in one line: samples, and each scorer's means."""
    from orchestration.stages.judged_suites import NONE_HELD_OUT

    suite = next(iter(record.results.suites.values()))
    count = suite.num_prompts * suite.images_per_prompt
    parts = [f"{count} sample{'s' if count != 1 else ''} each"]
    if NONE_HELD_OUT in suite.about:
        parts[0] += " of training prompts (none are held out)"
    for scorer in suite.scorers:
        means = [model.scores[scorer].mean for model in suite.models.values()]
        if len(means) <= 2 and None not in means:
            parts.append(f"{scorer} {' → '.join(f'{mean:.2f}' for mean in means)}")
    if missing := dict.fromkeys(each.name for every in record.results.suites.values() for each in every.missing):
        parts.append(f"without {', '.join(missing)}")
    return ", ".join(parts)


def _without_scores(run: Run, suites: Sequence[Suite]) -> tuple[str, ...]:
    """Say which judges will have no numbers, whatever images are drawn."""
    from orchestration.stages.missing_judges import planned, remarks

    return remarks([(suite, planned(run, suite, None)) for suite in suites])


def _notes(run: Run, record: StageRecord | None, evaluation: Evaluation) -> Notes:
    remarks = evaluation.remarks() if evaluation.is_sampling_known else _without_scores(run, evaluation.suites)
    if record is None or record.details.get("version", 1) >= VERSION:
        return Notes(remarks=remarks)
    again = (
        "an earlier version evaluated this model: its samples had other noise, so all of them are drawn and scored "
        "once more"
    )
    return Notes(remarks=(again, *remarks))


def notes(run: Run) -> Notes:
    """Say what drawing every sample would take of an H200, if the base is on this machine."""
    from orchestration.stages.evaluation_cost import bounded_hours, cost_line
    from orchestration.stages.judged_suites import planned_suites
    from pipelines.samples.plan import unit_size

    encode, suites = run.config.encode, planned_suites(run.config)
    hours = None if encode is None else bounded_hours(encode.source, suites, encode.resolution)
    told = _without_scores(run, suites)
    if not hours:
        return Notes(remarks=told)
    size, models = unit_size(run.config.evaluate.batch_size), _num_models(run)
    units = sum(-(-len(suite.prompts) * suite.images_per_prompt // size) for suite in suites)
    return Notes(remarks=(cost_line(models * units, models * hours), *told))


def estimate(run: Run, rows: int) -> Mapping[str, int]:
    """Bound the samples of all models but checkpoints from above."""
    from orchestration.stages.judged_suites import max_samples

    return {"samples": _num_models(run) * max_samples(run.config)}


def _num_models(run: Run) -> int:
    """Count the models but checkpoints, of which there may be any number."""
    from orchestration.stages.judged_models import wanted_models

    return sum(model != CHECKPOINTS for model in wanted_models(run))


def check(run: Run) -> None:
    """Check models, prompts and scorers before anything starts."""
    from orchestration.stages.judged_models import check_models
    from orchestration.stages.judged_scorers import check_scorers

    check_models(run)
    check_scorers(run)
