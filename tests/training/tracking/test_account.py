"""The account of what was trained on: equal for the same pairs at the same steps, whoever trained on them."""

from hypothesis import given
from hypothesis import strategies as st

from training.tracking.account import ConsumedPairs

BATCHES = [(step, slot, [f"{step}-{slot}-{i}" for i in range(2)]) for step in range(5) for slot in range(12)]


def account(batches) -> ConsumedPairs:
    consumed = ConsumedPairs()
    for batch in batches:
        consumed.add(*batch)
    return consumed


@given(world_size=st.integers(1, 12))
def test_it_is_the_same_on_any_number_of_ranks(world_size: int) -> None:
    ranks = [account(batch for batch in BATCHES if batch[1] % world_size == rank) for rank in range(world_size)]
    together = ConsumedPairs.sum(rank.to_dict() for rank in ranks)
    assert together == account(BATCHES)
    assert together.num_pairs == 120


def test_a_batch_twice_missed_or_at_another_step_is_another_account() -> None:
    whole = account(BATCHES).digest
    step, slot, keys = BATCHES[7]
    for changed in (
        [*BATCHES, BATCHES[7]],
        BATCHES[:-1],
        [*BATCHES[:7], (step + 1, slot, keys), *BATCHES[8:]],
        [*BATCHES[:7], (step, slot, keys[::-1]), *BATCHES[8:]],
    ):
        assert account(changed).digest != whole
