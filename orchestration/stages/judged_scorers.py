"""The scorers of an evaluation: those that its suites bring, and those of the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from orchestration.stages.judged_suites import suites_without_pairs
from orchestration.stages.judged_votes import votes_identity
from pipelines.config import ScorerEntry
from pipelines.dataset.errors import ConfigError
from pipelines.scores.images import TEXTS
from pipelines.scores.scorers import needs_of, new_scorer
from pipelines.scores.scorers.imported import IMPORTED
from pipelines.scores.scorers.scorer import REFERENCES
from pipelines.suites.benchmarks import BENCHMARKS
from pipelines.suites.registry import HELD_OUT
from pipelines.suites.results import VOTES
from pipelines.suites.results import Judge as ShownJudge

if TYPE_CHECKING:
    from orchestration.run.context import Run
    from orchestration.stages.held_out import HeldOutPairs
    from pipelines.scores.fit import FitPairs
    from pipelines.scores.judges import Judge
    from pipelines.suites.suite import Suite


def entries_of(run: Run, suite: Suite) -> list[ScorerEntry]:
    """Return the scorers of a suite; one that the configuration names too has the settings given there.

    A scorer that needs what the suite does not have, such as questions, is not among them, nor are imported scores that
    belong to another suite. Scores of the suite's foreign judges need not be imported yet; see `is_absent`.
    """
    own = {entry.name: entry for entry in own_entries(run)}
    given = served(run, suite)
    named = {new_scorer(name).name for name in given}
    scorers = (name for name in suite.scorers if not lacking(suite, name))
    foreign = (f"{IMPORTED}{name}" for name in suite.foreign if name not in named)
    return [own.get(name, ScorerEntry(name=name)) for name in dict.fromkeys((*scorers, *foreign, *given))]


def is_absent(run: Run, entry: ScorerEntry) -> bool:
    """Return whether a scorer's scores would have to be imported first.

    So it is also if they were imported under several fingerprints, and the configuration names none of them.
    """
    from pipelines.scores.imported import find_imported

    if not entry.name.startswith(IMPORTED):
        return False
    scorer = new_scorer(entry.name)
    count = len(find_imported(run.storage, scorer.name, scorer.fingerprint))
    return count == 0 or (count > 1 and entry not in own_entries(run))


def _present(run: Run, entries: Iterable[ScorerEntry]) -> list[ScorerEntry]:
    """Leave out scorers whose scores are not imported."""
    return [entry for entry in entries if not is_absent(run, entry)]


def own_entries(run: Run) -> list[ScorerEntry]:
    """Return the scorers of the configuration, without votes, which score no image by itself."""
    return [entry for entry in run.config.evaluate.scorer_entries if entry.name != VOTES]


def served(run: Run, suite: Suite) -> list[str]:
    """Return the names of those scorers of the configuration that can judge a suite."""
    names = (entry.name for entry in own_entries(run))
    return [name for name in names if not lacking(suite, name) and _is_meant(suite, name)]


def _is_meant(suite: Suite, scorer: str) -> bool:
    """Return whether a scorer is for a suite: imported scores of a benchmark are for that one alone."""
    if not scorer.startswith(IMPORTED):
        return True
    name = new_scorer(scorer).name
    return name in suite.foreign or not any(name in each.foreign for each in BENCHMARKS)


def lacking(suite: Suite, scorer: str) -> list[str]:
    """Return what a scorer needs of each prompt and a suite does not have.

    Raises:
        ConfigError: The scorer is unknown.
    """
    known = (*TEXTS, REFERENCES)
    has = {name for name in known if all(getattr(each, name) is not None for each in suite.prompts)}
    return [name for name in needs_of(new_scorer(scorer)) if name in known and name not in has]


def check_served(run: Run, suites: Sequence[Suite]) -> None:
    """Check that each scorer of the configuration has a suite that it can judge.

    Raises:
        ConfigError: One has none.
    """
    names = ", ".join(suite.name for suite in suites)
    for entry in own_entries(run):
        if not suites or any(entry.name in served(run, suite) for suite in suites):
            continue
        lacks = lacking(suites[0], entry.name)
        what = f"needs {' and '.join(lacks)} of each prompt, which" if lacks else "has imported scores of a suite that"
        raise ConfigError(
            f"the scorer {entry.name} {what} is not in any of the suites {names}",
            "leave it out, or add a suite that it is made for",
        )


def judges_of(run: Run, suites: Sequence[Suite], held_out: HeldOutPairs) -> dict[str, list[Judge]]:
    """Return the judges of each suite by its name, checked before any work; without those that `is_absent`.

    Raises:
        ConfigError: A scorer is unknown, or needs what nothing provides.
        ModelError: Weights are missing.
    """
    from pipelines.scores.judges import prepare_judges

    check_served(run, suites)
    entries = {suite.name: entries_of(run, suite) for suite in suites}
    distinct = {entry.name: entry for each in entries.values() for entry in each}
    distinct = {entry.name: entry for entry in _present(run, distinct.values())}
    if not distinct:
        return {suite.name: [] for suite in suites}
    prepared = prepare_judges(list(distinct.values()), run.storage, fit_on=_fit_on(run, distinct.values(), held_out))
    by_name = dict(zip(distinct, prepared, strict=True))
    return {name: [by_name[entry.name] for entry in each if entry.name in by_name] for name, each in entries.items()}


def _fit_on(run: Run, entries: Iterable[ScorerEntry], held_out: HeldOutPairs) -> FitPairs | None:
    """Return the pairs that scorers learn from; None if none of them does."""
    from pipelines.scores.fit import FitPairs

    if not any(hasattr(new_scorer(entry.name), "fit") for entry in entries):
        return None
    return FitPairs(held_out.rows.slice(0, run.config.evaluate.max_audit_pairs))


def scorers_identity(run: Run, held_out: HeldOutPairs) -> list[list[str]]:
    """Return name, fingerprint and check of every scorer, and the sessions of votes that are asked for.

    Pairs are read only if a scorer learns from them.

    Raises:
        ConfigError: A scorer is unknown, or needs what nothing provides.
        ModelError: Weights are missing.
    """
    from pipelines.scores.judges import prepare_judges

    entries = _present(run, _entries_without_pairs(run))
    judges = prepare_judges(entries, run.storage, fit_on=_fit_on(run, entries, held_out))
    found = [[judge.name, judge.fingerprint, judge.verified or ""] for judge in judges]
    return sorted([*found, *votes_identity(run)])


def _entries_without_pairs(run: Run) -> list[ScorerEntry]:
    """Return every scorer; the suite of held-out prompts brings none."""
    suites = suites_without_pairs(run.config)
    found = {entry.name: entry for suite in suites for entry in entries_of(run, suite)}
    return list((found | {entry.name: entry for entry in own_entries(run)}).values())


def check_scorers(run: Run) -> None:
    """Check the scorers of a run that may have no pairs yet: names, needs and weights.

    Raises:
        ConfigError: A scorer is unknown, or needs what nothing provides.
        ModelError: Weights are missing.
    """
    from pipelines.scores.judges import prepare_judges

    if HELD_OUT not in run.config.evaluate.suite_names:
        check_served(run, suites_without_pairs(run.config))
    entries = _present(run, _entries_without_pairs(run))
    prepare_judges([entry for entry in entries if not hasattr(new_scorer(entry.name), "fit")], run.storage)


def shown_judges(judges: Iterable[Judge]) -> dict[str, ShownJudge]:
    """Return what readers of the results must know of each judge."""
    return {
        judge.name: ShownJudge(
            judge.scale, judge.higher_is_better, judge.licence, judge.description,
            bool(judge.verified) if judge.parts else None,
        )
        for judge in judges
    }  # fmt: skip
