"""The order of pairs: nothing lost, nothing favoured, the same on any number of workers."""

import time
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.dataset.errors import ConfigError
from training.data.order import Plan, noise_seed, permute, validation_seed

KEYS = st.integers(0, 2**64 - 1)
GOLDEN_BATCHES = [
    [(1, [94, 291, 234, 55]), (1, [34, 179, 15, 78])],
    [(1, [255, 229, 18, 174]), (1, [149, 195, 274, 258])],
]
GOLDEN_PERMUTE = [48019634, 63384215, 97038677, 54716956]
GOLDEN_SEEDS = (24217142584474093, 2005384752891530171)
BUCKETS = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)


def global_batch(plan: Plan, step: int) -> list[tuple[int, list[int]]]:
    groups = [plan.group(step, slot) for slot in range(plan.num_slots)]
    return [(group.bucket, group.elements.tolist()) for group in groups]


def groups_by_bucket(plan: Plan, num_groups: int) -> dict[int, list[NDArray[np.int64]]]:
    """The first groups of the run, as each bucket saw them."""
    found: dict[int, list[NDArray[np.int64]]] = {}
    for running in range(num_groups):
        group = plan.group(*divmod(running, plan.num_slots))
        found.setdefault(group.bucket, []).append(group.elements)
    return found


@given(size=st.integers(1, 3000), key=KEYS)
@settings(max_examples=60)
def test_permute_takes_every_index_to_a_different_one(size: int, key: int) -> None:
    everything = permute(np.arange(size), size, key)
    assert everything.dtype == np.int64
    assert np.array_equal(np.sort(everything), np.arange(size))


@given(size=st.integers(1, 2000), key=KEYS, data=st.data())
@settings(max_examples=60)
def test_permute_of_a_few_indices_is_that_of_all_of_them(size: int, key: int, data: st.DataObject) -> None:
    chosen = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=np.int64)
    assert np.array_equal(permute(chosen, size, key), permute(np.arange(size), size, key)[chosen])


@pytest.mark.parametrize("size", [2**20, 1_000_003])
def test_permute_of_a_million_hits_every_index_once(size: int) -> None:
    assert (np.bincount(permute(np.arange(size), size, key=5), minlength=size) == 1).all()


@pytest.mark.parametrize("size", [10**8, 10**12 + 39, 2**62])
def test_permute_of_huge_sizes_stays_inside_and_never_repeats(size: int) -> None:
    some = permute(np.arange(100_000) + (size - 100_000), size, key=11)
    assert some.min() >= 0
    assert some.max() < size
    assert len(np.unique(some)) == len(some)


def chi_square_is_plausible(counts: NDArray[np.int64]) -> bool:
    """Within 6 standard deviations of what chance gives for equally likely cells."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    return bool(abs(((counts - expected) ** 2 / expected).sum() - degrees) < 6 * (2 * degrees) ** 0.5)


@pytest.mark.parametrize("size", [3, 16, 256, 257, 1000])
def test_over_many_keys_every_index_goes_everywhere_equally_often(size: int) -> None:
    probes = np.array([0, 1, size // 2, size - 1])
    images = np.array([permute(probes, size, key) for key in range(3000)])
    for column in images.T:
        assert chi_square_is_plausible(np.bincount(column * min(size, 16) // size, minlength=min(size, 16)))


@pytest.mark.parametrize("size", [256, 257, 5000])
def test_neighbours_are_not_kept_together(size: int) -> None:
    steps = np.concatenate([np.diff(permute(np.arange(size), size, key)) % size for key in range(40)])
    assert chi_square_is_plausible(np.bincount((steps - 1) * 15 // (size - 1), minlength=15))
    fixed = sum(int((permute(np.arange(size), size, key) == np.arange(size)).sum()) for key in range(400))
    assert 300 < fixed < 500  # one a permutation is what chance gives


def test_permute_refuses_an_index_outside() -> None:
    with pytest.raises(ValueError, match=r"3\.\.9 are not all in range\(9\)"):
        permute(np.array([3, 9]), 9, key=0)


@given(sizes=BUCKETS, m=st.integers(1, 6), seed=st.integers(0, 99), epochs=st.integers(1, 4))
@settings(max_examples=80)
def test_after_whole_epochs_every_pair_was_seen_once_an_epoch_but_for_less_than_a_group(
    sizes: list[int], m: int, seed: int, epochs: int
) -> None:
    plan = Plan(sizes, m, 2 * m, seed)
    found = groups_by_bucket(plan, sum(epochs * size // m for size in sizes))
    for bucket, size in enumerate(sizes):
        groups = found.get(bucket, [])
        assert len(groups) == epochs * size // m
        visits = Counter(np.concatenate([np.arange(size), *groups]).tolist())  # one more each, so that all are there
        missing = [epochs + 1 - visits[pair] for pair in range(size)]
        assert sum(missing) == epochs * size % m
        assert all(each >= 0 for each in missing)


@given(sizes=BUCKETS, m=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_after_m_epochs_the_counts_are_exact_in_every_bucket_however_small(sizes: list[int], m: int, seed: int) -> None:
    plan = Plan(sizes, m, m, seed)
    found = groups_by_bucket(plan, sum(sizes))  # m epochs of n pairs are n groups of m
    for bucket, size in enumerate(sizes):
        if size:
            assert np.bincount(np.concatenate(found[bucket]), minlength=size).tolist() == [m] * size


def test_a_bucket_smaller_than_a_group_is_visited_as_often_as_the_others() -> None:
    plan = Plan([1, 3, 50, 500], micro_batch_size=8, global_batch_size=32, seed=3)
    num_epochs = 25
    found = groups_by_bucket(plan, sum(num_epochs * size // 8 for size in plan.bucket_sizes))
    for bucket, size in enumerate(plan.bucket_sizes):
        visits = sum(len(elements) for elements in found[bucket])
        assert 0 <= num_epochs * size - visits < 8


def test_an_epoch_of_a_bucket_holds_each_pair_once_wherever_groups_are_cut() -> None:
    plan = Plan([10], micro_batch_size=4, global_batch_size=4, seed=0)
    groups: dict[int, list[NDArray[np.int64]]] = {}
    for step in range(50):
        group = plan.group(step, 0)
        groups.setdefault(group.epoch, []).append(group.elements)
    assert [len(groups[epoch]) for epoch in range(6)] == [2, 3, 2, 3, 2, 3]
    visits = np.bincount(np.concatenate([g for epoch in range(20) for g in groups[epoch]]), minlength=10)
    assert visits.tolist() == [20] * 10


def test_within_one_epoch_no_pair_comes_twice_when_groups_fit() -> None:
    plan = Plan([64, 128], micro_batch_size=8, global_batch_size=24, seed=1)
    for epoch in range(3):
        seen: Counter[tuple[int, int]] = Counter()
        for running in range(epoch * 24, (epoch + 1) * 24):
            group = plan.group(*divmod(running, 3))
            assert group.epoch == epoch
            seen.update((group.bucket, element) for element in group.elements.tolist())
        assert set(seen.values()) == {1}
        assert len(seen) == 192


@given(sizes=BUCKETS, m=st.integers(1, 6), seed=st.integers(0, 99), step=st.integers(0, 10**6))
@settings(max_examples=60)
def test_a_group_is_m_pairs_of_one_bucket(sizes: list[int], m: int, seed: int, step: int) -> None:
    group = Plan(sizes, m, 3 * m, seed).group(step, 1)
    assert group.elements.shape == (m,)
    assert group.elements.dtype == np.int64
    assert group.elements.min() >= 0
    assert group.elements.max() < sizes[group.bucket]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_any_world_size_sees_the_same_global_batches(world_size: int) -> None:
    plan = Plan([100, 7, 33], micro_batch_size=4, global_batch_size=48, seed=9)
    slots = [[slot for slot, _ in plan.slots_of(rank, world_size)] for rank in range(world_size)]
    assert {len(of_rank) for of_rank in slots} == {plan.accumulation_steps(world_size)}
    assert sorted(slot for of_rank in slots for slot in of_rank) == list(range(12))
    in_order = [of_rank[turn] for turn in range(plan.accumulation_steps(world_size)) for of_rank in slots]
    assert in_order == list(range(12))  # slot = turn * world_size + rank


@pytest.mark.parametrize("world_size", range(1, 13))
def test_the_mean_over_ranks_of_means_over_turns_is_the_mean_over_the_global_batch(world_size: int) -> None:
    plan = Plan([100], micro_batch_size=4, global_batch_size=48, seed=9)
    turns, shares = plan.accumulation_steps(world_size), [plan.slots_of(r, world_size) for r in range(world_size)]
    assert {len(share) for share in shares} == {turns}, "ranks with fewer backward passes would hang"
    counts = [0.0] * 12
    for share in shares:
        for slot, weight in share:
            counts[slot] += weight / turns / world_size
    assert counts == pytest.approx([1 / 12] * 12)
    if 12 % world_size == 0:
        assert {weight for share in shares for _, weight in share} == {1.0}


def test_a_plan_restored_at_any_step_goes_on_as_the_one_that_never_stopped() -> None:
    arguments = ([100, 7, 33], 4, 16, 9)
    never_stopped = Plan(*arguments)
    history = [global_batch(never_stopped, step) for step in range(40)]
    for step in reversed(range(40)):
        assert global_batch(Plan(*arguments), step) == history[step]


def test_seeds_and_epochs_give_different_groups() -> None:
    drawn = set()
    for seed in range(5):
        plan = Plan([96], micro_batch_size=4, global_batch_size=4, seed=seed)
        for epoch in range(5):
            groups = [plan.group(step, 0).elements for step in range(epoch * 24, epoch * 24 + 24)]
            drawn.add(frozenset(tuple(elements.tolist()) for elements in groups))  # whatever the order of groups
    assert len(drawn) == 25


def test_buckets_take_turns_within_an_epoch_and_not_alike_in_the_next() -> None:
    plan = Plan([4000, 4000], micro_batch_size=8, global_batch_size=8, seed=0)
    buckets = np.array([plan.group(step, 0).bucket for step in range(2000)])
    assert buckets[:1000].sum() == buckets[1000:].sum() == 500
    assert 430 < np.count_nonzero(np.diff(buckets[:1000])) < 570  # a fair coin changes 500 times
    assert 200 < buckets[:500].sum() < 300
    assert 430 < np.count_nonzero(buckets[:1000] == buckets[1000:]) < 570


def test_the_order_of_a_seed_never_changes_between_releases() -> None:
    plan = Plan([5, 300], micro_batch_size=4, global_batch_size=8, seed=0)
    assert [global_batch(plan, step) for step in (0, 1000)] == GOLDEN_BATCHES
    assert permute(np.arange(4), 10**8, key=1).tolist() == GOLDEN_PERMUTE
    assert (noise_seed(0, 1, 2), validation_seed(0, "ab" * 16)) == GOLDEN_SEEDS


def test_numpy_integers_give_the_order_of_python_integers() -> None:
    numbers: Any = np.arange(1, 4)
    plan, same = Plan([2, 3], 1, 3, seed=1), Plan(numbers[1:], 1, 3, seed=numbers[0])
    assert global_batch(plan, 3) == global_batch(same, numbers[2])
    assert noise_seed(*numbers) == noise_seed(1, 2, 3)


def test_a_hundred_million_pairs_are_planned_at_once_in_no_memory() -> None:
    sizes = [60_000_000, 30_000_000, 9_999_999, 1]
    started = time.process_time()
    tracemalloc.start()
    plan = Plan(sizes, micro_batch_size=8, global_batch_size=2048, seed=0)
    groups = [plan.group(step, slot) for step in (0, 10**5, 10**9) for slot in range(0, 256, 4)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(group.elements.min() >= 0 and group.elements.max() < sizes[group.bucket] for group in groups)
    assert peak < 1_000_000
    assert time.process_time() - started < 5


def test_steps_and_epochs_agree() -> None:
    plan = Plan([100, 20], micro_batch_size=4, global_batch_size=16, seed=0)
    assert [plan.group(step, 0).epoch for step in (0, 7, 8, 14, 15, 22, 23)] == [0, 0, 1, 1, 2, 2, 3]


def test_many_rare_buckets_alone_skip_the_epochs_that_fill_no_group() -> None:
    plan = Plan([1] * 40, micro_batch_size=8, global_batch_size=40, seed=0)
    first = [plan.group(0, slot) for slot in range(5)]
    assert {group.epoch for group in first} == {7}
    assert all(group.elements.tolist() == [0] * 8 for group in first)
    seen = Counter(plan.group(*divmod(running, 5)).bucket for running in range(40))
    assert set(seen.values()) == {1}
    assert len(seen) == 40


def test_noise_depends_on_seed_step_and_slot_alone_and_fits_63_bits() -> None:
    seeds = [noise_seed(seed, step, slot) for seed in range(3) for step in range(20) for slot in range(20)]
    seeds += [validation_seed(seed, f"{pair:032x}") for seed in range(3) for pair in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


@pytest.mark.parametrize(
    ("sizes", "m", "total", "message", "hint"),
    [
        ([10], 8, 12, "global_batch_size is 12, not a multiple of train.micro_batch_size, 8", "8 or 16"),
        ([10], 8, 4, "global_batch_size is 4, not a multiple", "8 or 16"),
        ([10], 0, 4, "micro_batch_size is 0", "1 or more"),
        ([0, 0], 1, 1, "no pairs to train on: 2 buckets, 0 pairs", "mapo data show"),
        ([], 1, 1, "no pairs to train on: 0 buckets", "mapo data show"),
    ],
)
def test_sizes_that_cannot_be_planned_are_refused(
    sizes: list[int], m: int, total: int, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        Plan(sizes, m, total, seed=0)
    assert hint in (refused.value.hint or "")


@pytest.mark.parametrize("world_size", [0, 13, 24])
def test_more_workers_than_micro_batches_are_told_how_many_fit(world_size: int) -> None:
    plan = Plan([100], micro_batch_size=4, global_batch_size=48, seed=0)
    message = f"48 pairs is 12 micro-batches of 4, too few for {world_size} workers"
    with pytest.raises(ConfigError, match=message) as refused:
        plan.slots_of(0, world_size)
    assert "to 12 at most" in (refused.value.hint or "")


def test_a_slot_or_rank_that_does_not_exist_is_refused() -> None:
    plan = Plan([100], micro_batch_size=4, global_batch_size=48, seed=0)
    for step, slot in ((0, 12), (0, -1), (-1, 0)):
        with pytest.raises(ValueError, match="slots are 0 to 11"):
            plan.group(step, slot)
    with pytest.raises(ValueError, match="ranks are 0 to 2"):
        plan.slots_of(3, 3)
