"""Reduce values to results: a table of scores of images becomes means, differences and win rates over prompts.

A prompt counts once, with the mean over its images. Two models are compared on the prompts that both have. What failed
is counted with its reason and never becomes a number.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from pipelines.suites.cells import Cell, Cells
from pipelines.suites.gallery import step_of
from pipelines.suites.results import (
    Comparison,
    CutPrompts,
    Judge,
    ModelResult,
    ModelScore,
    SuiteResult,
    TagDifference,
    TagScore,
)
from pipelines.suites.statistics import (
    NUM_DRAWS,
    Paired,
    holm,
    in_words,
    mean_interval,
    paired,
    paired_bootstrap,
    win_rate,
)
from pipelines.suites.suite import Suite
from pipelines.suites.votes import Votes, ranking_votes, with_votes

TIE_RATIO = 1e-3
"""Two prompts tie if they differ by no more than this share of the standard deviation over prompts: for PickScore about
1e-3, which is the noise of float32. Judges that say 0 or 1 tie exactly."""
NOTHING = ModelScore(mean=None, median=None, low=None, high=None, n=0)
NO_PAIRS = "no prompt has a score of both models"


def reduce_suite(
    values: pa.Table,
    suite: Suite,
    *,
    against: str,
    judges: Mapping[str, Judge] | None = None,
    models: Sequence[str] | None = None,
    seed: int = 0,
    num_draws: int = NUM_DRAWS,
    votes: Votes | None = None,
) -> SuiteResult:
    """Reduce the values of one suite.

    Args:
        values: Rows of `cells.VALUES_SCHEMA`: one for each image of each model and scorer.
        suite: The suite, as it was drawn.
        against: The model that the others are compared with.
        judges: What is known of each scorer; one that is not here is better if higher.
        models: The models in their order; by default those of the table.
        seed: Seed of the bootstrap.
        num_draws: Number of its draws.
        votes: The votes of people; None if they are not asked for.

    Raises:
        ValueError: The table has no such columns, repeats an image, or has a prompt that is not of the suite; or
            `against` is not one of the models.
    """
    cells = Cells(values, suite)
    names = tuple(models) if models is not None else cells.models
    if against not in names:
        raise ValueError(f"reduce_suite: {against} is not one of the models {', '.join(names)}.")
    found = {model: {scorer: cells.cell(model, scorer) for scorer in cells.scorers} for model in names}
    work = _Reduction(suite, judges or {}, seed, num_draws)
    compared = with_votes(work.comparisons(found, against), votes, suite, against)
    primary = (*(scorer for scorer in cells.scorers if scorer in suite.primary), *ranking_votes(compared, votes))
    compared, num_tests = with_holm(compared, primary)
    return SuiteResult(
        protocol="; ".join((suite.label, *suite.deviations)),
        num_prompts=len(suite.prompts),
        images_per_prompt=suite.images_per_prompt,
        models={model: work.model(each) for model, each in found.items()},
        against=compared,
        against_model=against,
        scorers=cells.scorers,
        primary=primary,
        num_primary_tests=num_tests,
        tags={tag: len(members) for tag, members in suite.tags.items()},
        failures=_failures(found),
        cut=_cut(found),
        num_inference_steps=suite.num_inference_steps,
        guidance_scale=suite.guidance_scale,
        resolution=suite.resolution,
        protocol_prompts=suite.protocol_prompts or len(suite.prompts),
        deviations=suite.deviations,
        about=suite.protocol,
        licence=suite.licence,
        source=suite.source,
        prompts_sha256=suite.sha256,
        seed=seed,
        votes=None if votes is None else votes.summary(),
    )


@dataclasses.dataclass(frozen=True)
class _Reduction:
    """The settings that all numbers of a suite share."""

    suite: Suite
    judges: Mapping[str, Judge]
    seed: int
    num_draws: int

    def model(self, cells: Mapping[str, Cell]) -> ModelResult:
        """Summarize one model."""
        tags = {
            tag: {scorer: score for scorer, cell in cells.items() if (score := self._tag_score(cell, members))}
            for tag, members in self.suite.tags.items()
        }
        return ModelResult({scorer: self._score(cell) for scorer, cell in cells.items()}, tags)

    def _score(self, cell: Cell) -> ModelScore:
        if not cell.means:
            return dataclasses.replace(NOTHING, num_failed=cell.num_failed)
        summary = mean_interval(
            list(cell.means.values()), seed=self.seed, num_draws=self.num_draws, strata=self._strata(tuple(cell.means)),
            macro=self.suite.macro, bounds=(0.0, 1.0) if cell.is_binary else (-math.inf, math.inf),
        )  # fmt: skip
        return ModelScore(**vars(summary), num_images=cell.num_images, num_failed=cell.num_failed)

    def _tag_score(self, cell: Cell, members: Sequence[str]) -> TagScore | None:
        values = [cell.means[each] for each in members if each in cell.means]
        if not values:
            return None
        summary = mean_interval(values, seed=self.seed, num_draws=self.num_draws)
        return TagScore(summary.mean, summary.low, summary.high, summary.n)

    def comparisons(self, found: Mapping[str, Mapping[str, Cell]], against: str) -> dict[str, dict[str, Comparison]]:
        """Compare all models with one of them, by scorer."""
        return {
            model: {
                scorer: self.comparison(model, scorer, cell, found[against][scorer]) for scorer, cell in cells.items()
            }
            for model, cells in found.items()
            if model != against
        }

    def comparison(self, model: str, scorer: str, cell: Cell, reference: Cell) -> Comparison:
        """Compare a model with the reference."""
        num_prompts = len(self.suite.prompts)
        ours, theirs = cell.means_beside(reference), reference.means_beside(cell)
        if not ours.keys() & theirs.keys():
            nothing = (None,) * 6
            return Comparison(*nothing, ties=0, n=0, num_left_out=num_prompts, words=NO_PAIRS)
        both = paired(ours, theirs)
        strata, is_better_high = self._strata(both.prompt_ids), self.judges.get(scorer, Judge()).higher_is_better
        found = paired_bootstrap(
            both.a, both.b, seed=self.seed, num_draws=self.num_draws, strata=strata, macro=self.suite.macro
        )
        tolerance = tie_tolerance(cell, reference)
        sides = (both.a, both.b) if is_better_high else (both.b, both.a)
        won = win_rate(*sides, tolerance=tolerance)
        words = in_words(found, name=model) if np.any(both.a != both.b) else f"equal on all {found.n} prompts"
        return Comparison(
            difference=found.difference, low=found.low, high=found.high,
            win_rate=won.rate, win_low=won.low, win_high=won.high, ties=won.ties, n=found.n,
            wins=won.wins, losses=won.losses, num_left_out=num_prompts - found.n,
            p_value=found.p_value, win_p_value=won.p_value,
            detectable=found.detectable if math.isfinite(found.detectable) else None, tolerance=tolerance,
            words=words if is_better_high or found.difference == 0 else f"{words}; lower is better",
            tags=self._tag_differences(both),
        )  # fmt: skip

    def _tag_differences(self, both: Paired) -> dict[str, TagDifference]:
        place = {prompt_id: number for number, prompt_id in enumerate(both.prompt_ids)}
        found = {}
        for tag, members in self.suite.tags.items():
            if chosen := [place[each] for each in members if each in place]:
                gain = paired_bootstrap(both.a[chosen], both.b[chosen], seed=self.seed, num_draws=self.num_draws)
                found[tag] = TagDifference(gain.difference, gain.low, gain.high, gain.n)
        return found

    def _strata(self, prompt_ids: Sequence[str]) -> list[str] | None:
        categories = self.suite.strata
        return None if categories is None else [categories[each] for each in prompt_ids]


def tie_tolerance(cell: Cell, reference: Cell) -> float:
    """Return the difference up to which two values of a scorer are a tie; see TIE_RATIO.

    It follows from the reference's values alone, so that another model in the table changes no win rate.
    """
    if cell.is_binary and reference.is_binary:
        return 0.0
    return TIE_RATIO * float(np.std(list(reference.means.values())))


def with_holm(
    compared: Mapping[str, Mapping[str, Comparison]], primary: Sequence[str]
) -> tuple[dict[str, dict[str, Comparison]], int]:
    """Add Holm's p values of the primary scorers, over all models but checkpoints; return the number of tests, too.

    Checkpoints make a learning curve, which describes: a dozen of them would take the claims of the others away. Words
    of a difference that does not survive the correction say so.
    """
    places = [
        (model, scorer)
        for model, each in compared.items()
        for scorer in primary
        if step_of(model) is None and each[scorer].p_value is not None
    ]
    adjusted = holm([compared[model][scorer].p_value or 0.0 for model, scorer in places])
    by_place = dict(zip(places, adjusted, strict=True))

    def adjust(place: tuple[str, str], found: Comparison) -> Comparison:
        after = dataclasses.replace(found, p_holm=by_place.get(place))
        if after.is_shown or not found.is_shown:
            return after
        words = f"not enough for a claim after Holm's correction over {len(places)} comparisons: {found.words}"
        return dataclasses.replace(after, words=words)

    return {
        model: {scorer: adjust((model, scorer), found) for scorer, found in each.items()}
        for model, each in compared.items()
    }, len(places)


def _failures(found: Mapping[str, Mapping[str, Cell]]) -> dict[str, dict[str, Mapping[str, int]]]:
    """Return the failures of each model and scorer that has any."""
    counted = {
        model: {scorer: cell.failures for scorer, cell in cells.items() if cell.num_failed}
        for model, cells in found.items()
    }
    return {model: each for model, each in counted.items() if each}


def _cut(found: Mapping[str, Mapping[str, Cell]]) -> dict[str, CutPrompts]:
    """Return for each scorer that says so how many prompts it does not read to the end; models do not matter."""
    shares: dict[str, dict[str, float]] = {}
    for cells in found.values():
        for scorer, cell in cells.items():
            shares.setdefault(scorer, {}).update(cell.cut)
    return {
        scorer: CutPrompts(
            prompt_ratio=sum(each > 0 for each in cut.values()) / len(cut),
            token_ratio=math.fsum(cut.values()) / len(cut),
        )
        for scorer, cut in shares.items()
        if cut
    }
