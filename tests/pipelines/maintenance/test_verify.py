"""Verify: whatever happens to a committed byte is named with its place."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from encoded import LATENTS, TEXT, write_encoded
from factories import photo_pairs, write_parquet

from orchestration.cli import main
from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import latents_table, pairs_table
from pipelines.dataset.storage import Storage
from pipelines.ingest.committer import Committer
from pipelines.ingest.execution import plan_units, write_unit
from pipelines.maintenance.verify import committed_shards, verify


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Pairs in several shards, and latents and texts beside them."""
    storage = Storage(str(tmp_path / "storage"))
    file = write_parquet(tmp_path / "photos.parquet", photo_pairs(24, num_damaged=3, num_ties=2), row_group_size=8)
    source = SourceConfig(format="pickapic", path=str(file))
    committer = Committer(pairs_table(storage))
    for unit in plan_units(IngestConfig(sources=(source,), max_shard_bytes=65_536)):
        committer.append(unit.id, write_unit(unit, storage))
    write_encoded(storage, tmp_path, num_train=6, num_validation=2)
    return storage


def pair_rows(storage: Storage) -> list[dict[str, object]]:
    rows = pairs_table(storage).read().to_pylist()
    return sorted((row for row in rows if row["shard"]), key=lambda row: (row["shard"], row["offset_0"]))


def flip(storage: Storage, name: str, offset: int) -> None:
    data = bytearray(storage.read(name))
    data[offset] ^= 1
    storage.write(name, bytes(data))


def test_a_sound_data_set_has_no_difference(storage: Storage) -> None:
    shards = committed_shards(storage)
    assert {shard.name for shard in shards} == {name for name in storage.names() if name.endswith(".tar")}
    assert len(shards) >= 4
    assert sum(shard.members.num_rows for shard in shards) == 2 * len(pair_rows(storage)) + 8 + 5
    assert verify(storage) == []


def test_a_flipped_byte_of_an_image_names_shard_pair_side_and_place(storage: Storage) -> None:
    row = pair_rows(storage)[3]
    flip(storage, str(row["shard"]), int(row["offset_1"]) + int(row["length_1"]) - 1)  # type: ignore[call-overload]
    whole, member = verify(storage)
    assert whole.startswith(f"{storage.url}/{row['shard']}: sha256 is ")
    assert whole.endswith(f", but {row['shard_sha256']} was committed")
    assert member.startswith(
        f"{storage.url}/{row['shard']}: image 1 of pair {row['pair_key']} at {row['offset_1']:,}: "
    )
    assert member.endswith(f", but {row['image_1_sha256']} was committed")


def test_a_flipped_byte_outside_the_payloads_is_seen_too(storage: Storage) -> None:
    row = pair_rows(storage)[0]
    flip(storage, str(row["shard"]), 0)  # in the header of the first member
    (line,) = verify(storage)
    assert line.startswith(f"{storage.url}/{row['shard']}: sha256 is ")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"dataset/latents/{LATENTS}/unit.tar", "latents of pair "),
        (f"dataset/text/{TEXT}/unit.tar", "embedding of prompt "),
    ],
)
def test_latents_and_texts_are_held_to_their_digests(storage: Storage, name: str, what: str) -> None:
    flip(storage, name, 512)
    whole, member = verify(storage)
    assert whole.startswith(f"{storage.url}/{name}: sha256 is ")
    assert member.startswith(f"{storage.url}/{name}: {what}")


def test_a_checksum_that_would_stop_a_training_is_seen_where_the_bytes_are_as_committed(storage: Storage) -> None:
    table = latents_table(storage, LATENTS)
    shard = f"dataset/latents/{LATENTS}/unit.tar"

    def wrong(rows: pa.Table) -> pa.Table:
        known = rows["crc32"].to_pylist()
        return rows.set_column(rows.schema.get_field_index("crc32"), "crc32", pa.array([5, *known[1:]], pa.int64()))

    (first, *_), right = table.read()["pair_key"].to_pylist(), table.read()["crc32"][0].as_py()
    table.rewrite(wrong, pc.field("crc32") == right, name="wrong")
    (line,) = verify(storage)
    assert line.startswith(f"{storage.url}/{shard}: latents of pair {first} at ")
    assert line.endswith(f": the bytes are as committed, but their CRC-32 is {right}, not 5")


def test_a_cut_shard_names_every_member_that_is_lost(storage: Storage) -> None:
    row = pair_rows(storage)[1]
    name, whole = str(row["shard"]), storage.read(str(row["shard"]))
    end = int(row["offset_0"]) + 10  # type: ignore[call-overload]
    storage.write(name, whole[:end])
    lines = verify(storage)
    assert lines[0] == f"{storage.url}/{name}: {end:,} bytes, but {len(whole):,} were committed"
    beyond = [
        f"{storage.url}/{name}: image {side} of pair {row['pair_key']} at {row[f'offset_{side}']:,} ends at "
        f"{row[f'offset_{side}'] + row[f'length_{side}']:,}, past the end at {end:,}"  # type: ignore[operator]
        for row in pair_rows(storage)
        for side in (0, 1)
        if row["shard"] == name and row[f"offset_{side}"] + row[f"length_{side}"] > end  # type: ignore[operator]
    ]
    assert sorted(lines[1:]) == sorted(beyond)


def test_a_shard_that_grew_is_seen(storage: Storage) -> None:
    name = str(pair_rows(storage)[0]["shard"])
    storage.write(name, storage.read(name) + b"\0" * 512)
    (line,) = verify(storage)
    assert line.startswith(f"{storage.url}/{name}: ")
    assert line.endswith(" were committed")


def test_a_missing_shard_is_one_line_with_what_it_held(storage: Storage) -> None:
    name = str(pair_rows(storage)[0]["shard"])
    held = sum(row["shard"] == name for row in pair_rows(storage))
    storage.delete(name)
    assert verify(storage) == [f"{storage.url}/{name}: missing, with {2 * held} members that rows point to"]


def test_swapped_shards_are_both_named(storage: Storage) -> None:
    one, other, *_ = sorted({str(row["shard"]) for row in pair_rows(storage)})
    first, second = storage.read(one), storage.read(other)
    storage.write(one, second)
    storage.write(other, first)
    lines = verify(storage)
    for name in (one, other):
        of_shard = [line for line in lines if line.startswith(f"{storage.url}/{name}: ")]
        assert " was committed" in of_shard[0] or " were committed" in of_shard[0]
        assert len(of_shard) == 1 + 2 * sum(row["shard"] == name for row in pair_rows(storage))


def test_blocks_smaller_than_a_member_give_the_same_digests(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.maintenance.verify.BLOCK_BYTES", 1000)
    assert verify(storage) == []
    flip(storage, str(pair_rows(storage)[0]["shard"]), int(pair_rows(storage)[0]["offset_0"]) + 999)  # type: ignore[call-overload]
    assert len(verify(storage)) == 2


def test_what_no_row_points_to_does_not_exist(storage: Storage) -> None:
    storage.write("dataset/shards/left-by-a-killed-writer.tar", b"half a tar")
    assert verify(storage) == []


def test_no_data_set_is_an_error_not_a_success(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="there is no data set at "):
        verify(Storage(str(tmp_path)))


def test_the_command_says_what_it_read(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", storage.url]) == 0
    shards = committed_shards(storage)
    num_bytes = sum(storage.size(shard.name) for shard in shards)
    assert capsys.readouterr().out == f"{len(shards)} shards, {num_bytes:,} bytes: all match their digests\n"


@pytest.mark.parametrize(
    ("damage", "count"),
    [
        (lambda storage, name: storage.delete(name), "1 difference "),
        (lambda storage, name: flip(storage, name, 512), "2 differences "),
    ],
)
def test_the_command_lists_the_differences_and_exits_1(
    storage: Storage, capsys: pytest.CaptureFixture[str], damage: Callable[[Storage, str], None], count: str
) -> None:
    damage(storage, str(pair_rows(storage)[0]["shard"]))
    assert main(["data", "verify", storage.url]) == 1
    shown = capsys.readouterr()
    assert shown.out.splitlines() == verify(storage)
    assert shown.err.startswith(f"ShardCorrupt: {count}in the ")
    assert "\nhint: " in shown.err
