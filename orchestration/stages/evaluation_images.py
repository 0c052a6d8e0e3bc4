"""The images that an evaluation scores: samples of models, and both images of held-out human pairs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.pair import Status
from pipelines.dataset.status import ScoreStatus
from pipelines.samples.plan import wanted_samples
from pipelines.samples.prompts import Prompt
from pipelines.scores.images import PLACE, REQUIRED, TEXTS
from pipelines.scores.scorers.scorer import REFERENCES, SIBLINGS
from pipelines.suites.audit import AUDIT_SCHEMA
from pipelines.suites.cells import VALUES_SCHEMA
from pipelines.suites.suite import REPEAT

if TYPE_CHECKING:
    from pipelines.scores.judges import Judge
    from pipelines.suites.suite import Suite

NO_IMAGE = "no image"
"""Beginning of the reason why a sample that could not be drawn has no score."""


def samples_of(suite: Suite, fingerprint: str, seed: int) -> pa.Table:
    """Return the samples that a suite wants of one model, as rows of `WANTED_SCHEMA`.

    A prompt that a benchmark has several times is drawn as often, with other noise each time: the n images of its row
    number r have the indices n r to n r + n - 1.

    Args:
        suite: The suite.
        fingerprint: Of the model and the settings of the sampler.
        seed: The run's seed.
    """
    distinct = {each.sample_id: Prompt(each.sample_id, each.prompt, each.tags, each.text) for each in suite.prompts}
    count, rows = suite.images_per_prompt, {(each.sample_id, each.occurrence) for each in suite.prompts}
    most = count * (1 + max(row for _, row in rows))
    wanted = wanted_samples(list(distinct.values()), fingerprint, seed=seed, images_per_prompt=most)
    if most == count:
        return wanted
    places = zip(wanted["prompt_id"].to_pylist(), wanted["index"].to_pylist(), strict=True)
    return wanted.filter(pa.array([(identity, index // count) in rows for identity, index in places]))


def sample_of(suite: Suite, prompt_id: str, index: int) -> tuple[str, int]:
    """Return the prompt_id and the index under which the samples have an image of a row of a suite."""
    sample_id, _, repeat = prompt_id.partition(REPEAT)
    return sample_id, index + suite.images_per_prompt * int(repeat or 0)


def with_rows_of(suite: Suite, values: pa.Table) -> pa.Table:
    """Return values under the ids and image numbers of the rows of a suite, not of its samples: see `samples_of`."""
    if not any(each.occurrence for each in suite.prompts):
        return values
    count = suite.images_per_prompt
    rows = pc.divide(values["index"], count)
    repeats = pc.binary_join_element_wise(values["prompt_id"], pc.cast(rows, pa.string()), REPEAT)
    found = values.set_column(
        values.column_names.index("prompt_id"), "prompt_id", pc.if_else(pc.equal(rows, 0), values["prompt_id"], repeats)
    )
    index = pc.subtract(values["index"], pc.multiply(rows, count)).cast(pa.int32())
    return found.set_column(values.column_names.index("index"), "index", index)


def is_drawn(samples: pa.Table) -> pa.ChunkedArray:
    """Return for each sample whether it has an image."""
    return pc.equal(samples["status"], str(Status.KEPT))


def images_of(samples: pa.Table, judges: Sequence[Judge], suite: Suite) -> pa.Table:
    """Return the images of samples of one model, for `score`.

    Args:
        samples: Rows of the table of samples; those without an image are left out.
        judges: The judges; only what one of them needs beside image and prompt has a column.
        suite: The suite that knows it.
    """
    kept = samples.filter(is_drawn(samples))
    images = pa.table({name: kept["sha256" if name == "image_sha256" else name] for name in REQUIRED.names})
    needs = {need for judge in judges for need in judge.needs}
    if SIBLINGS in needs:
        images = images.append_column(SIBLINGS, _siblings(kept))
    for name in (*TEXTS, REFERENCES):
        if name in needs:
            images = images.append_column(name, _known(kept, suite, name))
    return images


def _known(samples: pa.Table, suite: Suite, name: str) -> pa.Array:
    """Return for each sample what a suite knows of its prompt."""
    told = {each.sample_id: getattr(each, name) for each in suite.prompts}
    found = [told[each] for each in samples["prompt_id"].to_pylist()]
    if name == REFERENCES:
        return pa.array([json.loads(each or "[]") for each in found], pa.list_(PLACE))
    return pa.array(found, pa.string())


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
    """Return whether a judge can be compared with people: it scores any image here, without labels."""
    return set(judge.needs) <= {"image", "prompt"} and judge.fit is None and not judge.is_imported


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
