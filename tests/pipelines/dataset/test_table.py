"""The table: a unit once, a version for ever, readable by others."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable, QueryBuilder

from pipelines.dataset.errors import SnapshotError, StorageError
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table

SCHEMA = pa.schema([("unit", pa.string()), ("number", pa.int64())])

WRITER = """
import sys
import pyarrow as pa
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
url, units = sys.argv[1], sys.argv[2:]
schema = pa.schema([("unit", pa.string()), ("number", pa.int64())])
table = Table(Storage(url), "table", schema)
table.version
print("ready", flush=True)
sys.stdin.readline()
for unit in units:
    print(unit, table.append(unit, pa.table({"unit": [unit] * 3, "number": [0, 1, 2]}, schema)), flush=True)
"""


def rows_of(unit: str, num_rows: int = 3) -> pa.Table:
    return pa.table({"unit": [unit] * num_rows, "number": list(range(num_rows))}, SCHEMA)


def start_together(url: str, *units_of_writers: list[str]) -> list[tuple[str, str]]:
    """Writers in processes of their own, released at one moment; what each append answered."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, *units],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for units in units_of_writers
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    answers = []
    for writer in writers:
        output, errors = writer.communicate(timeout=300)
        assert writer.returncode == 0, errors
        answers += [tuple(line.split()) for line in output.splitlines()]
    return answers  # type: ignore[return-value]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(Storage(str(tmp_path / "with space")), "table", SCHEMA)


def test_before_the_first_commit_a_table_is_empty_and_makes_no_file(table: Table, tmp_path: Path) -> None:
    assert table.version is None
    assert not table.is_committed("a")
    assert table.uncommitted(["a", "b"]) == ["a", "b"]
    assert table.read().equals(SCHEMA.empty_table())
    assert table.read(["number"]).column_names == ["number"]
    assert (table.count_rows(), list(table.batches(["unit"]))) == (0, [])
    assert list(tmp_path.iterdir()) == []


def test_a_unit_is_appended_once(table: Table) -> None:
    assert table.append("a", rows_of("a"))
    assert not table.append("a", rows_of("a"))
    assert not table.append("a", rows_of("other rows"))
    assert table.append("b", rows_of("b", 2))
    assert table.read().sort_by([("unit", "ascending"), ("number", "ascending")]).to_pydict() == {
        "unit": ["a", "a", "a", "b", "b"],
        "number": [0, 1, 2, 0, 1],
    }
    assert (table.is_committed("b"), table.uncommitted(["c", "b", "a", "d"])) == (True, ["c", "d"])
    assert table.count_rows() == 5


def test_another_reader_sees_a_commit_at_its_next_question(table: Table) -> None:
    reader = Table(table._storage, "table", SCHEMA)
    assert reader.version is None
    for number, unit in enumerate("abc"):
        table.append(unit, rows_of(unit))
        assert reader.is_committed(unit)
        assert (reader.version, reader.read().num_rows) == (number, 3 * number + 3)


@pytest.mark.parametrize("before", ["no table", "a table"])
def test_of_many_writers_of_one_unit_exactly_one_wins(table: Table, before: str) -> None:
    if before == "a table":
        table.append("another", rows_of("another"))
    units = [f"{number:02d}" for number in range(12)]
    answers = start_together(table._storage.url, *[units] * 4)
    assert sorted(answers) == [(unit, won) for unit in units for won in (*["False"] * 3, "True")]
    rows = table.read()["unit"].to_pylist()
    assert [rows.count(unit) for unit in units] == [3] * 12, "the rows of a unit are there once"


def test_eight_writers_of_different_units_all_land_even_while_the_table_is_made(table: Table) -> None:
    units = [[f"{writer}-{number}" for number in range(2)] for writer in range(8)]
    answers = start_together(table._storage.url, *units)
    assert sorted(answers) == [(unit, "True") for both in units for unit in both]
    counted = table.read().group_by("unit").aggregate([([], "count_all")])
    assert sorted(counted["unit"].to_pylist()) == [unit for both in units for unit in both]
    assert set(counted["count_all"].to_pylist()) == {3}


def test_a_pinned_version_never_changes(table: Table) -> None:
    for unit in "abc":
        table.append(unit, rows_of(unit))
    pinned = Table(table._storage, "table", SCHEMA, version=1)
    assert pinned.version == 1
    before = pinned.read()
    assert set(before["unit"].to_pylist()) == {"a", "b"}
    table.append("d", rows_of("d"))
    assert pinned.read().equals(before)
    assert Table(table._storage, "table", SCHEMA, version=1).read().equals(before)
    assert (pinned.version, pinned.is_committed("c"), table.version) == (1, False, 3)


def test_a_pinned_version_outlives_many_commits(table: Table) -> None:
    # delta-rs writes a checkpoint at every 100th commit, and then drops the log before it if it is old enough.
    for number in range(101):
        table.append(f"unit {number}", rows_of("x", 1))
    assert list((Path(table.uri) / "_delta_log").glob("*.checkpoint.parquet")), "there was a checkpoint"
    assert Table(table._storage, "table", SCHEMA, version=3).read().num_rows == 4
    assert table.uncommitted(["unit 0", "unit 100", "unit 101"]) == ["unit 101"], "units outlive it too"
    retention = DeltaTable(table.uri).metadata().configuration["delta.logRetentionDuration"]
    assert retention == "interval 5200 weeks", "the default of 30 days would end a pinned version"


def test_a_version_that_does_not_exist_is_an_error(table: Table) -> None:
    with pytest.raises(SnapshotError, match="there is no version 0"):
        _ = Table(table._storage, "table", SCHEMA, version=0).version
    table.append("a", rows_of("a"))
    with pytest.raises(SnapshotError, match="there is no version 7"):
        _ = Table(table._storage, "table", SCHEMA, version=7).version


def test_rows_are_read_by_column_and_condition(table: Table) -> None:
    table.append("a", rows_of("a", 5))
    table.append("b", rows_of("b", 5))
    found = table.read(["number"], (pc.field("unit") == "b") & (pc.field("number") > 2))
    assert found.to_pydict() == {"number": [3, 4]}
    batches = list(table.batches(["unit"], pc.field("number") == 0))
    assert sorted(unit for batch in batches for unit in batch["unit"].to_pylist()) == ["a", "b"]


def test_rows_of_another_schema_are_refused(table: Table) -> None:
    with pytest.raises(KeyError):
        table.append("a", pa.table({"unit": ["a"]}))
    with pytest.raises(pa.ArrowInvalid):
        table.append("a", pa.table({"unit": ["a"], "number": ["not a number"]}))
    assert table.version is None


WIDER = SCHEMA.append(pa.field("added", pa.int64()))


def wider_rows(unit: str) -> pa.Table:
    return rows_of(unit).append_column("added", pa.array([7, 8, 9]))


def test_columns_that_came_later_are_null_in_old_rows(table: Table, tmp_path: Path) -> None:
    table.append("old", rows_of("old"))
    storage = Storage(str(Path(table.uri).parent))
    wider = Table(storage, "table", WIDER)
    assert wider.read().to_pylist() == [row | {"added": None} for row in rows_of("old").to_pylist()]
    assert wider.read(["added", "number"], pc.field("number") > 1).to_pylist() == [{"added": None, "number": 2}]
    assert wider.append("new", wider_rows("new"))
    assert not wider.append("new", wider_rows("new"))
    assert wider.read(["unit", "added"]).sort_by("unit").to_pylist() == [
        *({"unit": "new", "added": number} for number in (7, 8, 9)), *[{"unit": "old", "added": None}] * 3,
    ]  # fmt: skip
    pinned = Table(storage, "table", WIDER, version=0)
    assert pinned.read(["added"])["added"].null_count == pinned.count_rows() == 3
    assert table.append("third", rows_of("third")), "an earlier version of us still writes to it"
    assert wider.read(["added"])["added"].null_count == 6


def test_a_condition_on_a_column_that_came_later_holds_for_old_rows_as_for_null(table: Table) -> None:
    """delta-rs bounds the new column of old files by null, of which Arrow concludes that it is never null."""
    table.append("old", rows_of("old"))
    wider = Table(Storage(str(Path(table.uri).parent)), "table", SCHEMA.append(pa.field("more", pa.string())))
    is_null, is_other = pc.field("more").is_null(), pc.field("more") != "x"
    for version in range(4):
        found = wider.read(["unit", "more"])
        wanted = [unit for unit, more in zip(*found.to_pydict().values(), strict=True) if more is None]
        assert wider.read(["unit"], is_null)["unit"].to_pylist() == wanted
        assert wider.count_rows(is_null) == len(wanted) == 3 + 2 * (version > 1)
        assert sum(batch.num_rows for batch in wider.batches_of(wider.files(), ["more"], is_null)) == len(wanted)
        assert wider.read(["more"], is_other)["more"].to_pylist() == ["y"] * (version > 2)
        more = [["x", "x"], [None, None], ["y", "x"], ["x", "x"]][version]
        rows = pa.table({"unit": [f"new {version}"] * 2, "number": [0, 1], "more": pa.array(more, pa.string())})
        wider.append(f"new {version}", rows)


def test_rows_of_a_table_that_lacks_a_column_can_be_rewritten(table: Table, tmp_path: Path) -> None:
    table.append("a", rows_of("a"))
    table.append("b", rows_of("b"))
    wider = Table(Storage(str(Path(table.uri).parent)), "table", WIDER)
    where = (pc.field("unit") == "a") & (pc.field("number") < 100)

    def raised(rows: pa.Table) -> pa.Table:
        return rows.set_column(1, "number", pc.add(rows["number"], 100)).set_column(2, "added", rows["number"])

    assert wider.rewrite(raised, where, name="raised") == 3
    assert wider.read(None, pc.field("unit") == "a").sort_by("number").to_pylist() == [
        {"unit": "a", "number": 100 + number, "added": number} for number in range(3)
    ]
    assert wider.read(["added"], pc.field("unit") == "b")["added"].null_count == 3


def test_of_writers_that_bring_a_new_column_at_once_every_unit_lands_once(table: Table, tmp_path: Path) -> None:
    table.append("old", rows_of("old"))
    writers = [Table(Storage(str(Path(table.uri).parent)), "table", WIDER) for _ in range(4)]
    for writer in writers:
        assert writer.version == 0
    with ThreadPoolExecutor(4) as pool:
        landed = list(pool.map(lambda i: writers[i].append(f"unit {i % 3}", wider_rows(f"unit {i % 3}")), range(4)))
    assert landed.count(True) == 3
    assert table.count_rows() == 12


def test_duckdb_and_delta_queries_read_it(table: Table) -> None:
    table.append("a", rows_of("a", 4))
    table.append("b", rows_of("b", 2))
    opened = DeltaTable(table.uri)
    pairs = opened.to_pyarrow_dataset()
    connection = duckdb.connect()
    connection.register("pairs", pairs)
    query = "SELECT unit, sum(number) AS total FROM pairs GROUP BY unit ORDER BY unit"
    assert connection.sql(query).fetchall() == [("a", 6), ("b", 1)]
    found = pa.table(QueryBuilder().register("pairs", opened).execute(query).read_all())
    assert found.to_pydict() == {"unit": ["a", "b"], "total": [6, 1]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda log: (log / "00000000000000000000.json").write_text("{"),
        lambda log: [file.unlink() for file in log.parent.glob("*.parquet")],
    ],
)
def test_a_damaged_table_is_named_with_a_way_out(table: Table, damage: Callable[[Path], object]) -> None:
    table.append("a", rows_of("a"))
    damage(Path(table.uri) / "_delta_log")
    with pytest.raises(StorageError) as caught:
        Table(table._storage, "table", SCHEMA).read()
    assert caught.value.message.startswith(f"cannot read the table {table.uri}: ")
    assert "\x1b" not in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_commit_that_cannot_be_made_names_unit_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.dataset.table.MAX_FIRST_WAIT_S", 0.0)
    (tmp_path / "file").write_bytes(b"")
    table = Table(Storage(str(tmp_path / "file")), "table", SCHEMA)
    with pytest.raises(StorageError, match=f"cannot commit unit a to {tmp_path}/file/table: .*"):
        table.append("a", rows_of("a"))
