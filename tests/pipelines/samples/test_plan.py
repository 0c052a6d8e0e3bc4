"""What is drawn: by content and never by position, exactly what is missing, in units that a crash does not change."""

import itertools
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from drawings import prompts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset.layout import SAMPLES_SCHEMA, samples_table
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from pipelines.samples.drawing import WANTED_SCHEMA, Drawing, DrawnModel, Sampling
from pipelines.samples.plan import (
    Variant,
    count_missing,
    distinct_samples,
    noise_seed,
    pending_samples,
    unit_size,
    wanted_samples,
)
from pipelines.units.unit import Unit

FINGERPRINT = "f" * 32


def wanted(*texts: str, images_per_prompt: int = 1, **options: object) -> pa.Table:
    return wanted_samples(
        prompts_of(*texts), FINGERPRINT, **({"seed": 0, "images_per_prompt": images_per_prompt} | options)
    )


def drawing(rows: pa.Table) -> Drawing:
    return Drawing(DrawnModel("m", ModelSource("nowhere")), Sampling(1, 1.0, 64, 64), FINGERPRINT, rows)


def commit(storage: Storage, unit: str, rows: pa.Table, status: str = "kept") -> None:
    """As if these samples were drawn."""
    columns = {
        name: rows[name] if name in rows.column_names else pa.nulls(rows.num_rows, SAMPLES_SCHEMA.field(name).type)
        for name in SAMPLES_SCHEMA.names
    }
    columns |= {"status": pa.repeat(status, rows.num_rows), "unit": pa.repeat(unit, rows.num_rows)}
    samples_table(storage, FINGERPRINT).append(unit, pa.table(columns, schema=SAMPLES_SCHEMA))


def keys(units: list[Unit]) -> list[list[str]]:
    return [unit.rows["sample_key"].to_pylist() for unit in units]


def test_rows_are_by_prompt_then_variant_then_index() -> None:
    variants = (Variant("chosen", "Disney: "), Variant("rejected", "Realistic: "))
    rows = wanted("a cat", "a dog", images_per_prompt=2, variants=variants)
    assert rows.schema == WANTED_SCHEMA
    found = [(row["text"], row["prompt"], row["variant"], row["index"]) for row in rows.to_pylist()]
    assert found == [
        (f"{variant.prefix}{prompt}", prompt, variant.name, index)
        for prompt in ("a cat", "a dog")
        for variant in variants
        for index in (0, 1)
    ]
    assert len(set(rows["sample_key"].to_pylist())) == 8
    assert rows["prompt_id"].to_pylist() == [each.prompt_id for each in prompts_of("a cat", "a dog") for _ in range(4)]


def test_variants_share_their_noise_unless_told_otherwise() -> None:
    variants = (Variant("chosen", "x "), Variant("rejected", "y "))
    for shared_seed, num_distinct in ((True, 3), (False, 6)):
        rows = wanted("a cat", images_per_prompt=3, variants=variants, shared_seed=shared_seed)
        assert len(set(rows["seed"].to_pylist())) == num_distinct


def test_noise_has_63_bits_and_follows_from_content_alone() -> None:
    identity = prompts_of("a cat")[0].prompt_id
    named = itertools.product((0, 1), (0, 1), (None, "a"))
    seeds = {noise_seed(seed, identity, index, variant) for seed, index, variant in named}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60
    assert noise_seed(0, identity, 0) == 1945291207406639047, "another number draws every sample anew"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"variants": (Variant("plain", "x "),)},
        {"variants": (Variant("other", ""),)},
        {"texts": ("a dog",)},
    ],
    ids=str,
)
def test_everything_that_shapes_a_sample_is_in_its_key(change: dict[str, object]) -> None:
    texts = change.pop("texts", ("a cat",))
    assert set(wanted("a cat")["sample_key"].to_pylist()).isdisjoint(wanted(*texts, **change)["sample_key"].to_pylist())


def test_a_new_prompt_in_the_middle_is_all_that_is_drawn(tmp_path: Path) -> None:
    storage, texts = Storage(str(tmp_path)), [f"prompt {i}" for i in range(50)]
    before = drawing(wanted(*texts, images_per_prompt=4))
    for unit in pending_samples(storage, before, 8):
        commit(storage, unit.id, unit.rows)
    assert pending_samples(storage, before, 8) == []
    assert count_missing(storage, before) == 0
    after = drawing(wanted(*texts[:25], "a new one", *texts[25:], images_per_prompt=4))
    units = pending_samples(storage, after, 8)
    assert {text for unit in units for text in unit.rows["text"].to_pylist()} == {"a new one"}
    assert count_missing(storage, after) == sum(unit.rows.num_rows for unit in units) == 4


def test_a_sample_that_is_quarantined_is_not_drawn_again(tmp_path: Path) -> None:
    storage, plan = Storage(str(tmp_path)), drawing(wanted("a cat", "a dog"))
    commit(storage, "u", plan.wanted.slice(0, 1), "quarantined")
    assert keys(pending_samples(storage, plan, 8)) == [plan.wanted["sample_key"].to_pylist()[1:]]


@given(st.data())
@settings(max_examples=20)
def test_after_a_crash_the_units_left_are_those_of_an_undisturbed_run(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    batch_size = data.draw(st.sampled_from([1, 3, 8, 16, 40]))
    plan = drawing(wanted(*(f"prompt {i}" for i in range(data.draw(st.integers(1, 120))))))
    units = pending_samples(storage, plan, batch_size)
    assert list(itertools.chain(*keys(units))) == plan.wanted["sample_key"].to_pylist()
    assert {unit.rows.num_rows for unit in units[:-1]} <= {unit_size(batch_size)}
    done = {unit.id for unit in units if data.draw(st.booleans())}
    for unit in units:
        if unit.id in done:
            commit(storage, unit.id, unit.rows)
    left = pending_samples(storage, plan, batch_size)
    assert [unit.id for unit in left] == [unit.id for unit in units if unit.id not in done]
    assert keys(left) == keys([unit for unit in units if unit.id not in done])


@pytest.mark.parametrize(("batch_size", "size"), [(1, 32), (8, 32), (12, 36), (16, 32), (20, 40), (64, 64)])
def test_a_unit_is_whole_batches_and_about_32_samples(batch_size: int, size: int) -> None:
    assert unit_size(batch_size) == size


def test_samples_of_several_suites_are_wanted_once_in_their_order() -> None:
    one, two = wanted("a", "b", "c"), wanted("d", "b", "a", "e")
    assert distinct_samples(one, two)["text"].to_pylist() == ["a", "b", "c", "d", "e"]
    assert distinct_samples(one) == one


def test_a_sample_that_is_wanted_twice_is_drawn_once_and_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    storage, one = Storage(str(tmp_path)), wanted("a", "b", "c")
    twice = drawing(pa.concat_tables([one, wanted("d", "b"), one]))
    assert keys(pending_samples(storage, twice, 4)) == [wanted("a", "b", "c", "d")["sample_key"].to_pylist()]
    assert count_missing(storage, twice) == 4
    assert pending_samples(storage, drawing(one.slice(0, 0)), 4) == []
    assert count_missing(storage, drawing(one.slice(0, 0))) == 0


def test_planning_a_fifth_of_a_million_samples_takes_seconds_and_little_memory(tmp_path: Path) -> None:
    """A million took 0.5 s and 60 MB beside its rows (2 cores, 2026-11-30)."""
    storage, num_samples = Storage(str(tmp_path)), 200_000
    rows = wanted(*(f"a photo of thing number {i}" for i in range(num_samples // 4)), images_per_prompt=4)
    places = np.arange(num_samples)
    for number in range(4):  # all but one of a thousand, in no order
        part = places[number::4]
        commit(storage, f"u{number}", rows.take(part[part % 1000 != 7][::-1]))
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    units = pending_samples(storage, drawing(rows), 16)
    assert time.monotonic() - started < 10.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
    assert sum(unit.rows.num_rows for unit in units) == 200
