"""The images that an evaluation scores: samples of models, and both images of held-out human pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.pair import Status
from pipelines.dataset.status import ScoreStatus
from pipelines.scores.images import PLACE, REQUIRED
from pipelines.suites.audit import AUDIT_SCHEMA
from pipelines.suites.cells import VALUES_SCHEMA

if TYPE_CHECKING:
    from pipelines.scores.judges import Judge

NO_IMAGE = "no image"
"""Beginning of the reason why a sample that could not be drawn has no score."""
SIBLINGS = "siblings"


def is_drawn(samples: pa.Table) -> pa.ChunkedArray:
    """Return for each sample whether it has an image."""
    return pc.equal(samples["status"], str(Status.KEPT))


def images_of(samples: pa.Table, judges: Sequence[Judge]) -> pa.Table:
    """Return the images of samples of one model, for `score`.

    Args:
        samples: Rows of the table of samples; those without an image are left out.
        judges: The judges; only if one compares the images of a prompt is there a column for that.
    """
    kept = samples.filter(is_drawn(samples))
    images = pa.table({name: kept["sha256" if name == "image_sha256" else name] for name in REQUIRED.names})
    if any(SIBLINGS in judge.needs for judge in judges):
        images = images.append_column(SIBLINGS, _siblings(kept))
    return images


def _siblings(samples: pa.Table) -> pa.Array:
    """Return for each image the places of the other images of its prompt."""
    rows = samples.select(["prompt_id", "shard", "offset", "length", "sha256"]).to_pylist()
    by_prompt = defaultdict(list)
    for position, row in enumerate(rows):
        by_prompt[row.pop("prompt_id")].append(position)
    found: list[list[dict[str, object]]] = [[] for _ in rows]
    for positions in by_prompt.values():
        for position in positions:
            found[position] = [rows[other] for other in positions if other != position]
    return pa.array(found, pa.list_(PLACE))


def values_of(model: str, judge: Judge, samples: pa.Table, scores: pa.Table) -> pa.Table:
    """Return the values of one model and judge, one row for each sample, drawn or not.

    Args:
        model: The model's name.
        judge: The judge.
        samples: Rows of the table of samples.
        scores: Those of the drawn ones, in their order, from `read_scores`.
    """
    place = pc.subtract(pc.cumulative_sum(is_drawn(samples).cast(pa.int64())), 1)
    place = pc.if_else(is_drawn(samples), place, None)  # the sample's place among the drawn ones
    is_scored = pc.equal(scores["status"], str(ScoreStatus.SCORED))
    reasons = pc.binary_join_element_wise(NO_IMAGE, pc.fill_null(samples["reason"], "not drawn"), ": ")
    return pa.table(
        {
            "model": pa.repeat(model, samples.num_rows),
            "scorer": pa.repeat(judge.name, samples.num_rows),
            "prompt_id": samples["prompt_id"],
            "index": samples["index"],
            "value": pc.if_else(is_scored, scores["value"], None).take(place),
            "reason": pc.if_else(is_drawn(samples), scores["reason"].take(place), reasons),
            "components": scores["components"].take(place),
        }
    )


def no_values() -> pa.Table:
    """Return the values of an evaluation without judges."""
    return VALUES_SCHEMA.empty_table()


def can_audit(judge: Judge) -> bool:
    """Return whether a judge can be compared with people: it needs only image and prompt, and has not learnt labels."""
    return set(judge.needs) <= {"image", "prompt"} and judge.fit is None


def audit_rows(judge: Judge, sides: pa.Table, scores: pa.Table) -> pa.Table:
    """Return a judge's scores of both images of each pair, as `audit` takes them.

    Args:
        judge: The judge.
        sides: From `HeldOutPairs.sides`: all first images, then all second ones.
        scores: Their scores, in this order.
    """
    count = sides.num_rows // 2
    pairs, values = sides.slice(0, count), scores["value"]
    found = {
        "pair_key": pairs["pair_key"],
        "prompt_id": pairs["prompt_id"],
        "scorer": pa.repeat(judge.name, count),
        "value_0": values.slice(0, count),
        "value_1": values.slice(count),
        "label_0": pairs["label_0"],
    }
    return pa.table(found).select(AUDIT_SCHEMA.names).cast(AUDIT_SCHEMA)
