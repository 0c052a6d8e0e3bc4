"""The pairs of a snapshot that a training saw: those of its first steps in the order of `training/data/order.py`.

Only the keys of the pairs are in memory, at most about 60 bytes each.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.dataset.key_map import KeyMap, Keys, keys_of
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.pair import TRAIN, Status
from pipelines.dataset.storage import Storage
from training.data.index import PREFERRED
from training.data.order import Plan
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
    """

    number: int
    snapshot: Snapshot
    seed: int
    micro_batch_size: int
    global_batch_size: int
    labels: str
    steps: int

    @staticmethod
    def of_record(record: dict[str, Any]) -> "TrainedRound":
        """Read a round of `lineage.json`."""
        order = record["order"]
        number, step = int(record["round"]), int(record["step"])
        sizes = int(order["micro_batch_size"]), int(order["global_batch_size"])
        snapshot = Snapshot(**record["snapshot"])
        return TrainedRound(number, snapshot, int(order["seed"]), *sizes, order["labels"], step)

    @property
    def pairs(self) -> Any:
        """The condition for rows that the round could train on."""
        usable = KEPT & (pc.field("split") == TRAIN)
        return usable & (pc.field("label_0") != PREFERRED) if self.labels == "hard" else usable


@dataclass
class SeenPairs:
    """The pairs of a round, in the order of its index: by bucket, then by key."""

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
        SnapshotError: A version that it read no longer exists.
        StorageError: The tables cannot be read.
    """
    snapshot = trained.snapshot
    buckets, shapes = _buckets(storage, snapshot)
    texts = text_table(storage, snapshot.text_fingerprint, snapshot.text_version)
    without_text = texts.read(["prompt_id"], ~KEPT)["prompt_id"]
    keys: list[Keys] = [np.empty((0, 2), np.uint64)]
    codes: list[NDArray[np.float32]] = [np.empty(0, np.float32)]
    table = pairs_table(storage, snapshot.pairs_version)
    for batch in table.batches(["pair_key", "prompt_id"], trained.pairs):
        found = keys_of(batch.filter(pc.invert(pc.is_in(batch["prompt_id"], without_text.unique())))["pair_key"])
        of_bucket = buckets.get(found)
        is_encoded = ~np.isnan(of_bucket)
        keys.append(found[is_encoded])
        codes.append(of_bucket[is_encoded])
    del buckets
    all_keys, all_codes = np.concatenate(keys), shapes[np.concatenate(codes).astype(np.int64)]
    order = np.lexsort((all_keys[:, 1], all_keys[:, 0], all_codes))
    sizes = [int(size) for size in np.bincount(all_codes) if size]
    if not sizes:
        return SeenPairs(all_keys, np.empty(0, bool))
    plan = Plan(sizes, trained.micro_batch_size, trained.global_batch_size, trained.seed)
    return SeenPairs(all_keys[order], np.concatenate(plan.seen(trained.steps)))


def _buckets(storage: Storage, snapshot: Snapshot) -> tuple[KeyMap, NDArray[np.int64]]:
    """Return the number of each encoded pair's bucket, and the rank of that bucket by height and width."""
    buckets, numbers = KeyMap(), dict[tuple[int, int], int]()
    table = latents_table(storage, snapshot.latents_fingerprint, snapshot.latents_version)
    for batch in filter(len, table.batches(["pair_key", "bucket_height", "bucket_width"], KEPT)):
        buckets.add(keys_of(batch["pair_key"]), _numbered(batch, numbers))
    ordered = sorted(numbers)
    return buckets, np.array([ordered.index(shape) for shape in numbers] or [0], np.int64)


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
    seen = seen_pairs(spec.storage, TrainedRound(spec.round, spec.snapshot, spec.seed, *sizes, config.labels, steps))
    return len(seen.keys), int(seen.is_seen.sum())
