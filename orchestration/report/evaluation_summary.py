"""Scores and samples of an evaluation in a run's summary: of the run's own model and of the one it is compared with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestration.report.evaluation import own_model, result_of
from orchestration.report.records import EvaluationSection, Interval
from pipelines.config import ALIGNED, BASE
from pipelines.suites.gallery import SPECIMEN
from pipelines.suites.results import ModelScore

MAX_SAMPLES, MAX_SCORES = 12, 12
MAX_PROMPT = 200  # characters


@dataclass(frozen=True)
class ScoreSummary:
    """Score of the model that is compared with, as a rule the base, and of the run's own model."""

    name: str
    base: Interval
    aligned: Interval


@dataclass(frozen=True)
class Sample:
    """Prompt drawn by the model that is compared with and by the run's own; files in the folder of the evaluation.

    `seed` is the number of the image among those of the prompt; before there were suites, the seed of its noise.
    """

    prompt: str
    seed: int
    base: str
    aligned: str

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Sample":
        """Return the sample that a summary recorded."""
        return Sample(data["prompt"], data["seed"], data["base"], data["aligned"])


def score_summaries(evaluation: EvaluationSection | None) -> list[ScoreSummary]:
    """Return the scores of the run's own model and of the one that it is compared with, primary ones first."""
    suites = evaluation.record.results.suites if evaluation else {}
    found = []
    for name, result in suites.items():
        ours = own_model(result)
        if ours is None or result.against_model not in result.models:
            continue
        sides = [result.models[model].scores for model in (result.against_model, ours)]
        for scorer in sorted(result.scorers, key=lambda each: each not in result.primary):
            base, aligned = (_interval(side.get(scorer)) for side in sides)
            if base is not None and aligned is not None:
                label = scorer if len(suites) == 1 else f"{name}: {scorer}"
                is_usual = (result.against_model, ours) == (BASE, ALIGNED)
                label = label if is_usual else f"{label} ({ours} against {result.against_model})"
                found.append(ScoreSummary(label, base, aligned))
    return found[:MAX_SCORES]


def sample_summaries(evaluation: EvaluationSection | None) -> list[Sample]:
    """Return images of the run's own model and of the one that it is compared with; those that no score chose first."""
    record = evaluation.record if evaluation else None
    found = []
    for entry in sorted(record.gallery, key=lambda each: set(each.why) != {SPECIMEN}) if record else ():
        result = result_of(record.results, entry.suite) if record else None
        base, ours = (result.against_model, own_model(result)) if result else (None, None)
        if base in entry.images and ours in entry.images:
            names = [entry.images[str(model)].name for model in (base, ours)]
            found.append(Sample(entry.prompt[:MAX_PROMPT], entry.index, *names))
    return found[:MAX_SAMPLES]


def _interval(score: ModelScore | None) -> Interval | None:
    """Return a mean with its interval; None unless all three are numbers."""
    ends = (score.low, score.mean, score.high) if score else (None,)
    known = [each for each in ends if each is not None and math.isfinite(each)]
    return Interval(*known) if len(known) == 3 else None
