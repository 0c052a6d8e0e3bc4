"""View of the leaderboard: models by suites, ranked by their mean win rate over the primary judges.

Raw scores are never averaged over judges: their scales have nothing in common. Checkpoints make the report's learning
curves and have no place here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from orchestration.report.charts import IntervalPlot, interval_plot
from orchestration.report.records import EvaluationSection, Interval
from orchestration.report.suite_view import ScoreGroup, ScoreRow, SuiteView, suite_views
from orchestration.report.tag_bars import TagBars, tag_bars
from orchestration.report.vote_rows import VoteRow
from pipelines.suites.published import PublishedTable, published_beside
from pipelines.suites.results import VOTES, SuiteResult

EVEN = 0.5
"""Win rate of the model that is compared with, against itself."""


@dataclass(frozen=True)
class MeanWinRate:
    """Mean of win rates over judges or suites; shares, 0..1.

    Args:
        rate: The mean.
        low: Mean of the lower ends of their 95 % intervals; None for the model that is compared with. However the
            errors of judges go together, an interval of the mean is at most as wide as the mean of their intervals.
        high: The same of the upper ends.
        count: Number of judges, or of suites, in the mean.
    """

    rate: float
    low: float | None
    high: float | None
    count: int

    @property
    def is_even(self) -> bool:
        """Whether the interval has an even match in it; that of the reference is none."""
        return self.low is not None and self.high is not None and self.low <= EVEN <= self.high


@dataclass(frozen=True)
class BoardRow:
    """Model in the table of one suite.

    Args:
        model: Its name.
        is_ours: Whether it is the run's own model.
        is_reference: Whether it is the model that is compared with.
        rank: Its place by mean win rate, 1 for the highest; None if it has none.
        win_rate: Mean over the primary judges; None unless each of them compared it.
        cells: Its numbers by judge, in the order of the board's groups; None where it has no score.
    """

    model: str
    is_ours: bool
    is_reference: bool
    rank: int | None
    win_rate: MeanWinRate | None
    cells: Sequence[ScoreRow | None]


@dataclass(frozen=True)
class SuiteBoard:
    """One suite: judges, primary ones first, models in the order of their ranks, tags as bars, and votes of people."""

    name: str
    result: SuiteResult
    groups: Sequence[ScoreGroup]
    rows: Sequence[BoardRow]
    tags: Sequence[TagBars]
    votes: Sequence[VoteRow]

    @property
    def num_primary(self) -> int:
        """Number of judges that the ranks rest on; the votes of people may be one of them."""
        return sum(group.is_primary for group in self.groups) + (VOTES in self.result.primary)


@dataclass(frozen=True)
class Standing:
    """Model over all suites that rank.

    Args:
        model: Its name.
        is_ours: Whether it is the run's own model.
        rank: Its place; None unless every suite ranks it.
        overall: Mean over these suites of its mean win rates; None unless each of them ranks it.
        suites: Its mean win rate in each of them.
    """

    model: str
    is_ours: bool
    rank: int | None
    overall: MeanWinRate | None
    suites: Sequence[MeanWinRate | None]


@dataclass(frozen=True)
class Leaderboard:
    """Everything that the page compares.

    Args:
        boards: The suites.
        ranked: Names of the suites that have a primary judge and two models, which the standings are over.
        standings: The models in the order of their ranks.
        plot: Their mean win rates with intervals; None without a comparison.
        reference: The model that win rates are against.
        published: Tables that others printed, for reading beside.
    """

    boards: Sequence[SuiteBoard]
    ranked: Sequence[str]
    standings: Sequence[Standing]
    plot: IntervalPlot | None
    reference: str
    published: Sequence[PublishedTable]


def leaderboard_of(section: EvaluationSection | None) -> Leaderboard | None:
    """Return the leaderboard of an evaluation; None without one, or for one of an earlier version without win rates."""
    if section is None or section.is_former or not section.record.results.suites:
        return None
    views = suite_views(section)
    boards = [_board(view) for view in views]
    ranked = [board for board in boards if any(row.rank for row in board.rows)]
    standings = _standings(ranked)
    return Leaderboard(
        boards=boards,
        ranked=[board.name for board in ranked],
        standings=standings,
        plot=_plot(standings),
        reference=boards[0].result.against_model,
        published=published_beside(section.record.results),
    )


def _board(view: SuiteView) -> SuiteBoard:
    rates = {model: _over_judges(view, model) for model in view.models}
    is_match = sum(rate is not None for rate in rates.values()) > 1
    ranks = _ranks(list(rates.values())) if is_match else [None] * len(rates)
    rows = [
        BoardRow(model, model == view.ours, model == view.result.against_model, rank, rate, _cells(view, model))
        for rank, (model, rate) in zip(ranks, rates.items(), strict=True)
    ]
    rows.sort(key=lambda row: row.rank or math.inf)
    bars = tag_bars(view, [row.model for row in rows])
    return SuiteBoard(view.name, view.result, view.groups, rows, bars, view.votes)


def _cells(view: SuiteView, model: str) -> list[ScoreRow | None]:
    return [next((row for row in group.rows if row.model == model), None) for group in view.groups]


def _over_judges(view: SuiteView, model: str) -> MeanWinRate | None:
    """Return the mean win rate over all primary judges; a mean over some of them would compare with no other."""
    primary = [group.scorer for group in view.groups if group.is_primary]
    if VOTES in view.result.primary:
        primary.append(VOTES)
    if not primary:
        return None
    if model == view.result.against_model:
        return MeanWinRate(EVEN, None, None, len(primary))
    compared = view.result.against.get(model, {})
    rates = [
        MeanWinRate(found.win_rate, found.win_low, found.win_high, 1)
        for scorer in primary
        if (found := compared.get(scorer)) is not None and found.win_rate is not None
    ]
    return _mean(rates) if len(rates) == len(primary) else None


def _mean(rates: Sequence[MeanWinRate]) -> MeanWinRate:
    """Return the mean of win rates, and the means of the ends of their intervals."""
    ends = [(each.low, each.high) for each in rates if each.low is not None and each.high is not None]
    low, high = (math.fsum(side) / len(ends) for side in zip(*ends, strict=True)) if ends else (None, None)
    return MeanWinRate(math.fsum(each.rate for each in rates) / len(rates), low, high, len(rates))


def _ranks(rates: Iterable[MeanWinRate | None]) -> list[int | None]:
    """Return the place of each, 1 for the highest; equal ones share the better place."""
    known = list(rates)
    values = [each.rate for each in known if each is not None]
    return [None if each is None else 1 + sum(value > each.rate for value in values) for each in known]


def _standings(boards: Sequence[SuiteBoard]) -> list[Standing]:
    """Return the models over the suites that rank, in the order of their places."""
    models = dict.fromkeys(row.model for board in boards for row in board.rows)
    found = [_standing(model, boards) for model in models]
    ranks = _ranks(each.overall for each in found)
    placed = [replace(each, rank=rank) for each, rank in zip(found, ranks, strict=True)]
    return sorted(placed, key=lambda each: each.rank or math.inf)


def _standing(model: str, boards: Sequence[SuiteBoard]) -> Standing:
    """Return a model over the suites that rank, without its place."""
    rows = [next((row for row in board.rows if row.model == model), None) for board in boards]
    rates = [row.win_rate if row else None for row in rows]
    known = [rate for rate in rates if rate is not None]
    overall = _mean(known) if len(known) == len(rates) else None
    return Standing(model, any(row is not None and row.is_ours for row in rows), None, overall, rates)


def _plot(standings: Sequence[Standing]) -> IntervalPlot | None:
    """Return the mean win rates in percent, the reference as a point."""
    intervals = []
    for each in standings:
        if (found := each.overall) is not None:
            ends = (found.rate if end is None else end for end in (found.low, found.high))
            low, high = (100 * end for end in ends)
            intervals.append((each.model, Interval(low, 100 * found.rate, high), each.is_ours))
    return interval_plot("Mean win rate", intervals) if len(intervals) > 1 else None
