"""Judges whose scores follow from those of others: computed by image when a suite is reduced, and never stored."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.suites.cells import NOT_FINITE, UNKNOWN, VALUES_SCHEMA
from pipelines.suites.compbench.three_in_one import PARTS, three_in_one
from pipelines.suites.results import Judge
from pipelines.suites.suite import Suite, SuitePrompt

Place = tuple[str, str, int]
"""Model, prompt_id, and number of the image."""


@dataclass(frozen=True)
class DerivedJudge:
    """A judge that merges scores of others.

    Args:
        name: Its name.
        parts: Names of the judges that it merges.
        shown: What readers of its numbers must know.
        reads: Returns which of the parts the score of an image of this prompt follows from.
        merge: Returns the score of an image of this prompt from the values of these parts, by the judge's name.
    """

    name: str
    parts: tuple[str, ...]
    shown: Judge
    reads: Callable[[SuitePrompt], Sequence[str]]
    merge: Callable[[SuitePrompt, Mapping[str, float]], float]


ROLES = {"attribute": "blip-vqa", "spatial": "compbench-2d-complex", "action": "compbench-clip-complex"}
"""The judges of the parts of T2I-CompBench's complex prompts."""


def _merge_complex(prompt: SuitePrompt, values: Mapping[str, float]) -> float:
    parts = {role: values.get(scorer, math.nan) for role, scorer in ROLES.items()}
    return three_in_one(prompt.tags[0], **parts)  # type: ignore[arg-type]


THREE_IN_ONE = DerivedJudge(
    "compbench-3-in-1",
    tuple(ROLES.values()),
    Judge(
        scale="mean of two or three parts, 0 to 1",
        licence="those of its parts",
        description="Attributes, spatial relations and actions, as far as the prompt has them (T2I-CompBench, 3-in-1)",
    ),
    lambda prompt: [ROLES[role] for role in PARTS[prompt.tags[0]]],
    _merge_complex,
)
DERIVED = {each.name: each for each in (THREE_IN_ONE,)}
"""By name."""


def missing_parts(name: str, scorers: Collection[str]) -> list[str]:
    """Return the parts of a derived judge that are not among some scorers."""
    return [part for part in DERIVED[name].parts if part not in scorers]


def with_derived(values: pa.Table, suite: Suite, names: Collection[str]) -> pa.Table:
    """Return values with a row for each image of each model and derived judge.

    An image that a part has failed on, which its score would follow from, has the part's reason instead of a score.

    Args:
        values: Rows of VALUES_SCHEMA, with all parts.
        suite: The suite.
        names: The derived judges.
    """
    schema = pa.schema([values.schema.field(name) for name in VALUES_SCHEMA.names])
    prompts = {each.prompt_id: each for each in suite.prompts}
    tables = [values]
    for name in names:
        derived = DERIVED[name]
        rows = [_row(derived, place, prompts[place[1]], found) for place, found in _parts(derived, values).items()]
        tables.append(pa.Table.from_pylist(rows, schema=schema))
    return pa.concat_tables(tables, promote_options="default")


def _parts(derived: DerivedJudge, values: pa.Table) -> dict[Place, dict[str, tuple[float | None, str | None]]]:
    """Return value and reason by judge, for each image of each model."""
    rows = values.filter(pc.is_in(values["scorer"], value_set=pa.array(derived.parts))).select(VALUES_SCHEMA.names)
    found: dict[Place, dict[str, tuple[float | None, str | None]]] = {}
    for row in rows.to_pylist():
        place = row["model"], row["prompt_id"], row["index"]
        found.setdefault(place, {})[row["scorer"]] = row["value"], row["reason"]
    return found


def _row(
    derived: DerivedJudge, place: Place, prompt: SuitePrompt, found: Mapping[str, tuple[float | None, str | None]]
) -> dict[str, Any]:
    """Return the row of one image."""
    model, prompt_id, index = place
    row = {"model": model, "scorer": derived.name, "prompt_id": prompt_id, "index": index}
    reads = {part: found.get(part, (None, None)) for part in derived.reads(prompt)}
    for part, (value, reason) in reads.items():
        if value is None or not math.isfinite(value):
            why = NOT_FINITE if value is not None else reason or UNKNOWN
            return {**row, "value": None, "reason": f"{part}: {why}"}
    values = {part: value for part, (value, _) in reads.items() if value is not None}
    return {**row, "value": derived.merge(prompt, values), "reason": None}
