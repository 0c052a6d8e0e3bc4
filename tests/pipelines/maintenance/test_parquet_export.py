"""Export: the kept pairs as anyone reads them, whole or absent."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from factories import photo_pairs
from kept import images_in, keep, keep_rows, rows_in

from orchestration.cli import main
from pipelines.dataset.errors import ConfigError, ShardCorrupt, SnapshotError
from pipelines.dataset.pair import PAIRS_SCHEMA
from pipelines.dataset.storage import Storage
from pipelines.maintenance import export as parquet_export
from pipelines.maintenance.export import export_parquet
from pipelines.maintenance.remove import Condition, remove


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "storage"))
    keep_rows(storage, tmp_path / "photos.parquet", photo_pairs(40, num_ties=3, num_damaged=4))
    return storage


def kept_in(storage: Storage) -> dict[str, dict[str, object]]:
    return {row["pair_key"]: row for row in rows_in(storage) if row["status"] == "kept"}


def test_the_rows_are_the_kept_rows_with_all_columns(storage: Storage, tmp_path: Path) -> None:
    done = export_parquet(storage, str(tmp_path / "kept.parquet"))
    table = pq.read_table(tmp_path / "kept.parquet")
    assert table.schema.remove_metadata().equals(PAIRS_SCHEMA)
    assert {row["pair_key"]: row for row in table.to_pylist()} == kept_in(storage)
    assert (done.num_pairs, done.num_bytes) == (len(kept_in(storage)), (tmp_path / "kept.parquet").stat().st_size)


@pytest.mark.parametrize("target", ["kept.parquet", "kept"])
def test_with_images_it_is_a_pick_a_pic_source_of_the_same_pairs(
    storage: Storage, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_export, "GROUP_BYTES", 20_000)
    monkeypatch.setattr(parquet_export, "PART_BYTES", 40_000)
    done = export_parquet(storage, str(tmp_path / "out" / target), images=True)
    assert done.num_files == 1 if target.endswith(".parquet") else done.num_files > 2
    again = Storage(str(tmp_path / "again"))
    keep(again, tmp_path / "out" / target)
    kept, images = kept_in(storage), images_in(storage)
    assert images_in(again) == {key: images[key] for key in kept}
    same = ("prompt", "prompt_id", "label_0", "status", "split", "user_id", "image_0_sha256", "width_1", "length_1")
    assert {key: [row[name] for name in same] for key, row in kept_in(again).items()} == {
        key: [row[name] for name in same] for key, row in kept.items()
    }


@pytest.mark.parametrize("target", ["kept.parquet", "kept"])
def test_a_failure_on_the_way_leaves_nothing(
    storage: Storage, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_export, "GROUP_BYTES", 10_000)
    monkeypatch.setattr(parquet_export, "PART_BYTES", 1)
    shard = max(str(row["shard"]) for row in kept_in(storage).values())
    storage.write(shard, bytes(storage.size(shard)))
    (tmp_path / "out").mkdir()
    with pytest.raises(ShardCorrupt):
        export_parquet(storage, str(tmp_path / "out" / target), images=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_there_is_not_overwritten(storage: Storage, tmp_path: Path) -> None:
    target = tmp_path / "kept.parquet"
    target.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=" already exists"):
        export_parquet(storage, str(target))
    assert target.read_bytes() == b"mine"


def test_no_data_set_and_no_kept_pair_are_errors(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="no data set"):
        export_parquet(Storage(str(tmp_path / "none")), str(tmp_path / "a.parquet"))
    remove(storage, [Condition("source", "pickapic")])
    with pytest.raises(SnapshotError, match="no kept pair"):
        export_parquet(storage, str(tmp_path / "a.parquet"))


def test_a_target_that_cannot_be_written_is_one_message(
    storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert main(["data", "export", storage.url, "--parquet", str(tmp_path / "file" / "kept.parquet")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("StorageError: cannot write ")
    assert "\nhint: " in error


def test_to_and_from_an_object_store(s3_storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_rows(s3_storage, tmp_path / "photos.parquet", photo_pairs(8))
    target = s3_storage.uri("exported")
    assert main(["data", "export", s3_storage.url, "--parquet", target, "--images"]) == 0
    assert capsys.readouterr().out.startswith("8 pairs in 1 files, ")
    assert s3_storage.names("exported") == ["exported/_SUCCESS", "exported/part-00000.parquet"]
    export_parquet(s3_storage, str(tmp_path / "kept.parquet"), images=True)
    assert pq.read_table(tmp_path / "kept.parquet").num_rows == 8
