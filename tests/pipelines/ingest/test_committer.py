"""What is decided where a unit is committed: repeats, splits, ties, removed pairs; also with other writers at work."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset.key_map import KeyMap, keys_of
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import PAIRS_SCHEMA, Reason, Status, pair_key, prompt_id, split_of
from pipelines.dataset.storage import Storage
from pipelines.ingest.committer import REMOVED, Committer
from pipelines.ingest.policy import Policy, apply_policy, is_applied

Row = dict[str, Any]


def row(prompt: str, number: int = 0, *, label: float = 1.0, split: str | None = None, swapped: bool = False) -> Row:
    """A usable row as a worker gives it."""
    digests = sorted(hashlib.sha256(f"{number}/{side}".encode()).hexdigest() for side in (0, 1))[
        :: -1 if swapped else 1
    ]
    found: Row = dict.fromkeys(PAIRS_SCHEMA.names)
    found.update(prompt=prompt, prompt_id=prompt_id(prompt), label_0=label, source_split=split, status="kept")
    found.update(image_0_sha256=digests[0], image_1_sha256=digests[1], pair_key=pair_key(prompt, *digests))
    found.update(mirrored=digests[0] > digests[1])
    return found | {"unit": "u", "shard": "s.tar", "source_uri": "file", "source_row": number, "source_pair": 0}


def table_of(*rows: Row) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=PAIRS_SCHEMA)


def outcome(rows: pa.Table) -> list[tuple[str, str | None]]:
    return list(zip(rows["status"].to_pylist(), rows["reason"].to_pylist(), strict=True))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture(params=["within a unit", "across units", "across runs"])
def commit(request: pytest.FixtureRequest, storage: Storage) -> Any:
    """Commits rows one after the other in three ways; gives them as they were judged."""

    def run(*rows: Row, policy: Policy | None = None) -> list[Row]:
        committer = Committer(pairs_table(storage), policy)
        if request.param == "within a unit":
            return committer.append("u", table_of(*rows)).to_pylist()
        judged = []
        for number, each in enumerate(rows):
            if request.param == "across runs":
                committer = Committer(pairs_table(storage), policy)
            judged += committer.append(f"u{number}", table_of(each)).to_pylist()
        return judged

    return run


def test_of_equal_pairs_the_first_is_kept_and_labels_are_compared_from_one_side(commit: Any) -> None:
    found = commit(
        row("a", label=0.7), row("a", label=0.7), row("a", label=0.3, swapped=True), row("a", label=0.3), row("b")
    )
    assert [(r["status"], r["reason"]) for r in found] == [
        ("kept", None), ("duplicate", "repeated"), ("duplicate", "repeated"), ("duplicate", "conflicting_label"),
        ("kept", None),
    ]  # fmt: skip
    assert [r["shard"] for r in found] == ["s.tar", None, None, None, "s.tar"]
    assert {r["pair_key"] for r in found[:4]} == {found[0]["pair_key"]}, "a duplicate has the key of the first"


def test_what_a_source_holds_out_never_enters_training(commit: Any) -> None:
    policy = Policy(validation_ratio=0.0)  # the hash alone would train on everything
    found = commit(
        row("a", 0, split="test"),
        row("a", 1, split="train"),  # another source trains on the prompt: it is held out there too
        row("a", 2),
        row("b", 3, split="train"),
        row("b", 4, split="validation"),  # too late: the prompt is trained on
        row("b", 5),
        row("c", 6, split="validation"),
        row("c", 7, split="test"),
        policy=policy,
    )
    assert [(r["split"], r["reason"]) for r in found] == [
        ("test", None), ("test", None), ("test", None), ("train", None), ("train", "split_conflict"), ("train", None),
        ("validation", None), ("validation", None),
    ]  # fmt: skip
    assert found[4]["status"] == "quarantined"
    by_prompt: dict[str, set[str]] = {}
    for r in found:
        if r["status"] == "kept":
            by_prompt.setdefault(r["prompt"], set()).add(r["split"])
    assert all(len(splits) == 1 for splits in by_prompt.values())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.sampled_from([None, "train", "validation", "test"])),
        min_size=1, max_size=14,
    ),
    st.integers(1, 5),
)  # fmt: skip
def test_no_prompt_is_in_two_splits_and_no_pair_is_kept_twice(
    tmp_path_factory: pytest.TempPathFactory, given_rows: list[tuple[str, int, str | None]], unit_size: int
) -> None:
    table = pairs_table(Storage(str(tmp_path_factory.mktemp("property"))))
    committer = Committer(table, Policy(validation_ratio=0.5))
    rows = [row(prompt, number, split=split) for prompt, number, split in given_rows]
    for start in range(0, len(rows), unit_size):
        committer.append(f"u{start}", table_of(*rows[start : start + unit_size]))
    found = table.read().to_pylist()
    assert len(found) == len(rows), "every row is in the table"
    kept = [r for r in found if r["status"] == "kept"]
    assert len({r["pair_key"] for r in kept}) == len(kept)
    splits: dict[str, set[str]] = {}
    for r in kept:
        splits.setdefault(r["prompt"], set()).add(r["split"])
        if r["source_split"] in ("validation", "test"):
            assert r["split"] != "train"
    assert all(len(both) == 1 for both in splits.values())


@pytest.mark.parametrize(
    ("policy", "label", "wanted"),
    [
        (Policy(), 0.5, ("tie", "equal_preference")),
        (Policy(), 0.51, ("kept", None)),
        (Policy(min_vote_share=0.6), 0.59, ("tie", "weak_preference")),
        (Policy(min_vote_share=0.6), 0.6, ("kept", None)),
        (Policy(min_vote_share=0.6), 1 - 0.6, ("kept", None)),
        (Policy(min_vote_share=0.6), 0.5, ("tie", "equal_preference")),
        (Policy(min_vote_share=1.0), 1.0, ("kept", None)),
        (Policy(min_vote_share=1.0), 0.99, ("tie", "weak_preference")),
        (Policy(ties="keep"), 0.5, ("kept", None)),
    ],
)
def test_a_tie_is_what_the_policy_says(storage: Storage, policy: Policy, label: float, wanted: tuple[str, Any]) -> None:
    committer = Committer(pairs_table(storage), policy)
    assert outcome(committer.append("u", table_of(row("a", label=label)))) == [wanted]


def test_another_policy_changes_rows_and_nothing_else_and_back_again(storage: Storage) -> None:
    labels = [0.5, 0.55, 0.7, 0.0, 1.0]
    rows = [row(f"prompt {i}", i, label=label) for i, label in enumerate(labels)]
    rows += [row(f"own {i}", 100 + i, split="train") for i in range(3)] + [row("prompt 0", 200), row("own 1", 201)]
    table, first = pairs_table(storage), Policy(validation_ratio=0.0)
    Committer(table, first).append("u", table_of(*rows))
    before = sorted(table.read().to_pylist(), key=lambda r: r["source_row"])
    assert is_applied(first, table)
    other = Policy(validation_ratio=0.9, min_vote_share=0.6)
    assert not is_applied(other, table)
    assert apply_policy(other, table) > 0
    assert is_applied(other, table)
    assert apply_policy(other, table) == 0, "and then there is nothing left to do"
    after = sorted(table.read().to_pylist(), key=lambda r: r["source_row"])
    fresh = Storage(f"{storage.url}-fresh")
    Committer(pairs_table(fresh), other).append("u", table_of(*rows))
    wanted = sorted(pairs_table(fresh).read().to_pylist(), key=lambda r: r["source_row"])
    assert after == wanted, "as if it had been so from the start"
    assert apply_policy(Policy(validation_ratio=0.0, ties="keep"), table) > 0
    assert set(table.read(["status"])["status"].to_pylist()) == {"kept"}
    apply_policy(first, table)
    assert sorted(table.read().to_pylist(), key=lambda r: r["source_row"]) == before


def test_a_removed_pair_stays_away(storage: Storage) -> None:
    table = pairs_table(storage)
    committer = Committer(table)
    committer.append("u", table_of(row("a", 0), row("b", 1)))
    gone = row("a", 0)["pair_key"]

    def remove(rows: pa.Table) -> pa.Table:
        blank = {"status": "quarantined", "reason": "removed", "prompt": None, "image_0_sha256": None}
        return table_of(*(r | blank if r["pair_key"] == gone else r for r in rows.to_pylist()))

    table.rewrite(remove, pc.field("pair_key") == gone, name="remove")
    for again in (committer, Committer(table)):
        (found,) = again.append(f"again {id(again)}", table_of(row("a", 0, swapped=True))).to_pylist()
        assert (found["status"], found["reason"]) == (str(Status.QUARANTINED), str(Reason.REMOVED))
        assert found["prompt"] is found["image_0_sha256"] is found["shard"] is None
        assert found["pair_key"] == gone


def test_writers_at_once_keep_each_pair_once_whoever_is_first(storage: Storage) -> None:
    """Four writers of different units with the same pairs: what one judged is void once another has committed."""

    def write(writer: int) -> None:
        committer = Committer(pairs_table(storage), Policy(validation_ratio=0.5))
        for unit in range(3):
            rows = [row(f"prompt {i % 5}", i, split="test" if writer == 0 else None) for i in range(unit, unit + 6)]
            committer.append(f"{writer}/{unit}", table_of(*rows))

    with ThreadPoolExecutor(4) as writers:
        list(writers.map(write, range(4)))
    found = pairs_table(storage).read().to_pylist()
    kept = [r for r in found if r["status"] == "kept"]
    assert len(found) == 4 * 3 * 6
    assert len({r["pair_key"] for r in kept}) == len(kept)
    splits = {(r["prompt"], r["split"]) for r in kept}
    assert len(splits) == len({prompt for prompt, _ in splits})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 9)), max_size=9), max_size=9))
def test_a_key_map_is_a_dict_whose_first_values_stay(batches: list[list[tuple[int, int, int]]]) -> None:
    """High halves are few, so that different keys share them."""
    found, wanted = KeyMap(), dict[tuple[int, int], float]()
    for batch in batches:
        keys = np.array([key[:2] for key in batch], np.uint64).reshape(-1, 2)
        found.add(keys, np.array([key[2] for key in batch], np.float32))
        for high, low, value in batch:
            wanted.setdefault((high, low), float(value))
    everything = np.array([(i, j) for i in range(7) for j in range(4)], np.uint64)
    values = [wanted.get((int(i), int(j))) for i, j in everything]
    assert [None if np.isnan(v) else float(v) for v in found.get(everything)] == values
    assert len(found) == len(wanted)


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=20), st.integers(0, 5))
def test_keys_are_the_numbers_that_their_digits_say(keys: list[bytes], skipped: int) -> None:
    column = pa.chunked_array([[key.hex() for key in keys[:3]], [key.hex() for key in keys[3:]]], pa.string())
    wanted = [[int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")] for key in keys[skipped:]]
    assert keys_of(column.slice(skipped)).tolist() == wanted
    assert REMOVED < 0, "no label is that"


@given(st.text(max_size=8), st.floats(0, 1, exclude_max=True))
def test_the_border_of_a_split_is_where_its_number_is(prompt: str, ratio: float) -> None:
    identity = prompt_id(prompt)
    assert (split_of(identity, ratio) == "validation") == (int(identity[:16], 16) < int(ratio * 2**64))
