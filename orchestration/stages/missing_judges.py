"""Judges of a suite that have no numbers yet, because scores are not imported or a parser has not been asked.

They stop nothing: a suite is drawn, and shown by its other judges. A judge that lacks the score of a single image is
not shown at all, since a mean over a part of the images is of another protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestration.stages.judged_scorers import entries_of, is_absent, lacking
from pipelines.scores.scorers import new_scorer
from pipelines.scores.scorers.compbench_clip import WITHOUT_ADJECTIVES
from pipelines.scores.scorers.imported import IMPORTED
from pipelines.suites.derived import missing_parts
from pipelines.suites.plain import from_plain
from pipelines.suites.results import MissingJudge

if TYPE_CHECKING:
    import pyarrow as pa

    from orchestration.run.context import Run
    from orchestration.run.journal import StageRecord
    from pipelines.dataset.storage import Storage
    from pipelines.scores.judges import Judge
    from pipelines.suites.suite import Suite

SHOWN = 12
THEN = "bring the scores with `mapo scores import`, and evaluate again"
CONTAINER = f"score its samples in the container of infra/compbench, {THEN}"
ELSEWHERE = f"score its samples where the scorer runs, {THEN}"
NO_WORDS = "its questions came without the words of the prompts"
ASK_AGAIN = (
    "make questions.jsonl anew with benchmarks/compbench_questions.py, bring it with `mapo suites fetch NAME --from "
    "FOLDER`, and evaluate again"
)
NOT_DRAWN = "not all images are drawn yet"
ALL = "no score was imported"


def absent_judges(run: Run, suite: Suite) -> list[MissingJudge]:
    """Return the judges that cannot judge a suite, whatever its images are; the numbers of images are left at 0."""
    found = [_without_text(suite, name, lacks) for name in suite.scorers if (lacks := lacking(suite, name))]
    return [*found, *(_absent(run, suite, each.name) for each in entries_of(run, suite) if is_absent(run, each))]


def _without_text(suite: Suite, scorer: str, lacks: Sequence[str]) -> MissingJudge:
    if WITHOUT_ADJECTIVES in lacks:
        return MissingJudge(scorer, NO_WORDS, ASK_AGAIN.replace("NAME", suite.label), 0, 0, scorer)
    return MissingJudge(scorer, f"it needs {' and '.join(lacks)} of each prompt", "", 0, 0, scorer)


def _absent(run: Run, suite: Suite, scorer: str) -> MissingJudge:
    """Return the judge of a name that stands for no imported table, or for several."""
    from pipelines.scores.imported import count_imported, find_imported

    name, count = new_scorer(scorer).name, count_imported(run.storage, scorer)
    tables = find_imported(run.storage, name)
    if len(tables) > 1:
        listed = ", ".join(each.fingerprint[:SHOWN] for each in tables)
        why, hint = f"it was imported under {len(tables)} fingerprints, {listed}", f"name {scorer}@FINGERPRINT"
        return MissingJudge(name, why, f"{hint} among `evaluate.scorers`", 0, 0, scorer, count)
    return MissingJudge(name, ALL, _hint(suite, name), 0, 0, scorer, count)


def _hint(suite: Suite, name: str) -> str:
    return CONTAINER if name in suite.foreign else ELSEWHERE


def split_judges(
    storage: Storage, suite: Suite, judges: Sequence[Judge], absent: Sequence[MissingJudge], images: pa.Table
) -> tuple[list[Judge], list[MissingJudge]]:
    """Return the judges that can judge all images of a suite, and those that cannot.

    Args:
        storage: The storage of the scores.
        suite: The suite.
        judges: Its judges, prepared.
        absent: From `absent_judges`.
        images: Its images, of all models, as `score` takes them.
    """
    from pipelines.scores.imported import count_imported
    from pipelines.scores.plan import count_lacking

    able: list[Judge] = []
    missing: list[MissingJudge] = []
    total = num_distinct(images)
    for each in absent:
        why = _lacks(total, total) if each.why == ALL and total else each.why
        missing.append(replace(each, why=why, num_missing=total, num_images=total))
    for judge in judges:
        count = count_imported(storage, judge.entry.name) if judge.is_imported else 0  # before the scores are read
        lacks = count_lacking(storage, judge, images)[0] if judge.is_imported else 0
        if lacks:
            why, hint = _lacks(lacks, total), _hint(suite, judge.name)
            missing.append(MissingJudge(judge.name, why, hint, lacks, total, judge.entry.name, count))
        else:
            able.append(judge)
    return able, [*missing, *_unmerged(suite, {judge.name for judge in able}, total)]


def _lacks(count: int, total: int) -> str:
    return f"{count:,} of {total:,} images have no imported score"


def _unmerged(suite: Suite, scorers: Collection[str], total: int = 0) -> Iterator[MissingJudge]:
    """Yield the derived judges that lack a part."""
    for name in suite.derived:
        if parts := missing_parts(name, scorers):
            yield MissingJudge(name, f"it needs {' and '.join(parts)}", "", total, total, name)


def num_distinct(images: pa.Table) -> int:
    """Return the number of distinct images, each with its prompt."""
    return int(
        images.select(["image_sha256", "prompt_id"]).group_by(["image_sha256", "prompt_id"]).aggregate([]).num_rows
    )


def has_imported(run: Run, suite: Suite) -> bool:
    """Return whether a suite has judges whose scores are imported, be they there or not."""
    return any(each.name.startswith(IMPORTED) for each in entries_of(run, suite))


def planned(run: Run, suite: Suite, images: pa.Table | None) -> list[MissingJudge]:
    """Return the judges that will have no numbers of a suite, as far as can be said before the work.

    Args:
        run: The run.
        suite: The suite.
        images: Its images, of all models; None if some are not drawn yet, or that is not known.
    """
    from pipelines.scores.judges import prepare_judges

    entries = [each for each in entries_of(run, suite) if each.name.startswith(IMPORTED) and not is_absent(run, each)]
    absent, judges = absent_judges(run, suite), prepare_judges(entries, run.storage)
    names = {new_scorer(each.name).name for each in entries_of(run, suite)} - {each.name for each in absent}
    if images is not None:
        _, missing = split_judges(run.storage, replace(suite, derived=()), judges, absent, images)
    else:
        waiting = [
            MissingJudge(each.name, NOT_DRAWN, _hint(suite, each.name), 0, 0, each.entry.name) for each in judges
        ]
        missing = [*absent, *waiting]
    return [*missing, *_unmerged(suite, names - {each.name for each in missing})]


def remarks(found: Sequence[tuple[Suite, Sequence[MissingJudge]]]) -> tuple[str, ...]:
    """Return a line for each missing judge of each suite."""
    return tuple(f"{suite.label} has {each.words}" for suite, missing in found for each in missing)


def recorded(record: StageRecord | None) -> list[tuple[str, MissingJudge]]:
    """Return the missing judges that an evaluation has recorded, each with the name of its suite."""
    suites: Any = (record.details.get("results") or {}).get("suites", {}) if record is not None else {}
    return [
        (name, from_plain(MissingJudge, each)) for name, suite in suites.items() for each in suite.get("missing", ())
    ]


def have_scores_come(storage: Storage, record: StageRecord) -> bool:
    """Return whether scores were imported for a missing judge since an evaluation was recorded."""
    from pipelines.scores.imported import count_imported

    counted = {each.scorer: each.num_imported for _, each in recorded(record) if each.scorer.startswith(IMPORTED)}
    return any(count_imported(storage, scorer) != count for scorer, count in counted.items())
