"""The only place that commits source rows: finds repeats and splits, and commits a unit's rows in one transaction.

Invariants: of equal pairs, and of equal single images, one is kept; no prompt is in two splits; what a source holds out
is never trained on; what was removed stays removed. They hold across units, runs and concurrent writers: rows are
judged against one version of the table and committed on top of exactly that version, or judged again.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.dataset.errors import StorageError
from pipelines.dataset.key_map import KeyMap, Keys, keys_of
from pipelines.dataset.pair import PAIRS_SCHEMA, PRIOR, TEST, TRAIN, VALIDATION, Reason, Status
from pipelines.dataset.table import Commit, Table
from pipelines.dataset.values import Row
from pipelines.ingest.policy import PREFERRED_OR_NOT, Policy

LABEL_TOLERANCE = 1e-6  # 1 - 0.7 is not 0.3; labels are remembered as float32
REMOVED, OF_CLASS = -1.0, 2.0  # stand where a label would
IS_REMOVED = pc.field("pair_key").is_valid() & (pc.field("reason") == str(Reason.REMOVED))
COLUMNS = [
    "pair_key", "kind", "mirrored", "label_0", "status", "reason", "prompt_id", "split"
]  # fmt: skip
REMEMBERED = PREFERRED_OR_NOT | IS_REMOVED
PLACE_COLUMNS = ("shard", "shard_bytes", "shard_sha256", "offset_0", "length_0", "offset_1", "length_1")
CONTENT_COLUMNS = (
    "prompt", "user_id", "image_0_sha256", "image_1_sha256", "width_0", "height_0", "width_1", "height_1",
    "orientation_0", "orientation_1", "mode_0", "mode_1",
)  # fmt: skip
"""Columns that are cleared in a removed row."""
SPLITS = (TRAIN, VALIDATION, TEST)
MAX_CONFLICTS = 200  # commits of others that may come first, one after the other

Labels = NDArray[np.float32]


class Committer:
    """Judges and commits units against all rows of the table.

    Remembers the first label of every key and the split of every prompt, 20 bytes each, so that the cost of a unit
    does not grow with the table; files that others append are read once.

    Args:
        table: The table of pairs.
        policy: Policy for ties and splits.
    """

    def __init__(self, table: Table, policy: Policy | None = None) -> None:
        self._table, self._policy = table, policy or Policy()
        self._version: int | None = None
        self._files: frozenset[str] = frozenset()
        self._labels, self._splits = KeyMap(), KeyMap()

    def append(self, unit: str, rows: pa.Table) -> pa.Table:
        """Judge the rows of a unit, commit them, and return the judged rows.

        Raises:
            StorageError: The commit failed.
        """
        for _ in range(MAX_CONFLICTS):
            self._catch_up()
            judged = _Judgement(self._labels, self._splits, self._policy).of(rows)
            landed = self._table.append_on(self._version, unit, judged)
            if landed is Commit.DONE:
                self._take_in_own(judged)
            if landed is not Commit.CONFLICT:
                return judged
        raise StorageError(
            f"cannot commit unit {unit} to {self._table.uri}: {MAX_CONFLICTS} other commits came first",
            "run one ingest at a time",
        )

    def _catch_up(self) -> None:
        """Read the rows committed since the last call, by others and by this writer."""
        if (version := self._table.version) == self._version:
            return
        files = self._table.files()
        if self._files - files:  # rows were changed: what they said no longer holds
            self._labels, self._splits, self._files = KeyMap(), KeyMap(), frozenset()
        self._remember(self._table.batches_of(files - self._files, COLUMNS, REMEMBERED))
        self._files, self._version = files, version

    def _take_in_own(self, rows: pa.Table) -> None:
        """Remember the rows just committed; if others have committed since, `_catch_up` reads them back."""
        version = self._table.version
        if version == (0 if self._version is None else self._version + 1):
            self._remember(rows.filter(REMEMBERED).select(COLUMNS).to_batches())
            self._files, self._version = self._table.files(), version

    def _remember(self, batches: Iterable[pa.RecordBatch]) -> None:
        parts = [_remembered(batch) for batch in batches if batch.num_rows]
        if parts:
            pairs, labels, prompts, splits = (np.concatenate(part) for part in zip(*parts, strict=True))
            removed = labels == REMOVED  # before a row of the same pair that is still there: the first value stays
            for which in (removed, ~removed):
                self._labels.add(pairs[which], labels[which])
            self._splits.add(prompts, splits)


def _remembered(batch: pa.RecordBatch) -> tuple[Keys, Labels, Keys, Labels]:
    """Return keys with their canonical label or REMOVED, and prompts with the number of their split."""
    label = pc.if_else(batch["mirrored"], pc.subtract(1.0, batch["label_0"]), batch["label_0"])
    label = pc.if_else(pc.fill_null(pc.equal(batch["kind"], PRIOR), False), OF_CLASS, label)
    removed = pc.equal(batch["status"], str(Status.QUARANTINED))
    live = batch.filter(pc.invert(removed)).select(["prompt_id", "split"])
    prompts = pa.Table.from_batches([live]).group_by(["prompt_id", "split"], use_threads=False).aggregate([])
    codes = pc.index_in(prompts["split"], pa.array(SPLITS)).to_numpy()
    labels = pc.if_else(removed, REMOVED, label).to_numpy(zero_copy_only=False).astype(np.float32)
    return keys_of(batch["pair_key"]), labels, keys_of(prompts["prompt_id"]), codes.astype(np.float32)


class _Judgement:
    """The judgement of one unit's rows against one state of the maps, which it does not change."""

    def __init__(self, labels: KeyMap, splits: KeyMap, policy: Policy) -> None:
        self._labels, self._splits, self._policy = labels, splits, policy
        self._new_labels: dict[str, float] = {}
        self._new_splits: dict[str, str] = {}

    def of(self, rows: pa.Table) -> pa.Table:
        """Return the rows, each with its final status, reason and split."""
        found = rows.to_pylist()
        labels, splits = self._known(found, "pair_key", self._labels), self._known(found, "prompt_id", self._splits)
        judged = [self._judge(row, float(labels[i]), float(splits[i])) for i, row in enumerate(found)]
        return pa.Table.from_pylist(judged, schema=PAIRS_SCHEMA)

    def _known(self, rows: list[Row], column: str, known: KeyMap) -> Labels:
        """Return the value of each row's key in the map; NaN without a key."""
        values = np.full(len(rows), np.nan, np.float32)
        have = [i for i, row in enumerate(rows) if row[column] is not None]
        keys: Keys = keys_of(pa.array([rows[i][column] for i in have], pa.string()))
        values[have] = known.get(keys)
        return values

    def _judge(self, row: Row, known_label: float, known_split: float) -> Row:
        if row["prompt_id"] is None:
            return row
        own, split = row["source_split"], self._split_so_far(row["prompt_id"], known_split)
        row = row | {"split": split or own or self._policy.split_of(row["prompt_id"])}
        if row["pair_key"] is None:
            return row
        label = canonical_label(row)
        first = self._new_labels.get(row["pair_key"], known_label)
        if first == REMOVED:
            return self._drop(row, Status.QUARANTINED, Reason.REMOVED) | dict.fromkeys(CONTENT_COLUMNS)
        if not np.isnan(first):
            same = abs(label - first) <= LABEL_TOLERANCE
            return self._drop(row, Status.DUPLICATE, Reason.REPEATED if same else Reason.CONFLICTING_LABEL)
        if own in (VALIDATION, TEST) and split == TRAIN:
            return self._drop(row, Status.QUARANTINED, Reason.SPLIT_CONFLICT)
        self._new_labels[row["pair_key"]] = label
        self._new_splits[row["prompt_id"]] = row["split"]
        status, reason = self._policy.status_of(row["label_0"])
        return row | {"status": str(status), "reason": None if reason is None else str(reason)}

    def _split_so_far(self, prompt_id: str, known_split: float) -> str | None:
        """Return the split of a prompt by earlier rows of the unit, or else by the table; None if it is new."""
        return self._new_splits.get(prompt_id) or (None if np.isnan(known_split) else SPLITS[int(known_split)])

    def _drop(self, row: Row, status: Status, reason: Reason) -> Row:
        return row | dict.fromkeys(PLACE_COLUMNS) | {"status": str(status), "reason": str(reason)}


def canonical_label(row: Row) -> float:
    """Return the label from the point of view of the image with the smaller digest, whichever is listed first.

    An image of a class has a label of its own, so that it conflicts with a verdict on the same image.
    """
    if row["kind"] == PRIOR:
        return OF_CLASS
    label = float(row["label_0"])
    return 1.0 - label if row["mirrored"] else label
