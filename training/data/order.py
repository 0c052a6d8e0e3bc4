"""The order of the pairs: a pure function of (bucket sizes, seed, step, slot), with no state to save.

A *group* is `micro_batch_size` pairs of one bucket, so that a micro-batch has one shape and one kind
(pairs, or single images, which are counted as pairs here). A
global batch is G = global_batch_size / micro_batch_size groups, one a *slot*; a rank takes every
world_size-th slot. So the batches are the same on any number of workers up to G, whether or not it
divides G, and to resume is to ask for the next step.

Each bucket is an endless sequence of positions: n pairs in a fresh order each epoch, epoch after
epoch. It is cut into groups without regard to where an epoch ends, so that no pair is ever dropped
and a bucket smaller than a group is visited as often per pair as any other. The groups of all
buckets that begin in one epoch are dealt in a random order.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset.errors import ConfigError
from pipelines.dataset.pair import PRIOR
from training.config import Flips

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment, 2^64 / golden ratio
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's factors
_NUM_ROUNDS = 8  # twice the four that make a Feistel network a strong pseudo-random permutation
_MAX_SORTED = 256  # below this a Feistel half has under 5 bits and mixes badly; sorting is as quick


@dataclass(frozen=True, eq=False)
class PairGroup:
    """One micro-batch: `elements` are indices into bucket `bucket`, drawn in `epoch`."""

    bucket: int
    elements: NDArray[np.int64]
    epoch: int


@dataclass(frozen=True)
class Plan:
    """The order of all pairs, without end; memory does not grow with the number of pairs or steps.

    Guarantees: a bucket of n pairs has n * E / m groups in E epochs, rounded down, and they contain each of
    its pairs E times, except for the fewer than m visits that wait for the next group.
    A group can hold one pair twice only if its bucket is smaller than a group, or if it lies across two
    epochs of its bucket: r pairs of the old and m - r of the new one then meet by chance,
    r * (m - r) / n of them on average (1.6e-4 for r = 4, m = 8, n = 100,000). This is accepted: their noise
    differs, and avoiding it would chain each epoch to the one before.

    Args:
        bucket_sizes: Pairs in each bucket, in an order that the snapshot fixes; 0 is allowed.
        micro_batch_size: m, the pairs of one forward pass.
        global_batch_size: Pairs of one optimizer step, over all ranks; a multiple of m.
        seed: The run's seed.

    Raises:
        ConfigError: There are no pairs, or global_batch_size is not a multiple of micro_batch_size.
    """

    bucket_sizes: Sequence[int]
    micro_batch_size: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        sizes = tuple(int(size) for size in self.bucket_sizes)
        object.__setattr__(self, "bucket_sizes", sizes)
        if any(size < 0 for size in sizes):
            raise ValueError(f"A bucket size is negative: {sizes}.")
        if sum(sizes) == 0:
            raise ConfigError(
                f"There are no pairs to train on: {len(sizes)} buckets, 0 pairs.",
                hint="`mapo data show STORAGE` counts the kept pairs and says why others were left out.",
            )
        m, total = self.micro_batch_size, self.global_batch_size
        if m < 1:
            raise ConfigError(f"train.micro_batch_size is {m}.", hint="set it to 1 or more.")
        if total < m or total % m:
            below = max(total // m, 1) * m
            raise ConfigError(
                f"train.global_batch_size is {total}, not a multiple of train.micro_batch_size, {m}.",
                hint=f"set train.global_batch_size to {below} or {below + m}, or change the micro-batch size.",
            )

    @property
    def num_slots(self) -> int:
        """G, the groups of one global batch."""
        return self.global_batch_size // self.micro_batch_size

    def group(self, step: int, slot: int) -> PairGroup:
        """Return the pairs of one slot of one global batch; steps can be asked for in any order."""
        if step < 0 or not 0 <= slot < self.num_slots:
            raise ValueError(f"No slot {slot} of step {step}: slots are 0 to {self.num_slots - 1}.")
        running = step * self.num_slots + slot
        epoch = self._epoch_of_group(running)
        firsts = [epoch * size // self.micro_batch_size for size in self.bucket_sizes]
        lasts = [(epoch + 1) * size // self.micro_batch_size for size in self.bucket_sizes]
        counts = [last - first for first, last in zip(firsts, lasts, strict=True)]
        rank = np.array([running - sum(firsts)])
        dealt = int(permute(rank, sum(counts), _hash("deal", self.seed, epoch))[0])
        for bucket, (low, high) in enumerate(pairwise(accumulate(counts, initial=0))):
            if dealt < high:
                elements = self._elements(bucket, firsts[bucket] + dealt - low)
                return PairGroup(bucket=bucket, elements=elements, epoch=epoch)
        raise AssertionError(f"group {dealt} of {sum(counts)} belongs to no bucket")

    def slots_of(self, rank: int, world_size: int) -> list[tuple[int, float]]:
        """Return the slots a rank takes in each step, in accumulation order, each with the weight of its mean loss.

        Every rank has the same number, because ZeRO communicates in each backward pass. Where the slots cannot be
        shared evenly, some ranks repeat their last slot with weight 0. With these weights, the mean over the ranks of
        each rank's mean over its slots is the mean over the global batch; they are 1 where slots are shared evenly.

        Raises:
            ConfigError: There are fewer slots than ranks.
        """
        turns = self.accumulation_steps(world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"No rank {rank}: ranks are 0 to {world_size - 1}.")
        slots = range(rank, self.num_slots, world_size)
        weight = turns * world_size / self.num_slots
        return [(slot, weight) for slot in slots] + [(slots[-1], 0.0)] * (turns - len(slots))

    def accumulation_steps(self, world_size: int) -> int:
        """Return the micro-batches each rank adds up before the optimizer step.

        Raises:
            ConfigError: There are fewer slots than ranks.
        """
        if not 1 <= world_size <= self.num_slots:
            raise ConfigError(
                f"A global batch of {self.global_batch_size} pairs is {self.num_slots} micro-batches of "
                f"{self.micro_batch_size}, too few for {world_size} workers.",
                hint=f"set train.num_workers to {self.num_slots} at most, or lower train.micro_batch_size.",
            )
        return -(-self.num_slots // world_size)

    def seen(self, num_steps: int) -> list[NDArray[np.bool_]]:
        """Return for each bucket which of its elements the first `num_steps` steps contain; one byte an element.

        Whole epochs need no computation but their end; the groups of a started epoch can lie anywhere in it.
        """
        m, running = self.micro_batch_size, num_steps * self.num_slots
        epoch = self._epoch_of_group(running)
        firsts = [epoch * size // m for size in self.bucket_sizes]
        counts = [(epoch + 1) * size // m - first for size, first in zip(self.bucket_sizes, firsts, strict=True)]
        begun = np.arange(running - sum(firsts), dtype=np.int64)
        dealt = np.sort(permute(begun, sum(counts), _hash("deal", self.seed, epoch))) if begun.size else begun
        found = []
        for bucket, (low, high) in enumerate(pairwise(accumulate(counts, initial=0))):
            size, first = self.bucket_sizes[bucket], firsts[bucket]
            mask = np.zeros(size, bool)
            groups = first + dealt[np.searchsorted(dealt, low) : np.searchsorted(dealt, high)] - low
            if first * m >= size > 0:
                mask[:] = True
            elif size:
                positions = (groups[:, None] * m + np.arange(m)).ravel()
                self._mark(mask, bucket, np.concatenate([np.arange(first * m), positions]))
            found.append(mask)
        return found

    def _mark(self, mask: NDArray[np.bool_], bucket: int, positions: NDArray[np.int64]) -> None:
        """Set what lies at these positions of a bucket's endless sequence."""
        size = self.bucket_sizes[bucket]
        for turn in np.unique(positions // size).tolist():
            inside = positions[positions // size == turn] - turn * size
            mask[permute(inside, size, _hash("bucket", self.seed, bucket, turn))] = True

    def _groups_before(self, epoch: int) -> int:
        return sum(epoch * size // self.micro_batch_size for size in self.bucket_sizes)

    def _epoch_of_group(self, running: int) -> int:
        """Return the epoch e with groups_before(e) <= running < groups_before(e + 1).

        groups_before(e) <= e * n / m, so the first guess is never too late; rounding down in each
        bucket makes it too early by at most m epochs.
        """
        epoch = running * self.micro_batch_size // sum(self.bucket_sizes)
        while self._groups_before(epoch + 1) <= running:
            epoch += 1
        return epoch

    def _elements(self, bucket: int, group: int) -> NDArray[np.int64]:
        size = self.bucket_sizes[bucket]
        epoch, offset = divmod(group * self.micro_batch_size, size)
        positions = np.arange(offset, offset + self.micro_batch_size, dtype=np.int64)
        parts = []
        for turn in range(int(positions[-1]) // size + 1):  # more than one only across an epoch's end
            inside = positions[positions // size == turn] - turn * size
            parts.append(permute(inside, size, _hash("bucket", self.seed, bucket, epoch + turn)))
        return np.concatenate(parts)


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Apply a pseudo-random bijection of range(size), element by element and without extra memory.

    A Feistel network over the next power of four; results outside range(size) go through it again
    until they are inside (cycle walking, under 4 times on average). Up to 256 elements are sorted by hash
    instead, which makes each of the size! orders equally likely.

    Args:
        index: Any indices in range(size), in any order.
        size: The number of elements, 1 to 2^62.
        key: 64 bits that choose the bijection.
    """
    if index.size and (index.min() < 0 or index.max() >= size):
        raise ValueError(f"indices {index.min()}..{index.max()} are not all in range({size})")
    if size <= _MAX_SORTED:
        return np.argsort(_stream(key, size), kind="stable").astype(np.int64, copy=False)[index]
    half = ((size - 1).bit_length() + 1) // 2
    round_keys = _stream(key, _NUM_ROUNDS)
    result = _feistel(index.astype(np.uint64), half, round_keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _feistel(result[outside], half, round_keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def num_visits(bucket_sizes: Sequence[int], kinds: Sequence[str]) -> list[int]:
    """Return how often an epoch visits the rows of each bucket, so that images of a class and all others balance.

    The rows of whichever are fewer are visited round(other / fewer) times, halves rounded up; the others once. An
    element e of a bucket of n rows, from 0 to n * visits, is row e % n.

    Args:
        bucket_sizes: Rows in each bucket.
        kinds: The kind of each bucket; `prior` are the images of a class.
    """
    is_prior = [kind == PRIOR for kind in kinds]
    of_class = sum(size for size, prior in zip(bucket_sizes, is_prior, strict=True) if prior)
    fewer, more = sorted((of_class, sum(bucket_sizes) - of_class))
    visits = (2 * more + fewer) // (2 * fewer) if fewer else 1
    return [visits if prior == (of_class == fewer) else 1 for prior in is_prior]


def noise_seed(seed: int, step: int, slot: int) -> int:
    """Return 63 bits for the noise and timesteps of one slot; the same on any number of workers."""
    return _hash("noise", seed, step, slot) >> 1


def flips_of(seed: int, step: int, slot: int, num_pairs: int, flips: Flips) -> list[tuple[bool, bool]]:
    """Draw which images of a slot's pairs are read mirrored, image 0 and image 1 of each, by fair coins.

    Args:
        seed: The run's seed.
        step: The optimizer step.
        slot: The micro-batch within the global batch.
        num_pairs: Pairs in the micro-batch.
        flips: none, one coin for both images of a pair, or one for each image.
    """
    if flips == "none":
        return [(False, False)] * num_pairs
    drawn = hashlib.shake_256(repr(["flips", int(seed), int(step), int(slot)]).encode()).digest(2 * num_pairs)
    coins = [byte & 1 == 1 for byte in drawn]
    zeroth, first = coins[::2], coins[1::2]
    return list(zip(zeroth, zeroth if flips == "pair" else first, strict=True))


def validation_seed(seed: int, pair_key: str) -> int:
    """Return 63 bits for the noise and timesteps of a validation pair; the same at every validation."""
    return _hash("validation", seed, pair_key) >> 1


def _feistel(value: NDArray[np.uint64], half: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask, drop = np.uint64(half), np.uint64((1 << half) - 1), np.uint64(64 - half)
    left, right = value >> shift, value & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) >> drop)
    return (left << shift) | right


def _stream(key: int, count: int) -> NDArray[np.uint64]:
    """Return the first `count` outputs of splitmix64 started at `key`; no two are equal."""
    start = np.array([key], dtype=np.uint64)
    return _mix(start + np.arange(1, count + 1, dtype=np.uint64) * _GAMMA)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply splitmix64's finaliser: a bijection of 64 bits in which every bit depends on every other."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def _hash(*parts: str | int) -> int:
    """Hash parts to 64 bits, the same on every machine and in every process."""
    plain = [part if isinstance(part, str) else int(part) for part in parts]  # repr(np.int64(1)) differs
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=8).digest(), "big")
