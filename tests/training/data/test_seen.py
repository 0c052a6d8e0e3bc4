"""Which pairs the first steps have seen is what the groups of these steps hold, counted without going through them."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.order import Plan


def seen_by_hand(plan: Plan, num_steps: int) -> list[np.ndarray]:
    found = [np.zeros(size, bool) for size in plan.bucket_sizes]
    for step in range(num_steps):
        for slot in range(plan.num_slots):
            group = plan.group(step, slot)
            found[group.bucket][group.elements] = True
    return found


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any),
    micro=st.integers(1, 7),
    slots=st.integers(1, 4),
    steps=st.integers(0, 12),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_seen_is_what_the_groups_hold(sizes: list[int], micro: int, slots: int, steps: int, seed: int) -> None:
    plan = Plan(sizes, micro, micro * slots, seed)
    for found, expected in zip(plan.seen(steps), seen_by_hand(plan, steps), strict=True):
        assert np.array_equal(found, expected)


def test_a_bucket_above_the_size_that_is_sorted_is_no_other_case() -> None:
    plan = Plan([1000, 300, 17], 8, 64, 3)
    for steps in (1, 7, 20, 21, 45):
        for found, expected in zip(plan.seen(steps), seen_by_hand(plan, steps), strict=True):
            assert np.array_equal(found, expected)


def test_ten_million_pairs_take_seconds() -> None:
    plan = Plan([6_000_000, 3_000_000, 1_000_000], 8, 2048, 0)
    started = time.monotonic()
    seen = plan.seen(2000)
    assert time.monotonic() - started < 20
    assert sum(int(each.sum()) for each in seen) == 2000 * 2048, "less than an epoch: no pair twice"
