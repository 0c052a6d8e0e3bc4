"""The same on S3: storage, table and a whole ingest against a server in a process of its own."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from factories import photo_pairs, write_parquet

from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset import storage as storage_module
from pipelines.dataset.errors import ShardCorrupt, SourceError, StorageError
from pipelines.dataset.layout import SHARDS, pairs_table
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.ingest.execution import ingest, pending_of, plan_units
from pipelines.maintenance.verify import committed_shards, verify
from pipelines.sources.files import list_files

SCHEMA = pa.schema([("unit", pa.string()), ("number", pa.int64())])

WRITER = """
import sys
from pipelines.dataset.storage import Storage
Storage(sys.argv[1]).write("folder/other", b"from another process")
"""

DRIVER = """
import sys
import ray
from pipelines.config import IngestConfig
from pipelines.dataset.storage import Storage
from pipelines.ingest.execution import ingest

environment = eval(sys.argv[4])
ray.init(sys.argv[3], log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": environment})
ingest(IngestConfig.model_validate_json(sys.argv[1]), Storage(sys.argv[2]))
"""


def ingest_on_s3(config: IngestConfig, storage: Storage, environment: dict[str, str]) -> None:
    """`ingest` as a job of its own on the tests' Ray, whose workers get the environment of the S3 server."""
    import ray

    address = ray.get_runtime_context().gcs_address
    arguments = [config.model_dump_json(), storage.url, address, repr(environment)]
    subprocess.run([sys.executable, "-c", DRIVER, *arguments], check=True, timeout=400)


def config_of(path: object) -> IngestConfig:
    return IngestConfig(
        sources=(SourceConfig(format="pickapic", path=str(path)),), max_shard_bytes=65_536, max_drop_ratio=1.0
    )


def contents(storage: Storage, *, without: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows, and the digest of every shard."""
    rows = pairs_table(storage).read().drop_columns(list(without)).to_pylist()
    shards = {name: hashlib.sha256(storage.read(name)).hexdigest() for name in storage.names(SHARDS)}
    return sorted(rows, key=lambda row: row["source_row"]), shards


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = photo_pairs(40, num_ties=2, num_damaged=4)
    return write_parquet(tmp_path_factory.mktemp("photos") / "photos.parquet", rows + rows[:3], row_group_size=8)


def test_what_is_written_is_read_and_listed(s3_storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from a file")
    assert s3_storage.names() == []
    s3_storage.check_writable()
    s3_storage.write("folder/x", b"one")
    s3_storage.write("folder/x", b"two")
    s3_storage.upload("y", tmp_path / "file")
    assert s3_storage.names() == ["folder/x", "y"]
    assert s3_storage.child("folder").names() == ["x"]
    assert (s3_storage.read("folder/x"), s3_storage.size("y")) == (b"two", 11)
    s3_storage.download_folder("folder", tmp_path / "back")
    assert (tmp_path / "back" / "x").read_bytes() == b"two"
    s3_storage.delete("y")
    s3_storage.delete("y")
    assert [s3_storage.exists(name) for name in ("folder/x", "folder", "y")] == [True, True, False]


def test_a_listing_never_hides_what_another_process_wrote(s3_storage: Storage) -> None:
    s3_storage.write("folder/mine", b"1")
    assert s3_storage.names("folder") == ["folder/mine"]
    assert not s3_storage.exists("folder/other")
    subprocess.run([sys.executable, "-c", WRITER, s3_storage.url], check=True, timeout=300)
    assert s3_storage.exists("folder/other")
    assert s3_storage.size("folder/other") == 20
    assert s3_storage.names("folder") == ["folder/mine", "folder/other"]


@pytest.mark.parametrize(("offset", "length"), [(3, 7), (9, 2), (50, 2)])
def test_short_or_wrong_bytes_are_an_error_never_data(
    s3_storage: Storage, monkeypatch: pytest.MonkeyPatch, offset: int, length: int
) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)
    s3_storage.write("object", b"0123456789"[:9])
    assert s3_storage.read_range("object", 3, 6) == b"345678"
    with pytest.raises(ShardCorrupt, match=f"cannot read {s3_storage.url}/object: "):
        s3_storage.read_range("object", offset, length)
    with pytest.raises(ShardCorrupt, match="differ from their digest"):
        s3_storage.read_range("object", 3, 2, "ab" * 32)


def test_what_is_missing_is_named_with_its_place(s3_storage: Storage) -> None:
    with pytest.raises(StorageError, match=f"cannot read {s3_storage.url}/none: "):
        s3_storage.read("none")
    with pytest.raises(StorageError, match=f"cannot read {s3_storage.url}/none: ") as caught:
        s3_storage.read_range("none", 0, 1)
    assert not isinstance(caught.value, ShardCorrupt)
    with pytest.raises(StorageError, match=r"cannot write s3://no-such-bucket/x/\.write-probe") as caught:
        Storage("s3://no-such-bucket/x").check_writable()
    assert caught.value.hint
    with pytest.raises(StorageError, match=r"cannot read the table s3://no-such-bucket/x/dataset/pairs: "):
        _ = pairs_table(Storage("s3://no-such-bucket/x")).version


def test_concurrent_appends_all_land_and_none_twice(s3_storage: Storage) -> None:
    """Eight writers of two units each, and one unit that all of them write: conditional puts decide."""

    def write(writer: int) -> list[bool]:
        table = Table(s3_storage, "table", SCHEMA)
        units = [f"{writer}-0", "same", f"{writer}-1"]
        return [table.append(u, pa.table({"unit": [u] * 3, "number": [0, 1, 2]}, SCHEMA)) for u in units]

    with ThreadPoolExecutor(8) as writers:
        answers = list(writers.map(write, range(8)))
    assert all(answer[0] and answer[2] for answer in answers)
    assert sum(answer[1] for answer in answers) == 1
    table = Table(s3_storage, "table", SCHEMA)
    counted = table.read().group_by("unit").aggregate([([], "count_all")])
    assert sorted(counted["unit"].to_pylist()) == sorted([*(f"{w}-{i}" for w in range(8) for i in range(2)), "same"])
    assert set(counted["count_all"].to_pylist()) == {3}
    assert (table.version, Table(s3_storage, "table", SCHEMA, version=5).read().num_rows) == (16, 18)


def test_ingest_gives_the_same_rows_and_bytes_as_in_a_local_folder(
    ray_cluster: None, s3_storage: Storage, s3_server: dict[str, str], photos: Path, tmp_path: Path
) -> None:
    local = Storage(str(tmp_path / "storage"))
    ingest(config_of(photos), local)
    ingest_on_s3(config_of(photos), s3_storage, s3_server)
    assert contents(s3_storage) == contents(local)
    assert pending_of(plan_units(config_of(photos)), s3_storage) == []
    assert verify(s3_storage) == []
    name = committed_shards(s3_storage)[0].name  # a shard of repeats alone lies there too, and no row points to it
    s3_storage.write(name, s3_storage.read(name)[:-512])
    assert len(verify(s3_storage)) == 1


def test_sources_on_s3_are_read_as_local_ones_and_only_once(
    ray_cluster: None, s3_storage: Storage, s3_server: dict[str, str], photos: Path, tmp_path: Path
) -> None:
    source = s3_storage.child("source files")
    source.upload("deep/photos.parquet", photos)
    source.write("deep/README.md", b"not a source")
    paths = [source.url, f"{source.url}/deep/photos.parquet", f"{source.url}/**/*.parquet", f"{source.url}/deep/p*"]
    listed = [list_files(path, (".parquet",)) for path in paths]
    assert all(found == listed[0] for found in listed), "a file is the same however it was found"
    assert [file.uri for file in listed[0]] == [f"{source.url}/deep/photos.parquet"]

    storages = Storage(str(tmp_path / "from local")), Storage(str(tmp_path / "from s3"))
    ingest(config_of(photos), storages[0])
    ingest_on_s3(config_of(source.url), storages[1], s3_server)
    placed = ("unit", "source_uri", "shard", "shard_bytes", "shard_sha256")  # shards name their unit and source
    offsets = ("offset_0", "offset_1")
    assert contents(storages[1], without=placed + offsets)[0] == contents(storages[0], without=placed + offsets)[0]
    for row in contents(storages[1])[0]:
        if row["shard"]:
            storages[1].read_range(row["shard"], row["offset_1"], row["length_1"], row["image_1_sha256"])
    assert pending_of(plan_units(config_of(paths[2])), storages[1]) == []
    source.upload("deep/photos.parquet", write_parquet(tmp_path / "new.parquet", photo_pairs(3, seed=1)))
    assert len(pending_of(plan_units(config_of(source.url)), storages[1])) == 1, "it has changed"
    with pytest.raises(SourceError, match="no file matches s3://"):
        list_files(f"{source.url}/*.csv", (".parquet",))


def test_a_server_that_is_gone_is_a_storage_error(s3_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()
    gone = Storage(s3_storage.url)
    for action in (lambda: gone.read_range("x", 0, 1), lambda: gone.exists("x"), gone.names):
        with pytest.raises(StorageError, match=r"cannot .* s3://.*: .*127\.0\.0\.1:9"):
            action()
