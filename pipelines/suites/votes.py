"""Votes of people on the images of a suite: a win rate for each model, beside the judges and never averaged with them.

An image has the mean of its voters, and a prompt counts once, with the mean over its images: more than half a win, half
a tie.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.suites.cells import means_of
from pipelines.suites.gallery import step_of
from pipelines.suites.results import VOTES, Comparison, SuiteVotes, VoteCount
from pipelines.suites.statistics import win_rate
from pipelines.suites.suite import Suite

VOTES_SCHEMA = pa.schema(
    [
        ("model", pa.string()),  # that is compared with `against`
        ("voter", pa.string()),  # the session
        ("prompt_id", pa.string()),
        ("index", pa.int32()),  # of the images of this prompt, from 0
        ("value", pa.float64()),  # 1 if the model's image is the better one, 0.5 for a tie, 0 otherwise
    ]
)
"""Columns of votes, one row for each pair of images and voter."""
Compared = Mapping[str, Mapping[str, Comparison]]


@dataclasses.dataclass(frozen=True)
class Votes:
    """The votes on one suite.

    Args:
        rows: Rows of VOTES_SCHEMA: the votes that count.
        left_out: Number of votes that do not, by reason.
        may_rank: Whether the suite leaves its primary judges to the configuration, which names votes.
    """

    rows: pa.Table
    left_out: Mapping[str, int]
    may_rank: bool = True

    def summary(self) -> SuiteVotes:
        """Count the votes."""
        distinct = self.rows.select(["voter", "prompt_id", "index"])  # a vote counts once for two equal models
        distinct = distinct.group_by(distinct.column_names, use_threads=False).aggregate([])
        return SuiteVotes(distinct.num_rows, len(self.rows["voter"].unique()), dict(self.left_out))


def with_votes(compared: Compared, votes: Votes | None, suite: Suite, against: str) -> dict[str, dict[str, Comparison]]:
    """Return the comparisons by model and scorer with those by votes, for models that have any.

    Args:
        compared: The comparisons by model and scorer.
        votes: The votes; None if they are not asked for.
        suite: The suite.
        against: The model that is compared with.
    """
    found = {model: dict(each) for model, each in compared.items()}
    for model, each in found.items():
        rows = VOTES_SCHEMA.empty_table() if votes is None else votes.rows.filter(pc.field("model") == model)
        if rows.num_rows:
            each[VOTES] = compare_votes(rows, suite, model=model, against=against)
    return found


def compare_votes(rows: pa.Table, suite: Suite, *, model: str, against: str) -> Comparison:
    """Compare a model with another by the votes of people; there is no difference of means, only a win rate.

    Args:
        rows: Rows of VOTES_SCHEMA of this model, at least one.
        suite: The suite.
        model: The model.
        against: The other model.
    """
    by_image: dict[tuple[str, int], list[float]] = defaultdict(list)
    for prompt_id, index, value in zip(*(rows[name].to_pylist() for name in VOTES_SCHEMA.names[2:]), strict=True):
        by_image[prompt_id, index].append(value)
    means = np.array(list(means_of(list(by_image), [float(np.mean(each)) for each in by_image.values()]).values()))
    won = win_rate(means, 1 - means, tolerance=0.0)
    counted = f"better on {won.wins} of {len(means)} prompts, worse on {won.losses}"
    preferred = model if won.rate > 0.5 else against
    said = f"people prefer {preferred}" if won.p_value < 0.05 else "no preference shown"
    return Comparison(
        difference=None, low=None, high=None,
        win_rate=won.rate, win_low=won.low, win_high=won.high, ties=won.ties, n=len(means),
        wins=won.wins, losses=won.losses, num_left_out=len(suite.prompts) - len(means),
        p_value=won.p_value, win_p_value=won.p_value, words=f"{said}: {model} is {counted}",
        votes=VoteCount(rows.num_rows, len(rows["voter"].unique())),
    )  # fmt: skip


def ranking_votes(compared: Compared, votes: Votes | None) -> tuple[str, ...]:
    """Return VOTES if they may rank: where every model but checkpoints has votes; else nothing."""
    named = [model for model in compared if step_of(model) is None]
    may_rank = votes is not None and votes.may_rank and bool(named)
    return (VOTES,) if may_rank and all(VOTES in compared[model] for model in named) else ()
