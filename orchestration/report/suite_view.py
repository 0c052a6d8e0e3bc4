"""View of a suite's results: the rows, plots and curves that the page shows; `evaluation.html.j2` has the markup."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from orchestration.report.charts import Chart, ChartSpec, IntervalPlot, Trace, draw, interval_plot
from orchestration.report.evaluation import own_model
from orchestration.report.records import EvaluationSection, Interval
from orchestration.report.vote_rows import VoteRow, vote_rows
from pipelines.suites.gallery import step_of
from pipelines.suites.results import Comparison, Judge, ModelScore, SuiteResult, TagDifference, TagScore

MAX_FINDINGS = 6  # in the head of the page
BETTER, WORSE = "rose", "fell"  # classes of the style sheet


T = TypeVar("T")


@dataclass(frozen=True)
class ScoreRow:
    """One model's numbers of one score.

    Args:
        model: The model.
        is_ours: Whether it is the run's own model.
        score: Its mean.
        comparison: Its difference; None for the model that is compared with.
        verdict: `rose` if it is better, `fell` if it is worse, empty if no difference
            is shown, and for scores that describe.
    """

    model: str
    is_ours: bool
    score: ModelScore
    comparison: Comparison | None
    verdict: str


@dataclass(frozen=True)
class ScoreGroup:
    """All models' numbers of one score."""

    scorer: str
    judge: Judge
    is_primary: bool
    rows: Sequence[ScoreRow]


@dataclass(frozen=True)
class TagRow:
    """One score of one tag: each model's mean, and the difference of the run's own model."""

    scorer: str
    tag: str
    num_prompts: int
    scores: Sequence[TagScore | None]
    difference: TagDifference | None


@dataclass(frozen=True)
class SuiteView:
    """Suite as the page shows it.

    Args:
        name: Its name.
        result: Its results.
        models: The models that are no checkpoints, the one that is compared with first.
        ours: The run's own model.
        groups: The scores, primary ones first.
        plots: The intervals of scores that have numbers.
        curves: A learning curve for each score, if checkpoints were judged.
        tags: The scores by tag.
        silent: Scores without a number.
        votes: The votes of people on each model, if they are asked for.
    """

    name: str
    result: SuiteResult
    models: Sequence[str]
    ours: str | None
    groups: Sequence[ScoreGroup]
    plots: Sequence[IntervalPlot]
    curves: Sequence[Chart]
    tags: Sequence[TagRow]
    silent: Sequence[str]
    votes: Sequence[VoteRow]


@dataclass(frozen=True)
class Headline:
    """Change of a score from one model to the run's own, for the head of the page."""

    name: str
    before: float
    after: float
    comparison: Comparison
    verdict: str


def suite_views(section: EvaluationSection | None) -> list[SuiteView]:
    """Return the view of each suite."""
    if section is None:
        return []
    judges = section.record.judges
    return [_view(name, result, judges) for name, result in section.record.results.suites.items()]


def sampling_of(views: Sequence[SuiteView]) -> list[tuple[str, str]]:
    """Return each way of sampling in words, with the names of its suites; no names if there is one way alone."""
    found: dict[str, list[str]] = {}
    for view in views:
        steps, guidance = view.result.num_inference_steps, view.result.guidance_scale
        if steps is not None:
            words = f"{steps:,} denoising step{'' if steps == 1 else 's'}, guidance {guidance}"
            found.setdefault(words, []).append(view.name)
    if len(found) == 1:
        return [(words, "") for words in found]
    return [(words, ", ".join(names)) for words, names in found.items()]


def headlines(views: Sequence[SuiteView]) -> list[Headline]:
    """Return what the head of the page says: of the first primary scores of all suites; if there is none, of any."""
    groups = [(view, group) for view in views for group in view.groups]
    groups = [each for each in groups if each[1].is_primary] or groups
    return _present(_headline(view, group, is_only=len(views) == 1) for view, group in groups)[:MAX_FINDINGS]


def _headline(view: SuiteView, group: ScoreGroup, *, is_only: bool) -> Headline | None:
    """Return a score of both models; None if one has none."""
    rows = {row.model: row for row in group.rows}
    before, after = rows.get(view.result.against_model), rows.get(view.ours or "")
    if before is None or after is None or after.comparison is None:
        return None
    if (
        before.score.mean is None
        or after.score.mean is None
        or not (_is_known(before.score) and _is_known(after.score))
    ):
        return None
    name = group.scorer if is_only else f"{view.name}: {group.scorer}"
    return Headline(name, before.score.mean, after.score.mean, after.comparison, after.verdict)


def verdict(comparison: Comparison | None, judge: Judge) -> str:
    """Return BETTER or WORSE if a difference is shown, else nothing."""
    if comparison is None or comparison.difference is None or not comparison.is_shown:
        return ""
    return BETTER if (comparison.difference > 0) == judge.higher_is_better else WORSE


def _view(name: str, result: SuiteResult, judges: Mapping[str, Judge]) -> SuiteView:
    ours = own_model(result)
    named = [model for model in result.models if step_of(model) is None]
    models = sorted(named, key=lambda model: model != result.against_model)
    scorers = sorted(result.scorers, key=lambda scorer: scorer not in result.primary)
    groups = [_group(scorer, models, result, ours, judges.get(scorer, Judge())) for scorer in scorers]
    return SuiteView(
        name=name,
        result=result,
        models=models,
        ours=ours,
        groups=groups,
        plots=_present(_plot(group) for group in groups),
        curves=_present(_curve(scorer, result) for scorer in scorers),
        tags=[row for scorer in scorers for row in _tag_rows(scorer, models, result, ours)],
        silent=[group.scorer for group in groups if _plot(group) is None],
        votes=vote_rows(result, models, ours),
    )


def _present(found: Iterable[T | None]) -> list[T]:
    return [each for each in found if each is not None]


def _group(scorer: str, models: Sequence[str], result: SuiteResult, ours: str | None, judge: Judge) -> ScoreGroup:
    rows, is_primary = [], scorer in result.primary
    for model in models:
        if (score := result.models[model].scores.get(scorer)) is not None:
            comparison = result.against.get(model, {}).get(scorer)
            said = verdict(comparison, judge) if is_primary else ""  # the others describe
            rows.append(ScoreRow(model, model == ours, score, comparison, said))
    return ScoreGroup(scorer, judge, is_primary, rows)


def _plot(group: ScoreGroup) -> IntervalPlot | None:
    intervals = [
        (row.model, Interval(row.score.low or 0.0, row.score.mean or 0.0, row.score.high or 0.0), row.is_ours)
        for row in group.rows
        if _is_known(row.score)
    ]
    return interval_plot(group.scorer, intervals) if intervals else None


def _curve(scorer: str, result: SuiteResult) -> Chart | None:
    """Return the learning curve of a score over the checkpoints; its dotted line is the model that is compared with."""
    points = [
        (float(step), found.mean)
        for model, each in result.models.items()
        if (step := step_of(model)) is not None
        and (found := each.scores.get(scorer)) is not None
        and found.mean is not None
    ]
    if not points:
        return None
    points.sort()
    reference = result.models.get(result.against_model)
    score = reference.scores.get(scorer) if reference and step_of(result.against_model) is None else None
    guide = score.mean if score else None
    traces = [Trace("mean", "line", 0, points), Trace("mean of a checkpoint", "marks", 0, points)]
    return draw(ChartSpec(scorer, {}, guide=guide), traces)


def _tag_rows(scorer: str, models: Sequence[str], result: SuiteResult, ours: str | None) -> list[TagRow]:
    comparison = result.against.get(ours or "", {}).get(scorer)
    differences = comparison.tags if comparison else {}
    rows = []
    for tag, num_prompts in result.tags.items():
        scores = [result.models[model].tags.get(tag, {}).get(scorer) for model in models]
        if any(scores):
            rows.append(TagRow(scorer, tag, num_prompts, scores, differences.get(tag)))
    return rows


def _is_known(score: ModelScore) -> bool:
    """Return whether a mean and its interval are numbers; a version before this one may have recorded NaN."""
    ends = (score.low, score.mean, score.high)
    return all(each is not None and math.isfinite(each) for each in ends)
