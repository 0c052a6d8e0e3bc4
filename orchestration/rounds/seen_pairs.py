"""The pairs of a snapshot that a training saw: those of its first steps in the order of `training/data/order.py`.

Single images count as pairs. Only the keys of the pairs are in memory, at most about 60 bytes each.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.key_map import KeyMap, Keys, keys_of
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.pair import KINDS, TRAIN, Status
from pipelines.dataset.storage import Storage
from training.data.order import Plan, num_visits
from training.data.rows import Labels, Selection, kind_numbers
from training.methods import METHODS
from training.spec import Snapshot, TrainSpec

KEPT = pc.field("status") == str(Status.KEPT)


@dataclass(frozen=True)
class TrainedRound:
    """The facts that determine which pairs a round trained on.

    Args:
        number: The round's number.
        snapshot: The snapshot that it read.
        seed: The seed of its order.
        micro_batch_size: Pairs per group.
        global_batch_size: Pairs per step.
        labels: `hard` leaves kept ties out.
        steps: Steps up to the weights in question; fewer than were done if these are of an earlier checkpoint.
        method: The loss, which decides whether single images are learned from.
    """

    number: int
    snapshot: Snapshot
    seed: int
    micro_batch_size: int
    global_batch_size: int
    labels: Labels
    steps: int
    method: str = "mapo"

    @staticmethod
    def of_record(record: dict[str, Any]) -> "TrainedRound":
        """Read a round of `lineage.json`."""
        order = record["order"]
        number, step = int(record["round"]), int(record["step"])
        sizes = int(order["micro_batch_size"]), int(order["global_batch_size"])
        snapshot = Snapshot(**record["snapshot"])
        return TrainedRound(number, snapshot, int(order["seed"]), *sizes, order["labels"], step, record["method"])

    @property
    def pairs(self) -> Any:
        """The condition for rows that the round could train on.

        Raises:
            SnapshotError: The round's method is unknown.
        """
        if self.method not in METHODS:
            raise SnapshotError(
                f"round {self.number} was trained with the method {self.method}, which is not one of: "
                f"{', '.join(METHODS)}",
                "use the version of mapo that trained it",
            )
        method = METHODS[self.method]
        return Selection(TRAIN, self.labels, method.kinds, method.needs_good).where


@dataclass
class SeenPairs:
    """The pairs of a round, in the order of its index: by bucket and kind, then by key."""

    keys: Keys
    is_seen: NDArray[np.bool_]

    def has(self, pair_key: str) -> bool | None:
        """Return whether a pair was trained on; None if it was not among the training pairs."""
        wanted = keys_of(pa.array([pair_key]))[0]
        found = np.flatnonzero((self.keys == wanted).all(axis=1))
        return bool(self.is_seen[found[0]]) if len(found) else None


def seen_pairs(storage: Storage, trained: TrainedRound) -> SeenPairs:
    """Return the pairs that a round could train on, and which of them it saw, from `training.data.index` and the plan.

    Raises:
        SnapshotError: A version that it read no longer exists, or its method is unknown.
        StorageError: The tables cannot be read.
    """
    snapshot = trained.snapshot
    buckets, shapes = _buckets(storage, snapshot)
    texts = text_table(storage, snapshot.text_fingerprint, snapshot.text_version)
    without_text = texts.read(["prompt_id"], ~KEPT)["prompt_id"]
    keys: list[Keys] = [np.empty((0, 2), np.uint64)]
    codes: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    table = pairs_table(storage, snapshot.pairs_version)
    for batch in table.batches(["pair_key", "prompt_id", "kind"], trained.pairs):
        with_text = batch.filter(pc.invert(pc.is_in(batch["prompt_id"], without_text.unique())))
        found, kinds = keys_of(with_text["pair_key"]), kind_numbers(with_text).to_numpy()
        of_bucket = buckets.get(found)
        is_encoded = ~np.isnan(of_bucket)
        keys.append(found[is_encoded])
        codes.append(shapes[of_bucket[is_encoded].astype(np.int64)] * len(KINDS) + kinds[is_encoded])
    del buckets
    all_keys, all_codes = np.concatenate(keys), np.concatenate(codes)
    order = np.lexsort((all_keys[:, 1], all_keys[:, 0], all_codes))
    return SeenPairs(all_keys[order], _is_seen(trained, all_codes))


def _is_seen(trained: TrainedRound, codes: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return which rows a round saw, in the order of its index, from each row's bucket and kind as one number."""
    counts = np.bincount(codes)
    sizes, kinds = counts[counts > 0].tolist(), [KINDS[code % len(KINDS)] for code in np.flatnonzero(counts)]
    if not sizes:
        return np.empty(0, bool)
    visits = num_visits(sizes, kinds) if METHODS[trained.method].is_balanced else [1] * len(sizes)
    elements = [size * times for size, times in zip(sizes, visits, strict=True)]
    plan = Plan(elements, trained.micro_batch_size, trained.global_batch_size, trained.seed)
    masks = zip(plan.seen(trained.steps), visits, strict=True)
    return np.concatenate([mask.reshape(times, -1).any(axis=0) for mask, times in masks])


def _buckets(storage: Storage, snapshot: Snapshot) -> tuple[KeyMap, NDArray[np.int32]]:
    """Return the number of each encoded pair's bucket, and the rank of that bucket by height and width."""
    buckets, numbers = KeyMap(), dict[tuple[int, int], int]()
    table = latents_table(storage, snapshot.latents_fingerprint, snapshot.latents_version)
    for batch in filter(len, table.batches(["pair_key", "bucket_height", "bucket_width"], KEPT)):
        buckets.add(keys_of(batch["pair_key"]), _numbered(batch, numbers))
    ordered = sorted(numbers)
    return buckets, np.array([ordered.index(shape) for shape in numbers] or [0], np.int32)


def _numbered(batch: pa.RecordBatch, numbers: dict[tuple[int, int], int]) -> NDArray[np.float32]:
    """Return the number of each row's bucket; a new shape gets the next number in `numbers`."""
    sides = np.stack([batch[name].to_numpy() for name in ("bucket_height", "bucket_width")], axis=1)
    shapes, inverse = np.unique(sides, axis=0, return_inverse=True)
    of_shape = [numbers.setdefault((int(height), int(width)), len(numbers)) for height, width in shapes]
    return np.array(of_shape, np.float32)[inverse.ravel()]


def count_pairs(spec: TrainSpec, steps: int) -> tuple[int, int]:
    """Return how many pairs a training could train on, and how many of them it saw in this number of steps."""
    config = spec.config
    sizes = config.micro_batch_size, config.global_batch_size
    trained = TrainedRound(spec.round, spec.snapshot, spec.seed, *sizes, config.labels, steps, config.method)
    seen = seen_pairs(spec.storage, trained)
    return len(seen.keys), int(seen.is_seen.sum())
