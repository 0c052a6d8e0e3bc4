"""Keys, prompts and splits: what every other table and tar is joined on."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from pipelines.dataset.pair import NULL_PROMPT_ID, TRAIN, VALIDATION, pair_key, prompt_id, single_key, split_of

digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
prompts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(prompts, digests, digests)
def test_a_pair_has_one_key_whichever_image_is_listed_first(prompt: str, one: str, other: str) -> None:
    assert pair_key(prompt, one, other) == pair_key(prompt, other, one)


@given(st.tuples(prompts, digests, digests), st.tuples(prompts, digests, digests))
def test_two_keys_are_equal_only_for_the_same_pair(pair: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    same = pair[0] == other[0] and sorted(pair[1:]) == sorted(other[1:])
    assert (pair_key(*pair) == pair_key(*other)) == same


@given(st.tuples(prompts, digests), st.tuples(prompts, digests), digests)
def test_a_single_image_has_a_key_of_its_own(one: tuple[str, str], other: tuple[str, str], second: str) -> None:
    assert (single_key(*one) == single_key(*other)) == (one == other)
    assert single_key(*one) not in (pair_key(*one, second), pair_key(*one, one[1]))


def test_a_prompt_is_never_normalised() -> None:
    variants = ["a cat", "A cat", "a cat ", " a cat", "a  cat", "a cat\n", "a caf\u00e9", "a cafe\u0301"]
    assert len({prompt_id(prompt) for prompt in variants}) == len(variants)
    assert len({pair_key(prompt, "00" * 32, "11" * 32) for prompt in variants}) == len(variants)


def test_what_a_key_is_made_of_never_changes() -> None:
    # Keys lie in tables and tars of finished data sets: another formula would make every pair of them new.
    body = b"mapo-pair-1" + (5).to_bytes(8, "big") + b"a cat" + bytes.fromhex("00" * 32) + bytes.fromhex("11" * 32)
    assert pair_key("a cat", "11" * 32, "00" * 32) == hashlib.sha256(body).hexdigest()[:32]
    assert pair_key("a cat", "11" * 32, "00" * 32) == "e2cf13993b7606b93bfe4b7a132deeb1"
    assert single_key("a cat", "00" * 32) == hashlib.sha256(
        b"mapo-single-1" + (5).to_bytes(8, "big") + b"a cat" + bytes(32)
    ).hexdigest()[:32]  # fmt: skip
    assert prompt_id("a cat") == "51e467415607798220a3776f6ae1a2a0"


@given(prompts)
def test_no_prompt_has_the_id_of_the_null_conditioning(prompt: str) -> None:
    assert prompt_id(prompt) != NULL_PROMPT_ID


@given(prompts, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_validation_ratio_only_adds_prompts_to_the_validation_split(
    prompt: str, one: float, other: float
) -> None:
    smaller, larger = sorted((one, other))
    if split_of(prompt_id(prompt), smaller) == VALIDATION:
        assert split_of(prompt_id(prompt), larger) == VALIDATION


def test_the_split_keeps_to_its_ratio() -> None:
    held_out = sum(split_of(prompt_id(f"prompt {i}"), 0.1) == VALIDATION for i in range(10_000))
    assert 900 < held_out < 1100  # 3.3 standard deviations
    assert all(split_of(prompt_id(f"prompt {i}"), 0.0) == TRAIN for i in range(1000))
