"""Table of the values that a suite is reduced from, and one scorer's values of one model out of it."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.suites.results import TAGS
from pipelines.suites.statistics import per_prompt
from pipelines.suites.suite import Suite

VALUES_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("scorer", pa.string()),
        ("prompt_id", pa.string()),
        ("index", pa.int32()),  # of the images of this prompt, from 0
        ("value", pa.float64()),  # null if there is no score
        ("reason", pa.string()),  # why there is none
    ]
)
"""Columns of values, one row for each image of each model and scorer. `suite`, where rows of other suites are left out,
and `components` (JSON, as in the tables of scores) are optional; further columns are ignored."""
MISSING, NOT_FINITE, UNKNOWN = "missing", "not_finite", "unknown"
"""Reasons of the reduction itself: no row at all, a value that is not a number, a failure without a reason."""
CUT = "cut_token_ratio"
"""Component of a score: share of the prompt's tokens that the scorer does not read."""


@dataclass(frozen=True)
class Cell:
    """One scorer's values of one model.

    Args:
        means: prompt_id -> mean over its images that have a score, ordered by prompt_id.
        values: prompt_id and number of the image -> its score.
        num_images: Number of images that have one.
        failures: Number of images that have none, by reason.
        is_binary: Whether every value is 0 or 1.
        cut: prompt_id -> share of its tokens that are cut.
    """

    means: Mapping[str, float]
    values: Mapping[tuple[str, int], float]
    num_images: int
    failures: Mapping[str, int]
    is_binary: bool
    cut: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        """Number of images without a score."""
        return sum(self.failures.values())

    def means_beside(self, other: "Cell") -> Mapping[str, float]:
        """Return prompt_id -> mean over the images that have a score of both cells: the same noise on both sides."""
        if self.values.keys() == other.values.keys():
            return self.means
        places = [place for place in self.values if place in other.values]
        return means_of(places, [self.values[place] for place in places])


def means_of(places: Sequence[tuple[str, int]], values: Sequence[float]) -> Mapping[str, float]:
    """Return prompt_id -> mean of its values, ordered by prompt_id.

    Args:
        places: prompt_id and number of each image.
        values: Its value.
    """
    return per_prompt(values, [prompt_id for prompt_id, _ in places]) if places else {}


def scorers_of(values: pa.Table, suite: Suite) -> tuple[str, ...]:
    """Return the scorers of values: those of the suite in its order, then the others by name."""
    found = set(values["scorer"].unique().to_pylist())
    return tuple(dict.fromkeys((*(each for each in suite.scorers if each in found), *sorted(found))))


class Cells:
    """The values of a suite, by model and scorer.

    Args:
        values: Rows of VALUES_SCHEMA.
        suite: The suite.

    Raises:
        ValueError: A column is missing, an image occurs twice, a prompt or the number of an image is not of the suite,
            or a scorer is called `tags`.
    """

    def __init__(self, values: pa.Table, suite: Suite) -> None:
        self._suite = suite
        absent = [name for name in VALUES_SCHEMA.names if name not in values.column_names]
        if absent:
            raise ValueError(f"values: the column {absent[0]} is missing; there are {', '.join(values.column_names)}.")
        if "suite" in values.column_names:
            values = values.filter(pc.field("suite") == suite.name)
        self._values = values
        self._check()
        self.scorers = scorers_of(values, suite)
        self.models = tuple(dict.fromkeys(values["model"].unique().to_pylist()))

    def _check(self) -> None:
        known = pa.array([each.prompt_id for each in self._suite.prompts])
        foreign = self._values.filter(pc.invert(pc.is_in(self._values["prompt_id"], value_set=known)))
        if foreign.num_rows:
            raise ValueError(
                f"values: {foreign.num_rows} of {self._values.num_rows} rows are of prompts that the suite"
                f" {self._suite.name} does not have, such as {foreign['prompt_id'][0]}."
            )
        keys = self._values.select(["model", "scorer", "prompt_id", "index"])
        distinct = keys.group_by(keys.column_names, use_threads=False).aggregate([]).num_rows
        if distinct < keys.num_rows:
            raise ValueError(f"values: {keys.num_rows - distinct} of {keys.num_rows} rows repeat an image.")
        index, count = self._values["index"], self._suite.images_per_prompt
        if beyond := pc.sum(pc.or_(pc.less(index, 0), pc.greater_equal(index, count))).as_py():
            raise ValueError(f"values: {beyond} of {keys.num_rows} rows are not of the {count} images of a prompt.")
        if pc.any(pc.equal(self._values["scorer"], TAGS)).as_py():
            raise ValueError(f"values: a scorer is called {TAGS}, which has another meaning in results.json.")

    def cell(self, model: str, scorer: str) -> Cell:
        """Return the values of one model and scorer; images without a row count as failed."""
        rows = self._values.filter((pc.field("model") == model) & (pc.field("scorer") == scorer))
        values = rows["value"].cast(pa.float64()).to_numpy(zero_copy_only=False)
        is_null, is_scored = rows["value"].is_null().to_numpy(), np.isfinite(values)
        reasons = rows["reason"].to_pylist()
        failures = Counter(
            (reasons[place] or UNKNOWN) if is_null[place] else NOT_FINITE for place in np.flatnonzero(~is_scored)
        )
        if missing := len(self._suite.prompts) * self._suite.images_per_prompt - len(values):
            failures[MISSING] += missing
        prompt_ids = rows["prompt_id"].to_pylist()
        scored, indices = values[is_scored], rows["index"].to_pylist()
        places = [(prompt_ids[place], int(indices[place])) for place in np.flatnonzero(is_scored)]
        return Cell(
            means=means_of(places, scored.tolist()),
            values=dict(zip(places, scored.tolist(), strict=True)),
            num_images=len(scored),
            failures=dict(sorted(failures.items())),
            is_binary=bool(np.isin(scored, (0.0, 1.0)).all()) if len(scored) else False,
            cut=self._cut(rows, prompt_ids),
        )

    @staticmethod
    def _cut(rows: pa.Table, prompt_ids: list[str]) -> dict[str, float]:
        """Return prompt_id -> share of its tokens that are cut; all images of a prompt have the same."""
        if "components" not in rows.column_names:
            return {}
        found = {}
        for prompt_id, text in dict(zip(prompt_ids, rows["components"].to_pylist(), strict=True)).items():
            share = json.loads(text or "{}").get(CUT)
            if share is not None and math.isfinite(share):
                found[prompt_id] = float(share)
        return found
