"""The plan of scoring: what is missing, each score once, in units that do not follow from what is done."""

import os
import time
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scored_images import formula_files, place_of, write_images

from pipelines.config import ScorerEntry
from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import SCORES_SCHEMA
from pipelines.dataset.storage import Storage
from pipelines.scores.images import IMAGES_SCHEMA, PLACE, contexts, first_of_each, keys_of_images, places_in
from pipelines.scores.judges import Judge
from pipelines.scores.plan import IMAGES_A_UNIT, commit_id, images_a_unit, pending_scores, read_scores, table_of

NUM_JUDGES = 5


def judge(number: int, *needs: str) -> Judge:
    entry = ScorerEntry(name="saturation")
    return Judge(f"judge-{number}", entry, f"{number:032x}", ("image", "prompt", *needs), "", True, "", "", None)


def digests(count: int, num_bytes: int, seed: int) -> pa.Array:
    text, width = np.random.default_rng(seed).bytes(count * num_bytes).hex(), 2 * num_bytes
    return pa.array([text[start : start + width] for start in range(0, len(text), width)])


def made_up(count: int, *, images_per_prompt: int = 4) -> pa.Table:
    """A table of images that do not exist."""
    prompt = np.arange(count) // images_per_prompt
    return pa.table(
        {
            "image_sha256": digests(count, 32, 1),
            "prompt_id": digests(count // images_per_prompt + 1, 16, 2).take(pa.array(prompt)),
            "prompt": pa.array([f"a photo of something, number {number}, with some more words" for number in prompt]),
            "shard": pa.array([f"dataset/samples/{'0' * 32}/{number // 128:032x}.tar" for number in range(count)]),
            "offset": pa.array(np.arange(count) * 1000),
            "length": pa.array(np.full(count, 1000)),
        }
    )


def commit(storage: Storage, by: Judge, images: pa.Table, unit: str = "unit") -> None:
    """Scores of images, each its position."""
    count = images.num_rows
    rows = pa.table(
        {
            "image_sha256": images["image_sha256"], "prompt_id": images["prompt_id"],
            "context": contexts(images, by.needs), "value": pa.array(np.arange(count, dtype=float)),
            "components": pa.repeat("{}", count), "status": pa.repeat("scored", count),
            "reason": pa.nulls(count, pa.string()), "unit": pa.repeat(unit, count),
        }, schema=SCORES_SCHEMA,
    )  # fmt: skip
    table_of(storage, by).append(unit, rows)


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_planning_five_scorers_of_a_million_samples_takes_seconds(storage: Storage, count: int) -> None:
    images, judges = made_up(count), [judge(number) for number in range(NUM_JUDGES)]
    for each in judges[:-1]:
        commit(storage, each, images)
    commit(storage, judges[-1], images.slice(0, count // 2))
    process, started = psutil.Process(os.getpid()), time.process_time()
    before = process.memory_info().rss
    todo = pending_scores(storage, judges, images)
    assert time.process_time() - started < 20 * count / 1_000_000 + 2, "of CPU time, whatever else runs"
    assert process.memory_info().rss - before < 2e9
    assert todo.num_missing == (0, 0, 0, 0, count - count // 2)
    assert sum(unit.rows.num_rows for unit in todo.units) == count - count // 2


def test_units_follow_from_all_images_and_a_commit_from_its_judge_alone(storage: Storage) -> None:
    images, (one, two) = made_up(1000), (judge(1), judge(2))
    first = pending_scores(storage, [one], images).units
    both = pending_scores(storage, [two, one], images.take(pa.array(np.random.default_rng(0).permutation(1000)))).units
    assert [unit.rows.num_rows for unit in first] == [IMAGES_A_UNIT] * 31 + [1000 - 31 * IMAGES_A_UNIT]
    assert [images_a_unit(count) for count in (1, 4096, 10_000, 10**6)] == [32, 64, 128, 256]
    keys = [[unit.rows["image_sha256"].to_pylist() for unit in units] for units in (first, both)]
    assert keys[0] == keys[1]
    commit(storage, one, first[1].rows)
    left = pending_scores(storage, [one, two], images)
    assert [unit.rows["image_sha256"].to_pylist() for unit in left.units] == keys[0], "the other judge needs all"
    assert left.num_missing == (1000 - IMAGES_A_UNIT, 1000)
    left = pending_scores(storage, [one], images)
    assert [unit.rows["image_sha256"].to_pylist() for unit in left.units] == [keys[0][0], *keys[0][2:]]
    rows = first[0].rows.append_column("context", pa.repeat("", IMAGES_A_UNIT))
    assert commit_id(one, rows) == commit_id(one, rows.drop_columns(["prompt"]))
    assert commit_id(one, rows) != commit_id(two, rows)
    assert commit_id(one, rows) != commit_id(one, rows.slice(1))


def test_an_image_of_several_models_or_rows_is_scored_once(storage: Storage) -> None:
    images = made_up(40)
    elsewhere = images.set_column(3, "shard", pa.repeat("dataset/samples/other.tar", 40))
    todo = pending_scores(storage, [judge(1)], pa.concat_tables([images, elsewhere, images]))
    assert todo.total == 40
    assert [unit.rows.num_rows for unit in todo.units] == [32, 8]


def test_scores_come_back_in_the_order_of_the_images_and_a_missing_one_is_an_error(storage: Storage) -> None:
    images, by = made_up(40), judge(1)
    commit(storage, by, images)
    order = np.random.default_rng(1).integers(0, 40, 100)
    assert read_scores(storage, by, images.take(pa.array(order)))["value"].to_pylist() == order.tolist()
    commit(storage, by, images, "another driver with other units")
    assert read_scores(storage, by, images)["value"].to_pylist() == list(range(40))
    with pytest.raises(SnapshotError, match=r"4 of 44 images have no score of judge-1"):
        read_scores(storage, by, made_up(44).slice(0, 44))
    assert read_scores(storage, by, images.slice(0, 0)).num_rows == 0


def test_a_context_is_of_the_digests_that_the_scorer_looks_at(storage: Storage) -> None:
    images = write_images(storage, "a", formula_files(4), ["a", "a", "a", "b"], siblings=True)
    assert contexts(images, ("image", "prompt")).to_pylist() == [""] * 4
    found = contexts(images, ("image", "siblings"))
    assert len(set(found.to_pylist())) == 4
    assert all(len(each) == 32 for each in found.to_pylist())
    assert contexts(images.slice(1, 2), ("siblings",)).to_pylist() == found.to_pylist()[1:3], "slices have no context"
    chunked = pa.concat_tables([images.slice(0, 1), images.slice(1)])
    assert contexts(chunked, ("siblings",)) == found
    none = images.set_column(images.column_names.index("siblings"), "siblings", pa.nulls(4, pa.list_(PLACE)))
    assert len(set(contexts(none, ("siblings",)).to_pylist())) == 1
    moved = [[{**place, "shard": "x", "offset": 1} for place in row] for row in images["siblings"].to_pylist()]
    assert contexts(images.set_column(6, "siblings", pa.array(moved, pa.list_(PLACE))), ("siblings",)) == found
    asked = images.append_column("questions", pa.array(['["a"]', '["a"]', '["b"]', None]))
    by_text = contexts(asked, ("questions",)).to_pylist()
    assert by_text[0] == by_text[1] != by_text[2]


def test_rows_without_digest_or_place_are_refused(storage: Storage) -> None:
    images = made_up(4)
    for name in ("image_sha256", "prompt_id", "shard"):
        column = pa.array([None, *images[name].to_pylist()[1:]])
        broken = images.set_column(images.column_names.index(name), name, column)
        with pytest.raises(SnapshotError, match=rf"1 of 4 images to score have no {name}"):
            pending_scores(storage, [judge(1)], broken)
    odd = images.set_column(1, "prompt_id", pa.array(["abc", *images["prompt_id"].to_pylist()[1:]]))
    with pytest.raises(SnapshotError, match="hexadecimal"):
        pending_scores(storage, [judge(1)], odd)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30), st.lists(st.integers(0, 40), max_size=9))
def test_keys_are_found_where_they_are(pairs: list[tuple[int, int]], wanted: list[int]) -> None:
    known = np.array(pairs, np.uint64).reshape(-1, 2)
    asked = np.array([[each % 5, each // 5] for each in wanted], np.uint64).reshape(-1, 2)
    for place, key in zip(places_in(known, asked), asked.tolist(), strict=True):
        assert (place == -1 and tuple(key) not in pairs) or tuple(known[place]) == tuple(key)
    is_first = first_of_each(known)
    assert [pairs[row] for row in np.flatnonzero(is_first)] == list(dict.fromkeys(pairs))


def test_keys_of_different_images_prompts_and_contexts_differ() -> None:
    image, other = digests(2, 32, 7).to_pylist()
    prompt, another = digests(2, 16, 8).to_pylist()
    rows: list[dict[str, Any]] = [
        {"image_sha256": sha256, "prompt_id": text, "prompt": "", "shard": "s", "offset": 0, "length": 1,
         "siblings": siblings}
        for sha256 in (image, other) for text in (prompt, another)
        for siblings in ([], [place_of({"shard": "s", "offset": 0, "length": 1, "image_sha256": other})])
    ]  # fmt: skip
    schema = pa.schema([field for field in IMAGES_SCHEMA if field.name in rows[0]])
    keys = keys_of_images(pa.Table.from_pylist(rows, schema=schema), ("siblings",))
    assert len({tuple(key) for key in keys.tolist()}) == 8
