"""Single images and weights among pairs: who is in the index, how often, in what order, and what a micro-batch has."""

import hashlib
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from deltalake import DeltaTable, write_deltalake
from encoded import write_encoded
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset import storage as storage_module
from pipelines.dataset.errors import ShardCorrupt, SnapshotError
from pipelines.dataset.layout import latents_table, pairs_table
from pipelines.dataset.pair import JUDGED, KINDS, PAIR, PRIOR
from pipelines.dataset.storage import Storage
from training.data.index import PairIndex, PairRecord, load_index, load_texts
from training.data.loader import PairLoader, PairReader
from training.data.order import Plan, flips_of, num_visits
from training.data.shard_cache import ShardCache
from training.spec import Snapshot

ORDERS = {"soft": "31bda92b6eb858e26e8cebe571ae878d", "hard": "c490d1da004f9a111f154714c77bda9e"}
"""Of 30 global batches of pairs, recorded at the commit before single images existed."""
MIXED: dict[str, Any] = {"num_train": 20, "num_judged": 10, "num_judged_validation": 4, "num_prior": 7}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def mixed(storage: Storage, tmp_path: Path) -> Snapshot:
    """Twenty pairs, ten judged images of which five are good, seven of a class; three shards, two sizes."""
    return write_encoded(storage, tmp_path, **MIXED, sides=(8, 12), num_shards=3, flips=True)


def rows_of(index: PairIndex) -> list[PairRecord]:
    sizes = enumerate(index.bucket_sizes)
    return [index.pair(bucket, element) for bucket, size in sizes for element in range(size)]


def table_row(storage: Storage, record: PairRecord) -> dict[str, Any]:
    (row,) = pairs_table(storage).read(where=pc.field("pair_key") == record.pair_key).to_pylist()
    return dict(row)


def tensors_of(batch: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_the_order_of_pairs_alone_is_the_one_recorded_before_there_were_single_images(
    storage: Storage, tmp_path: Path, labels: Any
) -> None:
    settings = {"num_train": 60, "sides": (8, 12, 16), "labels": (0.0, 0.3, 0.5, 1.0), "num_shards": 3, "flips": True}
    index = load_index(storage, write_encoded(storage, tmp_path, **settings), "train", labels=labels)  # type: ignore[arg-type]
    plan = Plan(index.bucket_sizes, 4, 16, 7)
    digest = hashlib.sha256(repr((index.buckets, index.bucket_sizes)).encode())
    for step in range(30):
        for slot in range(4):
            group = plan.group(step, slot)
            for element, sides in zip(group.elements, flips_of(7, step, slot, 4, "image"), strict=True):
                found = index.pair(group.bucket, int(element), sides)
                what = found.pair_key, found.prompt_id, found.label_0
                place = found.latents.shard, found.latents.offset, found.latents.length
                told = (*what, *place, found.origin, found.flipped, found.chosen, found.preference)
                digest.update(repr(told).encode())
                assert (found.kind, found.weight, found.is_good) == (PAIR, 1.0, True)
    assert digest.hexdigest()[:32] == ORDERS[labels]


def test_pairs_are_the_same_beside_single_images(storage: Storage, mixed: Snapshot, tmp_path: Path) -> None:
    alone = Storage(str(tmp_path / "alone"))
    others = {name: 0 for name in MIXED if name != "num_train"}
    written = write_encoded(alone, tmp_path, **MIXED | others, sides=(8, 12), num_shards=3, flips=True)
    for split, number in (("train", 20), ("validation", 6)):
        found, expected = (load_index(where, which, split) for where, which in ((storage, mixed), (alone, written)))
        assert (found.buckets, found.bucket_sizes, found.kinds) == (
            expected.buckets, expected.bucket_sizes, [PAIR] * len(found.buckets),
        )  # fmt: skip
        keys = [record.pair_key for record in rows_of(found)]
        assert keys == [record.pair_key for record in rows_of(expected)]
        assert len(found) == len(keys) == number


def test_a_record_says_what_the_table_says_and_buckets_have_one_kind(storage: Storage, mixed: Snapshot) -> None:
    index, counts = load_index(storage, mixed, "train", kinds=KINDS), Counter[str]()
    places = [(*bucket, KINDS.index(kind)) for bucket, kind in zip(index.buckets, index.kinds, strict=True)]
    assert places == sorted(set(places))
    for bucket, kind in enumerate(index.kinds):
        records = [index.pair(bucket, element) for element in range(index.bucket_sizes[bucket])]
        assert [record.pair_key for record in records] == sorted(record.pair_key for record in records)
        for record in records:
            row = table_row(storage, record)
            assert (record.kind, record.prompt_id, record.label_0) == (kind, row["prompt_id"], row["label_0"])
            assert record.kind == (row["kind"] or PAIR)
            assert (row["height_0"], row["width_0"]) == index.buckets[bucket]
            assert record.origin == f"{row['source_uri']} row {row['source_row']}"
            if kind != PAIR:
                assert (record.chosen, record.sides, record.preference, record.noun) == (0, (0,), 1.0, "image")
                assert record.is_good == (kind == PRIOR or row["label_0"] == 1.0)
            counts[kind] += 1
    assert counts == {PAIR: 20, JUDGED: 10, PRIOR: 7}
    assert Counter(record.is_good for record in rows_of(index)) == {True: 32, False: 5}


@pytest.mark.parametrize(
    ("split", "kinds", "only_good", "expected"),
    [
        ("train", (PAIR,), True, {PAIR: 20}),
        ("train", (PAIR, JUDGED), False, {PAIR: 20, JUDGED: 10}),
        ("train", (PAIR, JUDGED), True, {PAIR: 20, JUDGED: 5}),
        ("train", (JUDGED, PRIOR), True, {JUDGED: 5, PRIOR: 7}),
        ("train", (PRIOR,), False, {PRIOR: 7}),
        ("validation", KINDS, False, {PAIR: 6, JUDGED: 4}),
        ("validation", KINDS, True, {PAIR: 6, JUDGED: 2}),
    ],
)
def test_other_kinds_and_bad_images_are_left_out(
    storage: Storage, mixed: Snapshot, split: str, kinds: tuple[str, ...], only_good: bool, expected: dict[str, int]
) -> None:
    index = load_index(storage, mixed, split, kinds=kinds, only_good=only_good)
    records = rows_of(index)
    assert Counter(record.kind for record in records) == expected
    assert len(index) == len({record.pair_key for record in records}) == sum(expected.values())
    assert all(record.is_good for record in records) or not only_good


def test_hard_labels_leave_single_images_in(storage: Storage, tmp_path: Path) -> None:
    snapshot = write_encoded(storage, tmp_path, labels=(0.0, 0.5, 0.7), num_judged=6, num_prior=2)
    records = rows_of(load_index(storage, snapshot, "train", labels="hard", kinds=KINDS))
    assert Counter(record.kind for record in records) == {PAIR: 16, JUDGED: 6, PRIOR: 2}
    assert {(record.kind, record.label_0) for record in records} == {
        (PAIR, 0.0), (PAIR, 1.0), (JUDGED, 0.0), (JUDGED, 1.0), (PRIOR, 1.0),
    }  # fmt: skip


# Weights


def test_weights_are_one_on_average_over_what_is_in_the_index(storage: Storage, tmp_path: Path) -> None:
    weights = (0.5, None, 2.0, 4.5)
    snapshot = write_encoded(storage, tmp_path, num_train=20, num_judged=8, weights=weights)
    for kinds, mean in (((PAIR,), 2.0), ((PAIR, JUDGED), 2.0)):
        index = load_index(storage, snapshot, "train", kinds=kinds)
        assert index.mean_weight == mean
        for record in rows_of(index):
            assert record.weight == (table_row(storage, record)["weight"] or 1.0) / mean
        assert np.mean([record.weight for record in rows_of(index)]) == 1.0
    reader = PairReader(storage, load_texts(storage, snapshot))
    batch = reader.read([index.pair(0, element) for element in range(8)])
    assert batch.weight_B.dtype == torch.float32
    assert batch.weight_B.tolist() == [record.weight for record in batch.records]
    assert len(set(batch.weight_B.tolist())) > 1


@pytest.mark.parametrize("weights", [(None,), (1.0, None), (3.0,)])
def test_equal_weights_are_no_weights(storage: Storage, tmp_path: Path, weights: tuple[float | None, ...]) -> None:
    index = load_index(storage, write_encoded(storage, tmp_path, weights=weights), "train")
    assert {record.weight for record in rows_of(index)} == {1.0}
    assert index.mean_weight == (weights[0] or 1.0)


def made_up(number: int, weights: pa.Array) -> pa.Table:
    rng = np.random.default_rng(0)
    hexes = [f"{high:016x}{low:016x}" for high, low in rng.integers(0, 2**63, (number, 2)).tolist()]
    return pa.table({
        "pair_key": hexes, "prompt_id": hexes, "label_0": rng.random(number), "source_uri": ["u"] * number,
        "source_row": range(number), "sha256": [2 * each for each in hexes], "shard": ["s"] * number,
        "shard_sha256": ["e"] * number, "shard_bytes": [9] * number, "offset": range(number), "length": [1] * number,
        "crc32": range(number), "weight": weights,
        "bucket_height": pa.array(rng.integers(1, 3, number), pa.int32()),
        "bucket_width": pa.array(rng.integers(1, 3, number), pa.int32()),
        "kind": pa.array(rng.integers(0, 3, number), pa.int8()),
    })  # fmt: skip


def test_a_kind_takes_no_memory_and_a_weight_four_bytes() -> None:
    number, sizes = 50_000, []
    for weights in (pa.nulls(number, pa.float64()), pa.array([1.0] * number), pa.array(np.linspace(0.5, 2, number))):
        rows = made_up(number, weights)
        tracemalloc.start()
        index = PairIndex(rows)
        sizes.append(tracemalloc.get_traced_memory()[0] / number)
        tracemalloc.stop()
        assert len(index) == number
    none, ones, others = sizes
    assert none < 130
    assert abs(ones - none) < 0.1
    assert others - none == pytest.approx(4, abs=0.1)


# Balance


@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.sampled_from(KINDS)), min_size=1, max_size=6),
    m=st.integers(1, 4),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_images_of_a_class_and_the_others_are_visited_about_equally_often(
    sizes: list[tuple[int, str]], m: int, seed: int
) -> None:
    numbers, kinds = [size for size, _ in sizes], [kind for _, kind in sizes]
    visits = num_visits(numbers, kinds)
    sums = {True: 0, False: 0}
    rows = {True: 0, False: 0}
    for size, kind, times in zip(numbers, kinds, visits, strict=True):
        sums[kind == PRIOR] += size * times
        rows[kind == PRIOR] += size
    if not all(rows.values()):
        assert set(visits) == {1}, "there is nothing to balance"
        return
    assert max(sums.values()) >= max(rows.values()), "no row is visited less than once"
    assert abs(sums[True] - sums[False]) <= min(rows.values()) / 2
    plan = Plan([size * times for size, times in zip(numbers, visits, strict=True)], m, m, seed)
    counts = Counter[tuple[int, int]]()
    for step in range(sum(plan.bucket_sizes)):  # m epochs
        group = plan.group(step, 0)
        counts.update((group.bucket, int(element) % numbers[group.bucket]) for element in group.elements)
    assert counts == {(bucket, row): m * visits[bucket] for bucket, size in enumerate(numbers) for row in range(size)}


def test_a_few_photos_are_visited_as_often_as_a_hundred_images_of_their_class(storage: Storage, tmp_path: Path) -> None:
    weights = (1.0, 3.0)
    written = {"num_train": 0, "num_validation": 0, "num_judged": 5, "num_prior": 100}
    snapshot = write_encoded(storage, tmp_path, **written, sides=(8, 12), weights=weights)
    plain, index = (load_index(storage, snapshot, "train", kinds=KINDS, balance=balance) for balance in (False, True))
    assert len(index) == len(plain) == 105
    of_kind = {kind: sum(n for n, each in zip(index.bucket_sizes, index.kinds, strict=True) if each == kind)
               for kind in KINDS}  # fmt: skip
    assert of_kind == {PAIR: 0, JUDGED: 100, PRIOR: 100}
    visits = Counter(record.pair_key for record in rows_of(index))
    rows = {record.pair_key: record for record in rows_of(plain)}
    assert visits == {key: 20 if record.kind == JUDGED else 1 for key, record in rows.items()}
    for bucket, kind in enumerate(index.kinds):
        size = plain.bucket_sizes[bucket]
        for element in range(index.bucket_sizes[bucket]):
            once, again = plain.pair(bucket, element % size), index.pair(bucket, element)
            assert again == replace(once, weight=again.weight)
            assert element < size or kind == JUDGED
    stored = np.array([table_row(storage, record)["weight"] for record in rows_of(index)])
    assert index.mean_weight == pytest.approx(stored.mean())
    assert plain.mean_weight != pytest.approx(index.mean_weight)
    assert np.mean([record.weight for record in rows_of(index)]) == pytest.approx(1, abs=1e-6)


# Tables of before


def drop_columns(storage: Storage) -> None:
    """As if mapo of before had written the table."""
    table = pairs_table(storage)
    rows = table.read().drop_columns(["kind", "weight"])
    shutil.rmtree(table.uri)
    write_deltalake(table.uri, rows)
    assert {field.name for field in DeltaTable(table.uri).schema().fields} == set(rows.column_names)


def test_a_table_from_before_there_were_kinds_has_pairs_of_weight_one(storage: Storage, tmp_path: Path) -> None:
    snapshot = write_encoded(storage, tmp_path, labels=(0.0, 0.5, 1.0))
    before = rows_of(load_index(storage, snapshot, "train"))
    drop_columns(storage)
    for kinds, only_good in (((PAIR,), False), (KINDS, True)):
        index = load_index(storage, snapshot, "train", kinds=kinds, only_good=only_good)
        assert rows_of(index) == before
        assert index.mean_weight == 1.0
    assert len(load_index(storage, snapshot, "train", labels="hard", kinds=KINDS)) == 16


def test_single_images_may_be_added_to_a_table_from_before(storage: Storage, tmp_path: Path) -> None:
    snapshot = write_encoded(storage, tmp_path, **MIXED, weights=(0.5, 1.5))
    table = pairs_table(storage)
    rows, expected = table.read(), load_index(storage, snapshot, "train", kinds=KINDS)
    is_pair = pc.is_null(rows["kind"])
    shutil.rmtree(table.uri)
    old = rows.filter(is_pair).drop_columns(["kind", "weight"])
    write_deltalake(table.uri, old)
    pairs_table(storage).append("singles", rows.filter(pc.invert(is_pair)))
    index = load_index(storage, replace(snapshot, pairs_version=1), "train", kinds=KINDS)
    found, wanted = rows_of(index), rows_of(expected)
    assert [record.pair_key for record in found] == [record.pair_key for record in wanted]
    assert [record.kind for record in found] == [record.kind for record in wanted]
    for record in found:
        stored = 1.0 if record.kind == PAIR else table_row(storage, record)["weight"]
        assert record.weight * index.mean_weight == pytest.approx(stored)
    assert len(load_index(storage, replace(snapshot, pairs_version=1), "train")) == 20
    assert rows_of(load_index(storage, snapshot, "train", kinds=(JUDGED, PRIOR))) == []


# Micro-batches


def opened(storage: Storage, snapshot: Snapshot, cache: ShardCache | None = None) -> tuple[PairIndex, PairReader]:
    index = load_index(storage, snapshot, "train", kinds=KINDS, balance=True)
    return index, PairReader(storage, load_texts(storage, snapshot), cache)


def groups_of(
    index: PairIndex, rank: int, world_size: int, steps: range
) -> Iterator[tuple[tuple[int, int, float], list[PairRecord]]]:
    """What a rank of so many reads, as `training.worker.turns` asks for it."""
    plan = Plan(index.bucket_sizes, micro_batch_size=3, global_batch_size=18, seed=5)
    for step in steps:
        for slot, weight in plan.slots_of(rank, world_size):
            group = plan.group(step, slot)
            flips = zip(group.elements, flips_of(5, step, slot, 3, "image"), strict=True)
            yield (step, slot, weight), [index.pair(group.bucket, int(element), sides) for element, sides in flips]


def read_all(index: PairIndex, reader: PairReader, world_size: int, steps: range) -> dict[tuple[int, int], Any]:
    found = {}
    for rank in range(world_size):
        for (step, slot, weight), batch in PairLoader(reader, groups_of(index, rank, world_size, steps)):
            if weight:
                assert (step, slot) not in found
                found[step, slot] = batch
    return found


def assert_same(found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, batch in expected.items():
        assert found[key].records == batch.records
        assert found[key].kind == batch.kind
        mine, theirs = tensors_of(found[key]), tensors_of(batch)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_any_world_size_reads_the_same_mixed_batches(storage: Storage, mixed: Snapshot) -> None:
    index, reader = opened(storage, mixed)
    steps = range(12)
    expected = read_all(index, reader, 1, steps)
    assert len(expected) == 12 * 6
    assert {batch.kind for batch in expected.values()} == set(KINDS)
    for world_size in (2, 3, 4):  # four ranks do not share six slots evenly
        assert_same(read_all(index, reader, world_size, steps), expected)


def test_mixed_data_resumed_at_any_step_by_any_number_of_workers_gives_the_rest(
    storage: Storage, mixed: Snapshot
) -> None:
    index, reader = opened(storage, mixed)
    expected = read_all(index, reader, 1, range(6))
    for first in range(1, 6):
        again, _ = opened(storage, mixed)
        rest = read_all(again, reader, first % 3 + 1, range(first, 6))
        assert_same(rest, {key: batch for key, batch in expected.items() if key[0] >= first})


def test_the_shard_cache_gives_the_same_mixed_batches(storage: Storage, mixed: Snapshot, tmp_path: Path) -> None:
    index, reader = opened(storage, mixed)
    expected = read_all(index, reader, 1, range(6))
    with closing(ShardCache(storage, tmp_path / "cache", 1 << 30)) as cache:
        for where in {record.latents.shard: record.latents for record in rows_of(index)}.values():
            assert cache.fetch(where)
            storage.delete(where.shard)
        assert_same(read_all(*opened(storage, mixed, cache), 2, range(6)), expected)


def test_a_batch_of_single_images_has_what_pairs_have_but_a_rejected_image(storage: Storage, mixed: Snapshot) -> None:
    index, reader = opened(storage, mixed)
    means = {(PAIR, True): 1.0, (JUDGED, True): 1.0, (JUDGED, False): -1.0, (PRIOR, True): 2.0}
    for bucket, kind in enumerate(index.kinds):
        for flipped in (False, True):
            records = [index.pair(bucket, element, (flipped, flipped)) for element in range(6)]
            batch = reader.read(records)
            assert (batch.kind, batch.records) == (kind, records)
            assert batch.good_B.dtype == torch.bool
            assert batch.good_B.tolist() == [record.is_good for record in records]
            assert batch.preference_B.tolist() == batch.weight_B.tolist() == [1.0] * 6
            expected = torch.tensor([means[kind, record.is_good] + 3 * flipped for record in records])
            torch.testing.assert_close(batch.chosen_BCHW.float().mean((1, 2, 3)), expected, rtol=0, atol=0.05)
            side = 8 * batch.chosen_BCHW.shape[-1]
            assert batch.chosen_time_ids_B6.tolist() == [[side, side, 0, int(flipped), side, side]] * 6
            assert (batch.rejected_BCHW is None) == (batch.rejected_time_ids_B6 is None) == (kind != PAIR)
            assert batch.prompt_embeds_BSD.shape == (6, 77, 32)


def test_kinds_are_never_mixed_in_a_batch(storage: Storage, mixed: Snapshot) -> None:
    index, reader = opened(storage, mixed)
    pair, judged = (index.pair(index.kinds.index(kind), 0) for kind in (PAIR, JUDGED))
    with pytest.raises(ValueError, match=f"{judged.pair_key} is judged, but pair in the rest of its micro-batch"):
        reader.read([pair, pair, judged])


# Errors


def test_a_damaged_single_image_is_called_an_image(
    storage: Storage, mixed: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)
    index, reader = opened(storage, mixed)
    record = index.pair(index.kinds.index(JUDGED), 0)
    file = Path(storage.path(record.latents.shard))
    data = bytearray(file.read_bytes())
    data[record.latents.offset + record.latents.length - 1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ShardCorrupt, match=rf"cannot read image {record.pair_key} .*from {record.origin}"):
        reader.read([record])


def test_what_was_never_encoded_is_counted_by_what_is_trained_on(storage: Storage, mixed: Snapshot) -> None:
    gone = [record.pair_key for record in rows_of(load_index(storage, mixed, "train", kinds=(JUDGED,)))[:3]]
    rows = latents_table(storage, mixed.latents_fingerprint).read()
    other = replace(mixed, latents_fingerprint="c" * 32, latents_version=0)
    kept = rows.filter(pc.invert(pc.is_in(rows["pair_key"], pa.array(gone))))
    latents_table(storage, other.latents_fingerprint).append("unit", kept)
    assert len(load_index(storage, other, "train")) == 20, "pairs alone are all there"
    for kinds, says in (((PAIR, JUDGED), "3 of 30 train pairs and images"), ((JUDGED, PRIOR), "3 of 17 train images")):
        with pytest.raises(SnapshotError, match=f"{says} have no latents under the fingerprint {'c' * 32}"):
            load_index(storage, other, "train", kinds=kinds)
