"""Evaluation of a run as its record has it, whichever version wrote it, and which of its models is the run's own."""

from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from orchestration.report.records import EvaluationSection
from pipelines.config import ALIGNED, BASE
from pipelines.suites.evaluation import EvaluationRecord
from pipelines.suites.gallery import SPECIMEN, GalleryEntry, GalleryImage, step_of
from pipelines.suites.registry import HELD_OUT
from pipelines.suites.results import Comparison, Judge, ModelResult, ModelScore, Results, SuiteResult

MAX_PAGE_IMAGES = 144
"""Images of the gallery on the page: at 60 KB each, 9 MB."""


def evaluation_section(details: Mapping[str, Any], *, has_samples: bool) -> EvaluationSection | None:
    """Return the evaluation in a stage's details; None if they are damaged.

    Args:
        details: What the stage recorded, in this version or an earlier one.
        has_samples: Whether its images are there; without them there is no gallery.
    """
    is_former = "version" not in details
    try:
        record = _of_former(details) if is_former else EvaluationRecord.from_json(details)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not has_samples:
        record = EvaluationRecord(**{**vars(record), "gallery": ()})
    return EvaluationSection(record, is_former)


def own_model(result: SuiteResult) -> str | None:
    """Return the model that a suite is about: `aligned`, else the last that is named, else the last checkpoint.

    None if there is none besides the one that is compared with.
    """
    others = [name for name in result.models if name != result.against_model]
    if ALIGNED in others:
        return ALIGNED
    named = [name for name in others if step_of(name) is None]
    checkpoints = sorted((name for name in others if name not in named), key=lambda name: step_of(name) or 0)
    return next(iter([*reversed(named), *reversed(checkpoints)]), None)


def result_of(results: Results, suite: str) -> SuiteResult | None:
    """Return the results of a gallery's suite, which a configuration may have named with its version."""
    return next((found for name, found in results.suites.items() if name.partition("@")[0] == suite), None)


def shown_gallery(section: EvaluationSection | None) -> tuple[GalleryEntry, ...]:
    """Return the entries of the gallery that the page has room for: of each suite the first ones."""
    gallery = section.record.gallery if section else ()
    if section is None or section.is_former:
        return gallery
    seen: Counter[str] = Counter()
    ranks = []
    for entry in gallery:
        ranks.append(seen[entry.suite])
        seen[entry.suite] += 1
    turns = sorted(range(len(gallery)), key=lambda place: ranks[place])  # the first ones of all suites, then the next
    sizes = accumulate(len(gallery[place].images) for place in turns)
    chosen = {place for place, size in zip(turns, sizes, strict=True) if size <= MAX_PAGE_IMAGES}
    return tuple(entry for place, entry in enumerate(gallery) if place in chosen)


def _of_former(details: Mapping[str, Any]) -> EvaluationRecord:
    """Return the record of a version that knew two models and the intervals of their means alone."""
    scores = {str(each["name"]): each for each in details["scores"]}
    models = {
        model: ModelResult({name: _score(each[model], details["num_samples"]) for name, each in scores.items()})
        for model in (BASE, ALIGNED)
    }
    result = SuiteResult(
        protocol="of an earlier version",
        num_prompts=len({sample["prompt"] for sample in details["samples"]}),
        images_per_prompt=1,
        models=models,
        against={ALIGNED: {name: _change(each[BASE], each[ALIGNED]) for name, each in scores.items()}},
        against_model=BASE,
        scorers=tuple(scores),
        primary=tuple(scores),
        num_inference_steps=details["num_inference_steps"],
        guidance_scale=details["guidance_scale"],
    )
    gallery = tuple(
        GalleryEntry(
            HELD_OUT, "", str(each["prompt"]), int(each["seed"]), (SPECIMEN,),
            {model: GalleryImage(str(each[model]), {}) for model in (BASE, ALIGNED)},
        )
        for each in details["samples"]
    )  # fmt: skip
    judges = {name: Judge(description=str(each["description"])) for name, each in scores.items()}
    return EvaluationRecord(Results({HELD_OUT: result}), gallery=gallery, judges=judges)


def _score(data: Mapping[str, float], num_samples: int) -> ModelScore:
    """Return a mean over samples with its interval."""
    return ModelScore(
        mean=float(data["mean"]), median=None, low=float(data["low"]), high=float(data["high"]), n=num_samples,
        num_images=num_samples,
    )  # fmt: skip


def _change(before: Mapping[str, float], after: Mapping[str, float]) -> Comparison:
    """Return the change of a mean, in words that follow from the two intervals."""
    change = after["mean"] - before["mean"]
    is_clear = before["high"] < after["low"] or after["high"] < before["low"]
    words = "the intervals do not overlap" if is_clear else "no clear change: the intervals overlap"
    nothing = (None,) * 5
    return Comparison(float(change), *nothing, ties=0, n=0, p_value=0.0 if is_clear else 1.0, words=words)
