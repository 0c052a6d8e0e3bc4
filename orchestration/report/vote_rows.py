"""View of the votes of people on a suite: a win rate of each model, with the number of votes and voters."""

from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.suites.results import VOTES, Comparison, SuiteResult, VoteCount


@dataclass(frozen=True)
class VoteRow:
    """Votes on one model against the one that is compared with.

    Args:
        model: The model.
        is_ours: Whether it is the run's own model.
        comparison: Its win rate; None without votes.
        count: Number of votes and voters; None without votes.
        verdict: `rose` if people prefer it, `fell` if they prefer the other one, empty if neither is shown.
    """

    model: str
    is_ours: bool
    comparison: Comparison | None
    count: VoteCount | None
    verdict: str


def vote_rows(result: SuiteResult, models: Iterable[str], ours: str | None) -> list[VoteRow]:
    """Return a row for each model but the one that is compared with; none if votes are not asked for.

    Args:
        result: The suite's results.
        models: The models, in their order.
        ours: The run's own model.
    """
    if result.votes is None:
        return []
    return [_row(model, result, ours) for model in models if model != result.against_model]


def _row(model: str, result: SuiteResult, ours: str | None) -> VoteRow:
    found = result.against.get(model, {}).get(VOTES)
    verdict = ""
    if found is not None and found.win_rate is not None and found.is_shown:
        verdict = "rose" if found.win_rate > 0.5 else "fell"
    return VoteRow(model, model == ours, found, found.votes if found else None, verdict)
