"""The plan of scoring: which images lack a score of which judge, cut into units; and the scores that are there.

Needs neither ray nor torch. A score is known by its image's bytes, its prompt, and its context (see `contexts`); one
that failed is not tried again under the same fingerprint. What a server left unanswered (`Failure.transient`) has no
row, and is planned again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.key_map import Keys
from pipelines.dataset.layout import SCORES_SCHEMA, scores_table
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.scores.images import (
    IMAGE_LISTS,
    OPTIONAL,
    REQUIRED,
    TEXTS,
    Mask,
    Rows,
    check_images,
    first_of_each,
    is_judged_by,
    keys_of_images,
    keys_of_scores,
    places_in,
)
from pipelines.scores.judges import Judge
from pipelines.units.unit import Unit, unit_id

IMAGES_A_UNIT = 32
MAX_IMAGES_A_UNIT = 8 * IMAGES_A_UNIT
MANY_UNITS = 64  # enough to keep actors busy and to show progress; more images make larger units first
WANTED = "wanted_by_"
"""Prefix of the columns of a unit that say which judges, by position, an image lacks."""
KEY_COLUMNS = ["image_sha256", "prompt_id", "context"]
VALUE_COLUMNS = ["value", "components", "status", "reason"]


@dataclass(frozen=True)
class Pending:
    """Missing scores.

    Args:
        units: Units of images, each with at least one missing score.
        num_missing: Number of missing scores of each judge, in the order of the judges.
    """

    units: list[Unit]
    num_missing: tuple[int, ...]

    @property
    def total(self) -> int:
        """The number of missing scores."""
        return sum(self.num_missing)


def table_of(storage: Storage, judge: Judge) -> Table:
    """Open the table of a judge's scores."""
    return scores_table(storage, judge.table_name, judge.fingerprint)


def pending_scores(storage: Storage, judges: Sequence[Judge], images: pa.Table) -> Pending:
    """Plan the missing scores of images.

    Units are cut from all images in the order of prompts and digests, whatever is done, so that an interrupted
    execution goes on with the same units. Images of a prompt are in a unit together, where they share its embedding.

    Args:
        storage: The storage of the scores.
        judges: The judges.
        images: Rows of IMAGES_SCHEMA; an image may be in several rows, and the column JUDGES may say who scores it.

    Raises:
        ConfigError: A judge needs a column that the images do not have.
        SnapshotError: A row lacks its digest, prompt_id or place.
    """
    for judge in judges:
        check_images(images, judge.needs, judge.name)
    keys: dict[tuple[str, ...], tuple[Keys, Mask]] = {}
    missing: list[Mask] = []
    for judge in judges:
        needs = needs_beside(judge)
        if needs not in keys:
            keys[needs] = _with_first(keys_of_images(images, needs))
        of_images, is_first = keys[needs]
        is_wanted = is_judged_by(images, judge.name)
        if not is_wanted.all():
            is_first = is_wanted.copy()
            is_first[is_wanted] = first_of_each(of_images[is_wanted])
        missing.append(np.logical_and(is_first, places_in(_known(storage, judge), of_images) < 0))
    if not any(each.any() for each in missing):
        return Pending([], tuple(0 for _ in judges))
    own = keys.get(()) or _with_first(keys_of_images(images, ()))
    units = _units(images, _order(images), own[1], np.stack(missing))
    return Pending(units, tuple(int(each.sum()) for each in missing))


def count_lacking(storage: Storage, judge: Judge, images: pa.Table) -> tuple[int, int]:
    """Return how many distinct images have no score of a judge, and how many distinct images there are.

    Args:
        storage: The storage of the scores.
        judge: The judge.
        images: Rows of IMAGES_SCHEMA.

    Raises:
        ConfigError: The judge needs a column that the images do not have.
        SnapshotError: A row lacks its digest, prompt_id or place.
    """
    check_images(images, judge.needs, judge.name)
    keys = keys_of_images(images, needs_beside(judge))
    keys = keys[first_of_each(keys)]
    return int((places_in(_known(storage, judge), keys) < 0).sum()), len(keys)


def _with_first(keys: Keys) -> tuple[Keys, Mask]:
    return keys, first_of_each(keys)


def needs_beside(judge: Judge) -> tuple[str, ...]:
    """Return what a judge needs beside the image and its prompt, in the order of the columns."""
    return tuple(name for name in (*IMAGE_LISTS, *TEXTS) if name in judge.needs)


def _known(storage: Storage, judge: Judge) -> Keys:
    """Return the keys of all scores of a judge."""
    found = [
        keys_of_scores(pa.Table.from_batches([batch]))
        for batch in table_of(storage, judge).batches(KEY_COLUMNS)
        if batch.num_rows
    ]
    return np.concatenate(found) if found else np.zeros((0, 2), np.uint64)


def _order(images: pa.Table) -> Rows:
    """Return the rows in the order of prompts, then digests."""
    by = [("prompt_id", "ascending"), ("image_sha256", "ascending")]
    found = pc.sort_indices(images.select(["prompt_id", "image_sha256"]), sort_keys=by)
    return np.asarray(found.to_numpy(), np.int64)


def images_a_unit(num_images: int) -> int:
    """Return the size of a unit for so many distinct images: few make small units, for many actors to share."""
    return min(MAX_IMAGES_A_UNIT, IMAGES_A_UNIT * max(1, num_images // (MANY_UNITS * IMAGES_A_UNIT)))


def _units(images: pa.Table, order: Rows, is_first: Mask, missing: Mask) -> list[Unit]:
    """Cut all distinct images into units, and keep those rows, and units, that lack a score.

    Args:
        images: All rows.
        order: Positions of the rows in the order of the units.
        is_first: By row, whether the image with its prompt is in no row before.
        missing: By judge and row, whether the score is missing.
    """
    counted = np.cumsum(is_first[order])
    number = np.maximum(counted - 1, 0) // images_a_unit(int(counted[-1]))
    is_wanted = np.asarray(missing.any(axis=0))[order]
    rows, number = order[is_wanted], number[is_wanted]
    columns = [name for name in (*REQUIRED.names, *OPTIONAL.names) if name in images.column_names]
    found = images.select(columns).take(pa.array(rows)).combine_chunks()
    for position, each in enumerate(missing):
        found = found.append_column(f"{WANTED}{position}", pa.array(each[rows]))
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    ends = [*starts[1:].tolist(), len(rows)]
    parts = (found.slice(start, end - start) for start, end in zip(starts.tolist(), ends, strict=True))
    return [Unit(_name(part, len(missing)), part) for part in parts]


def _name(rows: pa.Table, num_judges: int) -> str:
    """Return the id under which attempts at a unit are counted; its commits have ids of their own for each judge."""
    wanted = "".join(str(pc.sum(rows[f"{WANTED}{position}"]).as_py() or 0) + "," for position in range(num_judges))
    return unit_id("scores", wanted, rows["image_sha256"][0].as_py(), rows["prompt_id"][0].as_py(), str(rows.num_rows))


def commit_id(judge: Judge, rows: pa.Table) -> str:
    """Return the id of the commit of a judge's scores of one unit, which follows from them alone.

    Args:
        judge: The judge.
        rows: Its scores, in the order of the unit.
    """
    keys = (",".join(each) for each in zip(*(rows[name].to_pylist() for name in KEY_COLUMNS), strict=True))
    return unit_id("scores", judge.fingerprint, *keys)


def read_scores(storage: Storage, judge: Judge, images: pa.Table) -> pa.Table:
    """Return the scores of images by one judge, in the order of the images.

    Args:
        storage: The storage of the scores.
        judge: The judge.
        images: Rows of IMAGES_SCHEMA.

    Returns:
        Columns value (null for a failure), components, status and reason; one row for each image.

    Raises:
        SnapshotError: An image has no score, not even a failed one.
    """
    check_images(images, judge.needs, judge.name)
    wanted = keys_of_images(images, needs_beside(judge))
    table = table_of(storage, judge)
    schema = pa.schema([SCORES_SCHEMA.field(name) for name in VALUE_COLUMNS])
    keys, kept = [np.zeros((0, 2), np.uint64)], [schema.empty_table()]
    for batch in table.batches([*KEY_COLUMNS, *VALUE_COLUMNS]):
        rows = pa.Table.from_batches([batch])
        of_rows = keys_of_scores(rows)
        is_wanted = places_in(wanted, of_rows) >= 0
        keys.append(of_rows[is_wanted])
        kept.append(rows.select(VALUE_COLUMNS).filter(pa.array(is_wanted)).cast(schema))
    places = places_in(np.concatenate(keys), wanted)
    if num_missing := int((places < 0).sum()):
        raise SnapshotError(
            f"{num_missing:,} of {len(wanted):,} images have no score of {judge.name} in {table.uri}",
            "score them first: rerun the evaluation",
        )
    return pa.concat_tables(kept).take(pa.array(places)).combine_chunks()
