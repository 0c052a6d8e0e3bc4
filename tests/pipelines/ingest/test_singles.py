"""Single images in the table of pairs: rows, shards, repeats, policies; beside pairs, and in tables of before."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from factories import Row, encoded, photo_pairs, picture, write_parquet
from singles import ingest, judged_rows, write_judged

from pipelines.config import SourceConfig
from pipelines.dataset.errors import DropBudgetExceeded
from pipelines.dataset.layout import PAIRS, pairs_table
from pipelines.dataset.pair import JUDGED, PAIR, PAIRS_SCHEMA, PRIOR, of_kind, single_key
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.ingest.policy import Policy, is_applied
from pipelines.maintenance.describe import describe_dataset
from pipelines.maintenance.remove import Condition, remove

OF_IMAGE_1 = ("image_1_sha256", "width_1", "height_1", "orientation_1", "mode_1", "offset_1", "length_1")
OLD_STORAGE = Path(__file__).parents[2] / "data" / "old_storage.tar.xz"


def rows_in(storage: Storage) -> list[Row]:
    rows = pairs_table(storage).read().to_pylist()
    return sorted(rows, key=lambda row: (row["source_uri"], row["source_row"], row["unit"]))


def outcomes(rows: list[Row]) -> list[tuple[str, str | None]]:
    return [(row["status"], row["reason"]) for row in rows]


def kept_by_kind(storage: Storage) -> dict[str | None, int]:
    kept = [row["kind"] for row in rows_in(storage) if row["status"] == "kept"]
    return {kind: kept.count(kind) for kind in kept}


def pairs_file(folder: Path, num_rows: int = 6, **options: Any) -> SourceConfig:
    file = write_parquet(folder / f"pairs-{num_rows}.parquet", photo_pairs(num_rows, **options), row_group_size=8)
    return SourceConfig(format="pickapic", path=str(file))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its stream to the garbage collector
def test_a_row_is_one_image_with_its_verdict_and_shard_members(storage: Storage, tmp_path: Path) -> None:
    given = judged_rows(3, 2, 2)
    given[0] |= {"weight": 2.5}
    ingest(storage, write_judged(tmp_path / "x.parquet", given))
    rows = rows_in(storage)
    for row, source in zip(rows, given, strict=True):
        data = storage.read_range(row["shard"], row["offset_0"], row["length_0"], row["image_0_sha256"])
        assert data == source["image"]
        assert row["pair_key"] == single_key(source["prompt"], row["image_0_sha256"])
        assert [row[name] for name in OF_IMAGE_1] == [None] * len(OF_IMAGE_1)
        assert (row["status"], row["source"], row["split"], row["mirrored"]) == ("kept", "judged", "train", False)
        assert row["width_0"] > 0
    assert [(row["kind"], row["label_0"]) for row in rows] == (
        [(JUDGED, 1.0)] * 3 + [(JUDGED, 0.0)] * 2 + [(PRIOR, 1.0)] * 2
    )
    assert [row["weight"] for row in rows] == [2.5, *[None] * 6]
    samples = [
        sample
        for shard in sorted({row["shard"] for row in rows})
        for sample in webdataset.WebDataset(storage.path(shard), shardshuffle=False, empty_check=False)
    ]
    assert [set(sample) - {"__key__", "__url__", "__local_path__"} for sample in samples] == [{"0.png", "json"}] * 7
    names = ("pair_key", "prompt", "label_0", "source", "source_uri", "source_row", "kind")
    assert {s["__key__"]: json.loads(s["json"]) for s in samples} == {
        row["pair_key"]: {name: row[name] for name in names} for row in rows
    }


def test_the_record_of_a_pair_is_what_it_was(storage: Storage, tmp_path: Path) -> None:
    ingest(storage, pairs_file(tmp_path))
    with tarfile.open(storage.path(rows_in(storage)[0]["shard"])) as tar:
        records = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]
    assert {tuple(record) for record in records} == {
        ("label_0", "pair_key", "prompt", "source", "source_row", "source_uri")
    }


@pytest.mark.parametrize("files", ["one file", "two files", "two runs"])
def test_the_first_verdict_counts_and_another_one_is_a_conflict(storage: Storage, tmp_path: Path, files: str) -> None:
    first = judged_rows(1, 1, 1)
    good, bad, prior = ({"image": row["image"], "prompt": row["prompt"]} for row in first)
    later = [
        good | {"good": True, "weight": 7.0}, good | {"good": False}, good | {"prior": True},
        bad | {"good": False}, bad | {"good": True}, prior | {"prior": True}, prior | {"good": True},
        good | {"good": True, "prompt": "another"},
    ]  # fmt: skip
    if files == "one file":
        ingest(storage, write_judged(tmp_path / "x.parquet", [*first, *later]))
    else:
        one, other = (
            write_judged(tmp_path / name, rows) for name, rows in (("a.parquet", first), ("b.parquet", later))
        )
        ingest(storage, one, *([other] if files == "two files" else []))
        ingest(storage, one, other)
    rows = rows_in(storage)
    repeated, conflict = ("duplicate", "repeated"), ("duplicate", "conflicting_label")
    assert outcomes(rows) == [
        *[("kept", None)] * 3, repeated, conflict, conflict, repeated, conflict, repeated, conflict, ("kept", None)
    ]  # fmt: skip
    assert [row["shard"] is None for row in rows[3:]] == [True] * 7 + [False]


def test_the_image_of_a_pair_may_be_a_single_image_as_well(storage: Storage, tmp_path: Path) -> None:
    pairs = photo_pairs(2)
    singles = [{"image": row["jpg_0"], "prompt": row["caption"], "good": True} for row in pairs]
    ingest(storage, pairs_file(tmp_path, 2), write_judged(tmp_path / "x.parquet", singles))
    rows = rows_in(storage)
    assert outcomes(rows) == [("kept", None)] * 4
    assert len({row["pair_key"] for row in rows}) == 4
    assert len({row["image_0_sha256"] for row in rows}) == len({row["prompt_id"] for row in rows}) == 2


def test_policies_for_ties_do_not_touch_them(storage: Storage, tmp_path: Path) -> None:
    sources = [pairs_file(tmp_path, 8, num_ties=3), write_judged(tmp_path / "x.parquet", judged_rows(2, 2, 2))]
    for settings, pairs in (({}, 5), ({"ties": "keep"}, 8), ({"min_vote_share": 1.0}, 5), ({"ties": "drop"}, 5)):
        ingest(storage, *sources, **settings)
        assert kept_by_kind(storage) == {PAIR: pairs, JUDGED: 4, PRIOR: 2}
        policy = Policy(0.0, settings.get("ties", "drop"), settings.get("min_vote_share", 0.5))  # type: ignore[arg-type]
        assert is_applied(policy, pairs_table(storage))


def test_a_prompt_is_in_one_split_whatever_the_kinds_of_its_rows(storage: Storage, tmp_path: Path) -> None:
    pairs, singles = photo_pairs(40), judged_rows(40, 0)
    for pair, single in zip(pairs, singles, strict=True):
        single["prompt"] = pair["caption"]
    singles[0]["split"] = "validation"
    file = write_parquet(tmp_path / "pairs.parquet", pairs, row_group_size=8)
    ingest(
        storage,
        write_judged(tmp_path / "x.parquet", singles),
        SourceConfig(format="pickapic", path=str(file)),
        validation_ratio=0.3,
    )
    splits: dict[str, set[str]] = {}
    for row in rows_in(storage):
        splits.setdefault(row["prompt"], set()).add(row["split"])
    assert {len(found) for found in splits.values()} == {1}
    assert splits[singles[0]["prompt"]] == {"validation"}
    assert {next(iter(found)) for found in splits.values()} == {"train", "validation"}


def test_what_cannot_be_used_is_quarantined_and_counts_against_the_budget(storage: Storage, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "x.png").write_bytes(encoded(picture(rng, 32, 32), "PNG"))
    sound = {"image": "x.png", "prompt": "a", "good": 1}
    odd = [
        ({"good": None}, "missing_label"), ({"good": "maybe"}, "unreadable_label"), ({"prior": 7}, "unreadable_label"),
        ({"weight": 0}, "unreadable_weight"), ({"weight": "-1"}, "unreadable_weight"),
        ({"weight": "Infinity"}, "unreadable_weight"), ({"weight": "much"}, "unreadable_weight"),
        ({"image": None}, "missing_image"), ({"image": "y.png"}, "missing_image"), ({"image": "../x"}, "image_outside"),
        ({"prompt": " "}, "empty_prompt"), ({"prompt": " ", "weight": 0, "good": 3, "image": None}, "empty_prompt"),
    ]  # fmt: skip
    lines = [json.dumps(sound), *(json.dumps(sound | change) for change, _ in odd)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(DropBudgetExceeded, match=r"12 of 13 rows .*\nMost common reason: unreadable_weight \(4\)"):
        ingest(storage, tmp_path / "x.jsonl", max_drop_ratio=0.9)
    rows = rows_in(storage)
    assert outcomes(rows) == [("kept", None), *(("quarantined", reason) for _, reason in odd)]
    assert {row["kind"] for row in rows} == {JUDGED}
    assert {row["weight"] for row in rows} == {None}


def test_a_file_that_grew_adds_what_is_new_or_changed(storage: Storage, tmp_path: Path) -> None:
    pairs = photo_pairs(3)
    file, table = tmp_path / "x.parquet", tmp_path / "pairs.parquet"
    sources = (file, SourceConfig(format="pickapic", path=str(table)))
    rows = judged_rows(3, 1, 1)
    write_judged(file, rows[:4])
    write_parquet(table, pairs[:2])
    ingest(storage, *sources)
    rows[1] = rows[1] | {"good": False}
    rows[2] = rows[2] | {"weight": 3.0}
    write_judged(file, rows)
    write_parquet(table, pairs)
    ingest(storage, *sources)
    found = rows_in(storage)
    assert [(row["source"], row["source_row"], row["status"], row["reason"]) for row in found if row["reason"]] == [
        ("judged", 1, "duplicate", "conflicting_label"), ("judged", 2, "duplicate", "repeated")
    ]  # fmt: skip
    assert len(found) == 3 + 5 + 2
    assert kept_by_kind(storage) == {PAIR: 3, JUDGED: 4, PRIOR: 1}


def test_a_removed_image_stays_away(storage: Storage, tmp_path: Path) -> None:
    rows = judged_rows(2, 1, 1)
    ingest(storage, write_judged(tmp_path / "x.parquet", rows))
    removed = remove(storage, [Condition("prompt", rows[3]["prompt"])])
    assert (removed.rows, removed.num_pairs, removed.num_singles) == ({"kept": 1}, 0, 1)
    ingest(storage, write_judged(tmp_path / "y.parquet", [rows[3] | {"prior": None, "good": True}]))
    gone = [row for row in rows_in(storage) if row["reason"] == "removed"]
    assert [(row["kind"], row["prompt"], row["image_0_sha256"]) for row in gone] == [
        (PRIOR, None, None), (JUDGED, None, None)
    ]  # fmt: skip
    assert kept_by_kind(storage) == {JUDGED: 3}


BEFORE = pa.schema([field for field in PAIRS_SCHEMA if field.name not in ("kind", "weight")])
"""The columns of a table before there were single images."""


def test_a_file_of_before_that_grew_adds_only_what_is_new(storage: Storage, tmp_path: Path) -> None:
    pairs, file = photo_pairs(4), tmp_path / "pairs.parquet"
    source = SourceConfig(format="pickapic", path=str(write_parquet(file, pairs[:3])))
    ingest(storage, source)
    before = Storage(str(tmp_path / "before"))
    rows = pairs_table(storage).read()
    Table(before, PAIRS, BEFORE).append(rows["unit"][0].as_py(), rows)
    write_parquet(file, pairs)
    ingest(before, source)
    assert [(row["source_row"], row["kind"], row["status"]) for row in rows_in(before)] == [
        (0, None, "kept"), (1, None, "kept"), (2, None, "kept"), (3, PAIR, "kept")
    ]  # fmt: skip


@pytest.fixture
def old(tmp_path: Path) -> tuple[Storage, list[Row]]:
    """A storage that a version without single images wrote, and its rows."""
    with tarfile.open(OLD_STORAGE) as tar:
        members = [m for m in tar if m.name.startswith(("bucket/storage/dataset/", "bucket/photos/"))]
        tar.extractall(tmp_path, members, filter="data")
    storage = Storage(str(tmp_path / "bucket" / "storage"))
    return storage, Table(storage, PAIRS, BEFORE).read().to_pylist()


def test_a_table_of_before_is_read_and_goes_on(old: tuple[Storage, list[Row]], tmp_path: Path) -> None:
    storage, before = old
    table = pairs_table(storage)
    assert table.read().to_pylist() == [row | {"kind": None, "weight": None} for row in before]
    assert table.count_rows(of_kind(PAIR)) == len(before)
    facts, version = describe_dataset(storage), table.version
    num_kept = sum(row["status"] == "kept" for row in before)
    assert (facts.kinds, facts.rows["kept"]) == ({PAIR: num_kept, JUDGED: 0, PRIOR: 0}, num_kept)
    photos = SourceConfig(format="pickapic", path=str(tmp_path / "bucket" / "photos"))
    kept = next(row for row in before if row["status"] == "kept")
    image = storage.read_range(kept["shard"], kept["offset_0"], kept["length_0"], kept["image_0_sha256"])
    singles = [*judged_rows(2, 2, 1), {"image": image, "prompt": kept["prompt"], "good": False}]
    ingest(storage, write_judged(tmp_path / "x.parquet", singles), photos)
    rows = rows_in(storage)
    of_before = [row for row in rows if row["unit"] in {row["unit"] for row in before}]
    assert {row["kind"] for row in of_before} == {None}
    again = [row for row in rows if row["source_uri"].startswith("file:") and row["source"] == "pickapic"]
    assert {row["kind"] for row in again} == {PAIR}
    assert len(again) == len(before)
    assert {row["status"] for row in again if row["pair_key"]} == {"duplicate"}, "their pairs were known"
    assert kept_by_kind(storage) == {None: num_kept, JUDGED: 5, PRIOR: 1}
    assert table.count_rows(of_kind(JUDGED, PRIOR)) == 6
    assert table.read(["pair_key"], of_kind(PAIR)).num_rows == 2 * len(before)
    assert pairs_table(storage, version).read(["kind"], of_kind(PAIR)).num_rows == len(before)
    assert describe_dataset(storage).kinds == {PAIR: num_kept, JUDGED: 5, PRIOR: 1}
