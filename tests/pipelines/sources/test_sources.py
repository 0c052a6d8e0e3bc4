"""Sources: labels by value, units that cut the rows exactly, and files as they were planned."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import PICKAPIC_SCHEMA, Row, photo_pairs, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import SourceConfig
from pipelines.dataset.errors import SourceError
from pipelines.dataset.pair import Reason
from pipelines.sources.files import list_files
from pipelines.sources.pickapic import read_label
from pipelines.sources.reader import reader_of
from pipelines.sources.unit import SourceRow, SourceUnit, UnitSettings

READER = reader_of("pickapic")
MAX_SHARD_BYTES = 1 << 20


def units_of(file: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[SourceUnit]:
    (found,) = list_files(str(file), (".parquet",))
    config = SourceConfig(format="pickapic", path=str(file))
    return READER.units(config, found, UnitSettings(max_shard_bytes, "full"))


def rows_of(file: Path) -> list[SourceRow]:
    return [row for unit in units_of(file) for row in READER.rows(unit)]


def write_columns(file: Path, **columns: Any) -> Path:
    num_rows = len(next(iter(columns.values())))
    given = {"caption": ["a cat"] * num_rows, "jpg_0": [b"0"] * num_rows, "jpg_1": [b"1"] * num_rows}
    pq.write_table(pa.table({**given, **columns}), file)
    return file


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "photos.parquet", photo_pairs(12), row_group_size=4)


@pytest.mark.parametrize(
    "kind", [pa.float64(), pa.float32(), pa.int64(), pa.int8(), pa.string(), pa.large_string(), pa.bool_()], ids=str
)
def test_labels_are_read_by_value_whatever_their_type(tmp_path: Path, kind: pa.DataType) -> None:
    # Read as text, "0" is true: image 0 then wins every pair.
    values = {"label_0": [1, 0, 0, 1], "label_1": [0, 1, 1, 0]}
    columns = {
        name: pa.array([str(v) if "string" in str(kind) else v for v in found]).cast(kind)
        for name, found in values.items()
    }
    assert [row.label_0 for row in rows_of(write_columns(tmp_path / "a.parquet", **columns))] == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("label_0", "label_1", "wanted"),
    [
        (0.5, 0.5, 0.5),
        ("0.5", "0.5", 0.5),
        (b"1.0", b"0.0", 1.0),
        (0.3, 0.7, 0.3),
        (None, 1.0, Reason.MISSING_LABEL),
        (1.0, None, Reason.MISSING_LABEL),
        (float("nan"), float("nan"), Reason.UNREADABLE_LABEL),
        (float("inf"), float("-inf"), Reason.UNREADABLE_LABEL),
        (2.0, -1.0, Reason.UNREADABLE_LABEL),
        ("image 0", "image 1", Reason.UNREADABLE_LABEL),
        (b"\xff", b"\xff", Reason.UNREADABLE_LABEL),
        (1.0, 1.0, Reason.INCONSISTENT_LABELS),
        (0.0, 0.0, Reason.INCONSISTENT_LABELS),
        (0.5, 0.4, Reason.INCONSISTENT_LABELS),
    ],
)
def test_a_label_is_a_probability_or_a_reason_and_never_a_guess(
    label_0: object, label_1: object, wanted: object
) -> None:
    found = read_label({"label_0": label_0, "label_1": label_1})
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize("has_label", [False, 0, 0.0, "False", b"false", "0"])
def test_a_row_that_says_it_has_no_label_has_none(has_label: object) -> None:
    assert read_label({"has_label": has_label, "label_0": 1.0, "label_1": 0.0}) is Reason.MISSING_LABEL


@pytest.mark.parametrize(
    "values", [{"has_label": True}, {"has_label": 1}, {"has_label": "True"}, {"has_label": None}, {}]
)
def test_a_row_that_does_not_say_it_has_no_label_has_its_label(values: Row) -> None:
    assert read_label({**values, "label_0": 1.0, "label_1": 0.0}) == 1.0


def test_rows_come_in_source_order_with_their_own_bytes(photos: Path) -> None:
    wanted = photo_pairs(12)
    found = rows_of(photos)
    assert [row.row for row in found] == list(range(12))
    assert [(row.image_0, row.image_1) for row in found] == [(row["jpg_0"], row["jpg_1"]) for row in wanted]
    assert [row.prompt for row in found] == [row["caption"].encode() for row in wanted]
    assert [(row.label_0, row.user_id) for row in found] == [(row["label_0"], str(row["user_id"])) for row in wanted]


def test_optional_columns_may_be_missing_and_others_are_not_read(tmp_path: Path) -> None:
    rows = pa.Table.from_pylist(photo_pairs(3), PICKAPIC_SCHEMA).drop_columns(["user_id", "has_label"])
    pq.write_table(rows.append_column("weights", pa.array([b"\0" * 1000] * 3)), tmp_path / "a.parquet")
    found = rows_of(tmp_path / "a.parquet")
    assert [(row.user_id, type(row.label_0)) for row in found] == [(None, float)] * 3


def test_text_that_is_not_utf8_spoils_its_own_row_only(tmp_path: Path) -> None:
    captions = pa.Array.from_buffers(  # as a careless writer stores it
        pa.string(), 3, pa.array([b"a cat", b"\xff\xfe", b"a dog"], pa.binary()).buffers()
    )
    users = pa.Array.from_buffers(pa.string(), 3, pa.array([b"\xff", b"me", b"me"], pa.binary()).buffers())
    file = write_columns(tmp_path / "a.parquet", caption=captions, user_id=users, label_0=[1, 0, 1], label_1=[0, 1, 0])
    found = rows_of(file)
    assert [row.prompt for row in found] == [b"a cat", b"\xff\xfe", b"a dog"]
    assert [row.user_id for row in found] == ["\ufffd", "me", "me"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_captions_may_be_stored_in_other_kinds_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    captions = pa.array(["a cat", "a dog", "a cat"]).cast(kind)
    file = write_columns(tmp_path / "a.parquet", caption=captions, label_0=[1, 0, 1], label_1=[0, 1, 0])
    assert [row.prompt for row in rows_of(file)] == [b"a cat", b"a dog", b"a cat"]


@pytest.mark.parametrize("missing", ["caption", "jpg_0", "jpg_1", "label_0", "label_1"])
def test_a_missing_column_is_named_with_the_file(tmp_path: Path, missing: str) -> None:
    rows = pa.Table.from_pylist(photo_pairs(2), PICKAPIC_SCHEMA).drop_columns([missing])
    pq.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=rf"a\.parquet has no column {missing}; its columns are ") as caught:
        units_of(tmp_path / "a.parquet")
    assert caught.value.hint


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"<html>404</html>"]
)
def test_a_file_that_is_no_parquet_is_named(photos: Path, damage: Callable[[bytes], bytes]) -> None:
    photos.write_bytes(damage(photos.read_bytes()))
    with pytest.raises(SourceError, match=r"cannot read .*photos\.parquet: ") as caught:
        units_of(photos)
    assert "copy it again" in str(caught.value.hint)


def test_a_file_damaged_in_the_middle_is_named_while_it_is_read(photos: Path) -> None:
    (unit,) = units_of(photos)
    data, seen = photos.read_bytes(), photos.stat()
    photos.write_bytes(data[:200] + bytes(len(data) - 1200) + data[-1000:])
    os.utime(photos, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    with pytest.raises(SourceError, match=r"cannot read .*photos\.parquet: "):
        list(READER.rows(unit))


def test_a_file_that_changed_since_it_was_planned_is_refused(photos: Path) -> None:
    (unit,) = units_of(photos)
    write_parquet(photos, photo_pairs(5, seed=1))
    with pytest.raises(SourceError, match=r"photos\.parquet changed while it was read"):
        list(READER.rows(unit))
    photos.unlink()
    with pytest.raises(SourceError, match=r"cannot read .*photos\.parquet: "):
        list(READER.rows(unit))


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(0, 40), max_size=6), min_size=1, max_size=8),
    max_shard_bytes=st.integers(100, 4000),
)
def test_units_cut_the_rows_exactly_whatever_the_row_groups(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[int]], max_shard_bytes: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "groups.parquet"
    number, schema = 0, PICKAPIC_SCHEMA
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for sizes in groups:  # a group may be empty
            rows = [
                {
                    "caption": str(number + i),
                    "jpg_0": os.urandom(20 * size),
                    "jpg_1": b"1",
                    "label_0": 1.0,
                    "label_1": 0.0,
                }
                for i, size in enumerate(sizes)
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema), row_group_size=max(1, len(rows)))
            number += len(rows)
    units = units_of(file, max_shard_bytes=max_shard_bytes)
    found = [row for unit in units for row in READER.rows(unit)]
    assert [(row.row, row.prompt) for row in found] == [(i, str(i).encode()) for i in range(number)]
    assert [sum(1 for _ in READER.rows(unit)) for unit in units] == [unit.num_rows for unit in units]
    assert len({unit.id for unit in units}) == len(units)
    assert all(unit.num_rows for unit in units), "no unit is empty"


def test_the_id_of_a_unit_follows_from_the_file_and_the_settings_alone(photos: Path) -> None:
    def ids(**settings: Any) -> list[str]:
        return [unit.id for unit in units_of(photos, **settings)]

    first = ids()
    assert ids() == first
    assert set(ids(max_shard_bytes=MAX_SHARD_BYTES + 1)).isdisjoint(first)
    seen = photos.stat()
    os.utime(photos, ns=(seen.st_atime_ns + 10**9, seen.st_mtime_ns))
    assert ids() == first, "a file that was read has not changed"
    os.utime(photos, ns=(seen.st_atime_ns, seen.st_mtime_ns + 10**9))
    assert set(ids()).isdisjoint(first), "a file that was written has"


def test_a_unit_crosses_process_borders_as_text(photos: Path) -> None:
    for unit in units_of(photos, max_shard_bytes=1000):
        assert SourceUnit.from_json(unit.to_json()) == unit
    assert SourceUnit.from_json(replace(unit, first_row=7).to_json()) != unit


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("data", ["a.parquet", "deep/c.parquet", "with space [1].parquet"]),
        ("data/a.parquet", ["a.parquet"]),
        ("data/with space [1].parquet", ["with space [1].parquet"]),
        ("data/*.parquet", ["a.parquet", "with space [1].parquet"]),
        ("data/**/*.parquet", ["a.parquet", "deep/c.parquet", "with space [1].parquet"]),
        ("data/?.*", ["a.parquet", "b.txt"]),
        ("data/*", ["a.parquet", "b.txt", "with space [1].parquet"]),
        ("data/[ab]*", ["a.parquet", "b.txt"]),
    ],
)
@pytest.mark.parametrize("form", ["relative", "absolute", "url"])
def test_a_source_is_a_file_a_folder_or_a_glob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, names: list[str], form: str
) -> None:
    for name in ("a.parquet", "b.txt", "deep/c.parquet", "with space [1].parquet"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    given = {"relative": path, "absolute": f"{tmp_path}/{path}", "url": f"file://{tmp_path}/{path}"}[form]
    found = list_files(given, (".parquet",))
    assert [file.uri for file in found] == [f"file://{tmp_path}/data/{name}" for name in names]
    assert [file.size for file in found] == [len(name) for name in names]


def test_a_link_is_the_file_it_points_to(tmp_path: Path) -> None:
    target = write_parquet(tmp_path / "blobs" / "1234", photo_pairs(2))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.parquet").symlink_to(target)
    (before,) = list_files(str(tmp_path / "data"), (".parquet",))
    assert (before.uri, before.size) == (f"file://{tmp_path}/data/a.parquet", target.stat().st_size)
    assert [row.row for row in rows_of(tmp_path / "data" / "*.parquet")] == [0, 1]
    os.utime(target, ns=(0, 0))
    (after,) = list_files(str(tmp_path / "data"), (".parquet",))
    assert after != before, "what it points to has changed"
    target.unlink()
    with pytest.raises(SourceError, match=r"a\.parquet|1234"):
        list_files(str(tmp_path / "data"), (".parquet",))


@pytest.mark.parametrize("path", ["missing", "missing/*.parquet", "data/*.csv", "data", "/*.parquet"])
def test_a_source_without_files_is_an_error_that_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "here.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as caught:
        list_files(path, (".parquet",))
    folder = "/" if path.startswith("/") else tmp_path / path.removesuffix("/*.parquet").removesuffix("/*.csv")
    assert caught.value.message == f"no file matches {path} (looked in {folder})"
    assert "ingest.sources[].path" in str(caught.value.hint)
