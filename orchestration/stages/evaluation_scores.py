"""The scores of an evaluation whose samples are drawn: what is missing is scored, and all values are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from orchestration.stages.evaluation_images import (
    audit_rows,
    can_audit,
    images_of,
    no_values,
    sample_of,
    values_of,
    with_rows_of,
)
from orchestration.stages.judged_scorers import shown_judges
from orchestration.stages.judged_votes import votes_of
from orchestration.stages.missing_judges import split_judges
from pipelines.samples.execution import read_samples
from pipelines.scores.execution import score
from pipelines.scores.images import JUDGES, REQUIRED
from pipelines.scores.plan import read_scores
from pipelines.suites.audit import JudgeAgreement, audit
from pipelines.suites.derived import DERIVED, with_derived
from pipelines.suites.results import Judge as ShownJudge

if TYPE_CHECKING:
    from orchestration.stages.evaluation import Evaluation
    from pipelines.scores.judges import Judge
    from pipelines.suites.results import MissingJudge
    from pipelines.suites.suite import Suite
    from pipelines.suites.votes import Votes


class EvaluationScores:
    """The scores of an evaluation whose samples are drawn: scores what is missing, and reads the values.

    Args:
        evaluation: The evaluation.
        judges: The judges of each suite.
        absent: Those that cannot judge a suite, from `absent_judges`.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        judges: Mapping[str, Sequence[Judge]],
        absent: Mapping[str, Sequence[MissingJudge]],
    ) -> None:
        self._evaluation, self._storage = evaluation, evaluation.storage
        self._samples = {
            (cell.suite.name, cell.model.name): read_samples(self._storage, cell.drawing) for cell in evaluation.cells
        }
        self._suites = {cell.suite.name: cell.suite for cell in evaluation.cells}
        self._images = {
            place: images_of(samples, judges[place[0]], self._suites[place[0]])
            for place, samples in self._samples.items()
        }
        split = {
            name: split_judges(self._storage, self._suites[name], each, absent[name], self._of_suite(name))
            for name, each in judges.items()
        }
        self.judges = {name: able for name, (able, _) in split.items()}
        """By suite, those that have numbers, or will."""
        self.missing = {name: tuple(missing) for name, (_, missing) in split.items()}
        """By suite, those that have none."""
        self._auditors = [judge for judge in self._every() if can_audit(judge)] if evaluation.max_audit_pairs else []
        self._sides = evaluation.held_out.sides(evaluation.max_audit_pairs) if self._has_pairs() else None
        self._score()
        self.values = {name: self._values(name) for name in judges}
        """Rows of VALUES_SCHEMA and `components` by suite: one for each image of each model and judge."""

    @property
    def shown(self) -> dict[str, ShownJudge]:
        """What readers of the results must know of each judge that has numbers."""
        found = shown_judges(self._every())
        return found | {each: DERIVED[each].shown for name in self.judges for each in self.derived(name)}

    def derived(self, suite: str) -> list[str]:
        """Return the derived judges of a suite that have all their parts."""
        missing = {each.name for each in self.missing[suite]}
        return [name for name in self._suites[suite].derived if name not in missing]

    def _of_suite(self, suite: str) -> pa.Table:
        """Return the images of a suite, of all models."""
        return pa.concat_tables(images for (name, _), images in self._images.items() if name == suite)

    def _every(self) -> list[Judge]:
        return list({judge.name: judge for each in self.judges.values() for judge in each}.values())

    def _has_pairs(self) -> bool:
        return bool(self._auditors) and self._evaluation.held_out.is_held_out

    def _score(self) -> None:
        """Score what is missing in one execution: samples by the judges of their suite, pairs by those that audit."""
        tables = [_judged(images, self.judges[suite]) for (suite, _), images in self._images.items()]
        if self._sides is not None:
            tables.append(_judged(self._sides.select(REQUIRED.names), self._auditors))
        if every := self._every():
            images = pa.concat_tables(tables, promote_options="default")
            score(self._storage, every, images, self._evaluation.workers, self._evaluation.say)

    def _values(self, suite: str) -> pa.Table:
        """Read the values of a suite, each judge's table once."""
        models = {model: samples for (of_suite, model), samples in self._samples.items() if of_suite == suite}
        images = {model: self._images[suite, model] for model in models}
        found = []
        for judge in self.judges[suite]:
            scores = read_scores(self._storage, judge, pa.concat_tables(images.values()))
            for model, samples in models.items():
                own = scores.slice(0, images[model].num_rows)
                scores = scores.slice(images[model].num_rows)
                found.append(values_of(model, judge, samples, own))
        values = pa.concat_tables(found, promote_options="default") if found else no_values()
        return with_derived(with_rows_of(self._suites[suite], values), self._suites[suite], self.derived(suite))

    def audit(self, shown: Mapping[str, ShownJudge]) -> dict[str, JudgeAgreement]:
        """Compare the judges with the human labels of held-out pairs."""
        if self._sides is None:
            return {}
        images = self._sides.select(REQUIRED.names)
        rows = [audit_rows(judge, self._sides, read_scores(self._storage, judge, images)) for judge in self._auditors]
        return audit(pa.concat_tables(rows), judges=shown)

    def votes(self, suite: Suite, against: str) -> Votes:
        """Count the votes of people on the images of a suite."""
        samples = {model: each for (name, model), each in self._samples.items() if name == suite.name}
        return votes_of(self._storage, suite, samples, against, self._evaluation.say)

    def png(self, suite: str, model: str, prompt_id: str, index: int) -> bytes | None:
        """Return the bytes of a sample; None if it could not be drawn."""
        samples = self._samples[suite, model]
        sample_id, place = sample_of(self._suites[suite], prompt_id, index)
        where = (pc.field("prompt_id") == sample_id) & (pc.field("index") == place) & pc.field("shard").is_valid()
        found = samples.filter(where).to_pylist()
        if not found:
            return None
        row = found[0]
        return self._storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"])


def _judged(images: pa.Table, judges: Sequence[Judge]) -> pa.Table:
    """Return the images with the names of their judges."""
    names = "\n".join(judge.name for judge in judges)
    return images.append_column(JUDGES, pa.array([names] * images.num_rows, pa.string()))
