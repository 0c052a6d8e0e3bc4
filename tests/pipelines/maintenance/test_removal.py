"""Removal: what is named goes with all its rows, the accounting still adds up, and it stays away."""

import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from factories import Row, photo_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import images_in, keep, keep_rows, rows_in

from orchestration.cli import main
from pipelines.dataset.errors import ConfigError, SnapshotError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.storage import Storage
from pipelines.maintenance.remove import Condition, parse_condition, remove

GONE = (
    "prompt", "user_id", "image_0_sha256", "image_1_sha256", "width_0", "height_0", "width_1", "height_1",
    "shard", "shard_bytes", "shard_sha256", "offset_0", "length_0", "offset_1", "length_1",
)  # fmt: skip
STAYS = ("pair_key", "prompt_id", "label_0", "split", "source", "source_uri", "source_row", "unit")


@pytest.fixture
def photos() -> list[Row]:
    """40 rows: ties and damaged ones at the end, and the first five once more."""
    rows = photo_pairs(40, num_ties=3, num_damaged=4, num_prompts=12)
    return rows + rows[:5]


@pytest.fixture
def storage(tmp_path: Path, photos: list[Row]) -> Storage:
    storage = Storage(str(tmp_path / "storage"))
    keep_rows(storage, tmp_path / "photos.parquet", photos)
    return storage


def removed_rows(storage: Storage) -> list[Row]:
    return [row for row in rows_in(storage) if row["reason"] == "removed"]


def run_remove(storage: Storage, *where: str, dry_run: bool = False) -> int:
    return remove(storage, [parse_condition(text) for text in where], dry_run=dry_run).num_rows


def test_a_pair_goes_with_its_duplicates_and_leaves_only_hashes_and_origin(storage: Storage) -> None:
    before = rows_in(storage)
    key = before[0]["pair_key"]
    version = pairs_table(storage).version
    assert run_remove(storage, f"key={key}") == 2
    assert pairs_table(storage).version == (version or 0) + 1
    after = rows_in(storage)
    for old, new in zip(before, after, strict=True):
        if old["pair_key"] != key:
            assert new == old
            continue
        assert (new["status"], new["reason"]) == ("quarantined", "removed")
        assert all(new[name] is None for name in GONE)
        assert all(new[name] == old[name] for name in STAYS)


def test_older_versions_still_have_what_was_removed(storage: Storage) -> None:
    version, before = pairs_table(storage).version, images_in(storage)
    run_remove(storage, "source=pickapic")
    assert images_in(storage, version) == before
    assert images_in(storage) == {}


def test_a_person_goes_whole_also_where_a_row_had_no_pair(storage: Storage, photos: list[Row]) -> None:
    theirs = [i for i, row in enumerate(photos) if row["user_id"] == 3]
    assert any(rows_in(storage)[i]["pair_key"] is None for i in theirs)
    run_remove(storage, "user=3")
    removed = {row["source_row"] for row in removed_rows(storage)}
    assert removed >= set(theirs)
    assert not [row for row in rows_in(storage) if row["user_id"] == "3"]


@pytest.mark.parametrize(
    "pattern", [" cat ", "^a", "[02468]$", "(?i)HOUSE|tree", "nothing like it"]
)  # fmt: skip
def test_a_pattern_finds_what_python_finds(storage: Storage, pattern: str) -> None:
    before = rows_in(storage)
    named = [row for row in before if row["prompt"] is not None and re.search(pattern, row["prompt"])]
    keys = {row["pair_key"] for row in named if row["pair_key"]}
    expected = [
        row["source_row"] for row in before
        if row["pair_key"] in keys or (row in named and row["pair_key"] is None)
    ]  # fmt: skip
    assert run_remove(storage, f"prompt~{pattern}") == len(expected)
    assert [row["source_row"] for row in removed_rows(storage)] == expected


def test_several_conditions_must_all_hold(storage: Storage) -> None:
    row = next(row for row in rows_in(storage) if row["status"] == "kept" and row["user_id"] == "6")
    assert run_remove(storage, "user=6", "source=elsewhere.parquet") == 0
    assert run_remove(storage, "user=6", f"prompt={row['prompt']}", f"source={row['source_uri']}") >= 1
    assert row["pair_key"] in {gone["pair_key"] for gone in removed_rows(storage)}
    assert [left for left in rows_in(storage) if left["user_id"] == "6"]


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([None, "1", "2"])), max_size=12))
def test_a_condition_holds_where_the_value_is_equal_and_never_for_null(rows: list[tuple[str, str | None]]) -> None:
    batch = pa.RecordBatch.from_pylist(
        [{"prompt": prompt, "user_id": user} for prompt, user in rows],
        schema=pa.schema([("prompt", pa.string()), ("user_id", pa.string())]),
    )
    assert Condition("user", "1").of(batch).to_pylist() == [user == "1" for _, user in rows]
    assert Condition("prompt", "a|b", True).of(batch).to_pylist() == [prompt in "ab" for prompt, _ in rows]


def test_the_accounting_adds_up_and_nothing_is_removed_twice(storage: Storage, photos: list[Row]) -> None:
    run_remove(storage, "user=1")
    version = pairs_table(storage).version
    assert run_remove(storage, "user=1") == 0
    assert run_remove(storage, f"key={removed_rows(storage)[0]['pair_key']}") == 0
    assert pairs_table(storage).version == version
    assert sum(Counter(row["status"] for row in rows_in(storage)).values()) == len(photos)


def test_a_removed_pair_stays_away_when_it_is_ingested_again(
    storage: Storage, tmp_path: Path, photos: list[Row]
) -> None:
    key = rows_in(storage)[0]["pair_key"]
    run_remove(storage, f"key={key}")
    assert keep(storage, tmp_path / "photos.parquet") == 0
    assert keep_rows(storage, tmp_path / "copy.parquet", photos[:3]) == 1
    (again, *others) = [row for row in rows_in(storage) if row["source_uri"].endswith("copy.parquet")]
    assert (again["pair_key"], again["status"], again["reason"]) == (key, "quarantined", "removed")
    assert again["prompt"] is None
    assert {row["reason"] for row in others} == {"repeated"}


def test_a_row_that_is_committed_meanwhile_goes_too(
    storage: Storage, tmp_path: Path, photos: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.maintenance import remove as removal

    revise, key = removal._revise, rows_in(storage)[0]["pair_key"]

    def outrun(table, found, keys):  # type: ignore[no-untyped-def]
        if not (tmp_path / "late.parquet").exists():
            keep_rows(storage, tmp_path / "late.parquet", photos[:1])
        revise(table, found, keys)

    monkeypatch.setattr(removal, "_revise", outrun)
    run_remove(storage, f"key={key}")
    assert {row["reason"] for row in rows_in(storage) if row["pair_key"] == key} == {"removed"}
    assert len(rows_in(storage)) == len(photos) + 1


def test_a_dry_run_counts_and_changes_nothing(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    before, version = rows_in(storage), pairs_table(storage).version
    assert main(["data", "remove", storage.url, "--where", "user=2", "--dry-run"]) == 0
    counted = capsys.readouterr().out
    assert rows_in(storage) == before
    assert pairs_table(storage).version == version
    assert main(["data", "remove", storage.url, "--where", "user=2"]) == 0
    done = capsys.readouterr().out
    assert counted.replace("would be removed", "removed").splitlines() == done.splitlines()[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour=red", "unknown condition"),
        ("user~3", "unknown condition"),
        ("prompt", "unknown condition"),
        ("key=abc", "32 hex digits"),
        ("prompt~(", "not a regular expression"),
        ("prompt~(?=x)", "not a regular expression"),
    ],
)
def test_a_wrong_condition_is_named_and_exits_2(
    storage: Storage, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--where {text}")):
        parse_condition(text)
    assert main(["data", "remove", storage.url, "--where", text]) == 2
    assert message in capsys.readouterr().err


def test_without_a_data_set_there_is_nothing_to_remove(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="there is no data set at "):
        run_remove(Storage(str(tmp_path)), "user=1")
