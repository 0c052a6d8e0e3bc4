"""The votes of people in an evaluation: `votes` among `evaluate.scorers` counts those on the images of its suites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestration.stages.evaluation_images import with_rows_of
from orchestration.stages.judged_suites import names_of_suites
from pipelines.suites.results import VOTES
from pipelines.suites.results import Judge as ShownJudge

if TYPE_CHECKING:
    import pyarrow as pa

    from orchestration.config import RunConfig
    from orchestration.run.context import Run, Say
    from pipelines.dataset.storage import Storage
    from pipelines.suites.suite import Suite
    from pipelines.suites.votes import Votes

SHOWN = ShownJudge(
    scale="share of prompts", licence="yours", description="Which of two images do people prefer? Blind votes."
)


def wants_votes(config: RunConfig) -> bool:
    """Return whether votes are among the scorers of the evaluation."""
    return any(entry.name == VOTES for entry in config.evaluate.scorer_entries)


def shown_votes(config: RunConfig) -> dict[str, ShownJudge]:
    """Return what readers of the results must know of votes, if they are asked for."""
    return {VOTES: SHOWN} if wants_votes(config) else {}


def votes_identity(run: Run) -> list[list[str]]:
    """Return name, fingerprint and number of rows of every session on the suites, in the shape of a scorer's."""
    from pipelines.scores.vote_tables import vote_tables

    if not wants_votes(run.config):
        return []
    suites = {name.partition("@")[0] for name in names_of_suites(run.config)}
    found = vote_tables(run.storage, suites)
    return [[VOTES, each.fingerprint, str(each.table.count_rows())] for each in found]


def votes_of(storage: Storage, suite: Suite, samples: Mapping[str, pa.Table], against: str, say: Say) -> Votes:
    """Return the votes on a suite, by its rows, and say how many do not count.

    Args:
        storage: The storage of the scores.
        suite: The suite, as it was drawn.
        samples: Rows of the table of samples by model.
        against: The model that the others are compared with.
        say: Shows a line to the user.
    """
    from pipelines.scores.vote_tables import count_votes, vote_tables

    votes = count_votes(vote_tables(storage, {suite.name}), samples, against=against, may_rank=not suite.primary)
    found = votes.summary()
    plural = "" if found.num_voters == 1 else "s"
    say(f"votes     {found.num_votes:,} of {found.num_voters:,} session{plural} on {suite.label}")
    for reason, count in votes.left_out.items():
        say(f"votes     {count:,} do not count: {reason}")
    return replace(votes, rows=with_rows_of(suite, votes.rows))
