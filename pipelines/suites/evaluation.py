"""Record of the stage `evaluate`: results, gallery, audit and cost, and what a reader must be warned of."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.suites.audit import JudgeAgreement, circular_judges
from pipelines.suites.gallery import GalleryEntry
from pipelines.suites.plain import fields_from, fields_of
from pipelines.suites.results import Judge, Results, SuiteResult

EVALUATION_VERSION = 2
"""Version of the details that the stage records; those of before have none."""


@dataclass(frozen=True)
class EvaluationCost:
    """What an evaluation took.

    Args:
        images: Images drawn; those that were there already do not count.
        gpu_hours: None where no GPU was used.
        seconds: Duration.
    """

    images: int
    gpu_hours: float | None
    seconds: float


@dataclass(frozen=True)
class EvaluationRecord:
    """Details of the stage `evaluate`.

    Args:
        results: Content of `results.json`.
        gallery: The images to look at, below the run's `evaluation/`.
        audit: Agreement of each scorer with the held-out human pairs.
        judges: The scorers.
        warnings: What a reader must know; see `warnings_of`.
        cost: None if it is not known.
    """

    results: Results
    gallery: tuple[GalleryEntry, ...] = ()
    audit: Mapping[str, JudgeAgreement] = field(default_factory=dict)
    judges: Mapping[str, Judge] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    cost: EvaluationCost | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data; every number in it is finite."""
        return {"version": EVALUATION_VERSION, **fields_of(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "EvaluationRecord":
        """Return the record in a stage's details; fields of later versions are ignored.

        Raises:
            ValueError: A field is missing or has the wrong shape, or the details are of before this record.
        """
        if not isinstance(data.get("version"), int) or data["version"] < EVALUATION_VERSION:
            raise ValueError(f"version {data.get('version')}, not {EVALUATION_VERSION}")
        return fields_from(EvaluationRecord, data)


def warnings_of(results: Results, judges: Mapping[str, Judge], *, made_by: Collection[str] = ()) -> tuple[str, ...]:
    """Return what a reader of the results must know, one sentence each, the gravest first.

    Args:
        results: The results.
        judges: The scorers.
        made_by: Scorers that helped to make the training pairs.
    """
    scorers = dict.fromkeys(scorer for suite in results.suites.values() for scorer in suite.scorers)
    circular = [
        f"{name} helped to make the training pairs: a gain in it shows that training works, not that people prefer the"
        " images"
        for name in circular_judges(scorers, made_by)
    ]
    unverified = [name for name in scorers if name in judges and judges[name].verified is False]
    found = [*circular, *(each for name, suite in results.suites.items() for each in _of_suite(name, suite))]
    found += [f"licence of {name}: {judges[name].licence}" for name in scorers if _restricts(judges.get(name, Judge()))]
    if unverified:
        found.append(f"not verified against a published value: {', '.join(unverified)}")
    return tuple(found)


def _restricts(judge: Judge) -> bool:
    """Return whether a licence forbids commercial use, or demands more than attribution."""
    return re.search(r"\b(AGPL|GPL|NC)\b|non-?commercial|research", judge.licence, re.IGNORECASE) is not None


def _of_suite(name: str, suite: SuiteResult) -> Iterator[str]:
    if suite.leaked_prompts:
        yield (
            f"suite {name}: {suite.leaked_prompts:,} of its {suite.num_prompts:,} prompts"
            f" ({suite.leaked_prompts / suite.num_prompts:.1%}) are prompts of training pairs: a gain on those need not"
            " show on prompts that are new to the model"
        )
    yield from (f"suite {name} has {each.words}" for each in suite.missing)
    yield from _of_votes(name, suite)
    if suite.deviations:
        yield f"suite {name} departs from its protocol: {'; '.join(suite.deviations)}"
    for model, by_scorer in suite.failures.items():
        listed = (
            f"{scorer} of {sum(reasons.values()):,} ({', '.join(f'{why} {count:,}' for why, count in reasons.items())})"
            for scorer, reasons in by_scorer.items()
        )
        images = suite.num_prompts * suite.images_per_prompt
        yield f"suite {name}: of the {images:,} images of {model} there is no score by {', '.join(listed)}"
    for scorer, cut in suite.cut.items():
        if cut.prompt_ratio > 0:
            yield (
                f"suite {name}: {scorer} reads {cut.prompt_ratio:.1%} of the prompts only in part"
                f" (on average {cut.token_ratio:.1%} of a prompt's tokens are cut)"
            )


def _of_votes(name: str, suite: SuiteResult) -> Iterator[str]:
    if suite.votes is None:
        return
    if not suite.votes.num_votes:
        yield f"suite {name}: there are no votes on its images; `mapo scores vote` collects them"
    if suite.votes.left_out:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in suite.votes.left_out.items())
        total = sum(suite.votes.left_out.values())
        yield f"suite {name}: {total:,} vote{'s do' if total != 1 else ' does'} not count: {listed}"
