"""S3 behind a proxy that breaks requests: every byte arrives, every unit once, or the error says where it failed."""

import hashlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import yaml
from factories import photo_pairs, write_parquet
from s3_faults import Fault, FaultyProxy, faulty_proxy

from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset import object_store
from pipelines.dataset import storage as storage_module
from pipelines.dataset.errors import ShardCorrupt, StorageError
from pipelines.dataset.layout import SHARDS, pairs_table
from pipelines.dataset.storage import MAX_ATTEMPTS, Storage
from pipelines.dataset.table import Commit, Table
from pipelines.ingest.committer import Committer
from pipelines.ingest.execution import ingest, pending_of, plan_units
from pipelines.ingest.pair_shards import write_units

SCHEMA = pa.schema([("unit", pa.string()), ("number", pa.int64())])
DATA = hashlib.shake_256(b"faults").digest(100_000)
MAPO = Path(sys.executable).with_name("mapo")
FOOTER_BYTES = 64 << 10  # what Arrow reads of a parquet file's end
PATIENCE = {
    "FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": 1}}),  # of s3fs; a stall must end within the test
    "AWS_TIMEOUT": "2s",  # of delta-rs
}
CANARIES = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY0001",
    "AWS_SECRET_ACCESS_KEY": "canary/secret/00000000000000000000000002",
    "AWS_SESSION_TOKEN": "canary-token-00000000000000000000000003",
}


@pytest.fixture
def proxy(s3_storage: Storage, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy without a plan between `s3_storage` and its server."""
    with faulty_proxy(s3_server["AWS_ENDPOINT_URL"]) as found:
        for name, value in {**PATIENCE, "AWS_ENDPOINT_URL": found.url}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "s3", json.loads(PATIENCE["FSSPEC_S3"]))
        yield found


@pytest.fixture
def storage(proxy: FaultyProxy, s3_storage: Storage) -> Storage:
    """The bucket, through the proxy."""
    return Storage(s3_storage.url)


@pytest.fixture
def few_attempts(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request an attempt of s3fs, no waiting between ours: what stays broken is given up soon."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)


def rows_of(unit: str) -> pa.Table:
    return pa.table({"unit": [unit] * 3, "number": [0, 1, 2]}, SCHEMA)


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)
def test_every_byte_goes_and_comes_whatever_fault_it_meets(
    proxy: FaultyProxy, storage: Storage, tmp_path: Path, fault: Fault
) -> None:
    (tmp_path / "file").write_bytes(DATA[::-1])
    actions: tuple[Callable[[], object], ...] = (
        lambda: storage.write("folder/a", DATA),
        lambda: storage.upload("folder/b", tmp_path / "file"),
        lambda: storage.read("folder/a") == DATA,
        lambda: storage.read_range("folder/a", 100, 1000) == DATA[100:1100],
        lambda: storage.download_folder("folder", tmp_path / "back"),
        lambda: storage.names() == ["folder/a", "folder/b"],
        lambda: storage.delete("folder/c"),
    )
    num_met = 0
    for action in actions:
        proxy.follow(fault, times=1)
        assert action() is not False
        num_met += proxy.met[fault]
    assert num_met >= (2 if fault.name.endswith("_UPLOAD") else 3)
    proxy.follow()
    assert {file.name: file.read_bytes() for file in (tmp_path / "back").iterdir()} == {"a": DATA, "b": DATA[::-1]}
    assert (storage.read("folder/a"), storage.read("folder/b")) == (DATA, DATA[::-1])


@pytest.mark.parametrize(
    ("fault", "method"),
    [
        (Fault.RESET_UPLOAD, "PUT"),
        (Fault.FLIPPED_UPLOAD, "PUT"),
        (Fault.LOST_ANSWER, "PUT"),
        (Fault.LOST_ANSWER, "POST"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_upload_in_parts_is_whole_whatever_part_of_it_fails(
    proxy: FaultyProxy, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, method: str
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)  # S3's smallest
    content = DATA * 120
    (tmp_path / "file").write_bytes(content)
    proxy.follow(fault, times=1, method=method, query="uploadId=")
    storage.upload("object", tmp_path / "file")
    assert proxy.met[fault] == 1
    assert hashlib.sha256(storage.read("object")).digest() == hashlib.sha256(content).digest()
    monkeypatch.setattr(object_store, "PART_BYTES", 6 << 20)  # as if the ETag were no digest of ours: it is read back
    object_store.Upload(content).check(storage.fs, storage.path("object"))
    with pytest.raises(object_store.WrongBytes, match="the 12000000 stored bytes differ"):
        object_store.Upload(content[:-1] + b"?").check(storage.fs, storage.path("object"))


def test_a_fault_that_stays_is_an_error_after_a_bounded_number_of_requests(
    few_attempts: None, proxy: FaultyProxy, storage: Storage
) -> None:
    storage.write("object", DATA)
    for action in (lambda: storage.write("object", b"x"), lambda: storage.read_range("object", 0, 9), storage.names):
        proxy.follow(Fault.SLOW_DOWN)
        with pytest.raises(StorageError, match=rf"cannot .* {storage.url}.*reduce your request rate"):
            action()
        asked_for_size = 1  # by a failed range: is the object too short?
        assert proxy.seen.total() <= MAX_ATTEMPTS * object_store.TRANSFER_ATTEMPTS + asked_for_size
    proxy.follow(Fault.FLIPPED_UPLOAD)
    with pytest.raises(StorageError, match=r"cannot write .*/object: the 100000 stored bytes differ from those sent"):
        storage.write("object", DATA)


def test_an_answer_cut_on_its_way_is_not_called_damage_of_the_object(
    few_attempts: None, proxy: FaultyProxy, storage: Storage
) -> None:
    storage.write("object", DATA)
    proxy.follow(Fault.SHORT_DOWNLOAD)
    with pytest.raises(StorageError, match="500 of 1000 bytes at 0") as caught:
        storage.read_range("object", 0, 1000)
    assert not isinstance(caught.value, ShardCorrupt)
    proxy.follow()
    with pytest.raises(ShardCorrupt):
        storage.read_range("object", 0, len(DATA) + 1)


def test_what_s3_refuses_is_not_asked_for_again(proxy: FaultyProxy, storage: Storage) -> None:
    storage.write("object", DATA)
    proxy.follow()
    with pytest.raises(ShardCorrupt):
        storage.read_range("object", len(DATA), 10)  # 416
    assert proxy.seen == {"GET": 1, "HEAD": 1}
    proxy.follow()
    with pytest.raises(StorageError):
        Storage("s3://no-such-bucket/x").write("y", b"z")
    assert proxy.seen == {"PUT": 1}


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("_delta_log/0", Fault.SLOW_DOWN),
        ("_delta_log/0", Fault.RESET_UPLOAD),
        ("_delta_log/0", Fault.LOST_ANSWER),
        ("_delta_log/0", Fault.CUT_DOWNLOAD),
        (".parquet", Fault.LOST_ANSWER),
        (".parquet", Fault.RESET_DOWNLOAD),
        (".parquet", Fault.STALLED_DOWNLOAD),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_unit_is_committed_once_and_reported_once_whatever_fault_it_meets(
    proxy: FaultyProxy, storage: Storage, key: str, fault: Fault
) -> None:
    table, method = Table(storage, "table", SCHEMA), "GET" if fault.name.endswith("_DOWNLOAD") else "PUT"
    answers, num_met = [], 0
    for unit in ("first", "second"):  # the first makes the table
        proxy.follow(fault, times=1, key=key, method=method)
        answers.append(table.append(unit, rows_of(unit)))
        num_met += proxy.met[fault]
    proxy.follow(fault, times=1, key=key, method=method)
    assert sorted(Table(storage, "table", SCHEMA).read()["unit"].to_pylist()) == ["first"] * 3 + ["second"] * 3
    assert num_met + proxy.met[fault] >= 1
    proxy.follow()
    assert (answers, table.version) == ([True, True], 1)
    assert not table.append("second", rows_of("second"))


def test_a_lost_commit_answer_is_our_commit_and_anothers_is_not(proxy: FaultyProxy, storage: Storage) -> None:
    table, other = Table(storage, "table", SCHEMA), Table(storage, "table", SCHEMA)
    lost = {"times": 1, "key": "_delta_log/0", "method": "PUT"}
    proxy.follow(Fault.LOST_ANSWER, **lost)
    assert table.append_on(None, "a", rows_of("a")) is Commit.DONE
    assert proxy.met == {Fault.LOST_ANSWER: 1}
    proxy.follow(Fault.LOST_ANSWER, **lost)
    assert table.append_on(0, "b", rows_of("b")) is Commit.DONE
    assert other.append_on(1, "b", rows_of("b")) is Commit.ALREADY_DONE
    assert other.append_on(0, "c", rows_of("c")) is Commit.CONFLICT
    assert not other.append("a", rows_of("a"))
    proxy.follow(Fault.LOST_ANSWER, **lost)
    assert other.append("c", rows_of("c"))
    assert proxy.met == {Fault.LOST_ANSWER: 1}
    assert Table(storage, "table", SCHEMA).read().num_rows == 9


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = photo_pairs(24, num_ties=2, num_damaged=3)
    return write_parquet(tmp_path_factory.mktemp("photos") / "photos.parquet", rows + rows[:3], row_group_size=6)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The rows and shard digests of an ingest into a local folder."""
    local = Storage(str(tmp_path_factory.mktemp("local")))
    ingest(config_of(photos), local)
    return contents(local)


def config_of(path: object) -> IngestConfig:
    source = SourceConfig(format="pickapic", path=str(path))
    return IngestConfig(sources=(source,), max_shard_bytes=65_536, max_drop_ratio=1.0)


def contents(storage: Storage) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows in the order of the source, and the digest of every shard."""
    rows = pairs_table(storage).read().to_pylist()
    shards = {name: hashlib.sha256(storage.read(name)).hexdigest() for name in storage.names(SHARDS)}
    return sorted(rows, key=lambda row: row["source_row"]), shards


def run_ingest(folder: Path, storage: Storage, photos: Path, environment: dict[str, str]) -> tuple[int, str]:
    """`mapo ingest` as a job on the tests' Ray, whose workers get the environment too; exit code and all it said."""
    import ray

    file = folder / "config.yaml"
    section = config_of(photos).model_dump(mode="json")
    file.write_text(yaml.safe_dump({"name": "faults", "storage": storage.url, "ingest": section}))
    job = json.dumps({"runtime_env": {"env_vars": environment}})
    address = ray.get_runtime_context().gcs_address
    settings = {"RAY_ADDRESS": address, "RAY_JOB_CONFIG_JSON_ENV_VAR": job, "PYTHONWARNINGS": "ignore"}
    settings = {**os.environ, **environment, **settings}
    command = [MAPO, "ingest", file, "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=600, check=False)
    return done.returncode, done.stdout + done.stderr


def ingest_through_a_mix(
    seed: int, proxy: FaultyProxy, storage: Storage, server: dict[str, str], photos: Path, folder: Path
) -> Any:
    """Rows and digests after an ingest, and a reading of it, in which a quarter of all requests meet a fault."""
    proxy.follow(*Fault, ratio=0.25, seed=seed, max_in_a_row=2, silent_key=f"{SHARDS}/")
    environment = {**server, **CANARIES, **PATIENCE, "AWS_ENDPOINT_URL": proxy.url}
    code, said = run_ingest(folder, storage, photos, environment)
    assert code == 0, said
    found, met = contents(storage), proxy.met
    assert len(met) >= 6, met  # of nine; how many shards are put while a fault is due is a matter of chance
    proxy.follow()
    assert canaries_in(said, str(found), *everything_on(storage)) == []
    return found


def test_an_ingest_through_a_mix_of_faults_gives_the_rows_and_bytes_of_an_undisturbed_one(
    undisturbed: Any, proxy: FaultyProxy, storage: Storage, s3_server: dict[str, str], photos: Path, tmp_path: Path
) -> None:
    assert ingest_through_a_mix(0, proxy, storage, s3_server, photos, tmp_path) == undisturbed


def everything_on(storage: Storage) -> list[str]:
    """The bytes of all objects: journal, configuration, log of the table, shards."""
    names = storage.names()
    for part in ("/journal/", "/config.json", "/_delta_log/"):
        assert any(part in f"/{name}" for name in names), part
    return [storage.read(name).decode(errors="replace") for name in names]


def canaries_in(*texts: str) -> list[str]:
    """Names of the credentials whose values are in one of the texts."""
    return [name for name, value in CANARIES.items() if any(value in text for text in texts)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_so_it_is_for_any_seed(
    undisturbed: Any, proxy: FaultyProxy, storage: Storage, s3_server: dict[str, str], photos: Path, tmp_path: Path,
    seed: int,
) -> None:  # fmt: skip
    assert ingest_through_a_mix(seed, proxy, storage, s3_server, photos, tmp_path) == undisturbed


def test_credentials_are_in_no_message_no_log_and_no_object(
    ray_cluster: None, few_attempts: None, proxy: FaultyProxy, storage: Storage, s3_server: dict[str, str],
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    caplog.set_level("INFO")
    storage.write("object", DATA)
    told = []
    for fault in (Fault.SLOW_DOWN, Fault.CUT_DOWNLOAD, Fault.SHORT_DOWNLOAD):
        proxy.follow(fault)
        told += [failure(lambda: storage.read("object"))]
    for fault in (Fault.LOST_ANSWER, Fault.FLIPPED_UPLOAD):
        proxy.follow(fault)
        told += [failure(lambda: storage.write("object", DATA))]
    proxy.follow()
    nowhere = Storage("s3://no-such-bucket/x")
    told += [
        failure(nowhere.check_writable),
        failure(lambda: Table(nowhere, "table", SCHEMA).append("u", rows_of("u"))),
    ]
    assert all(told)
    proxy.follow(Fault.LOST_ANSWER, method="PUT", key=f"{SHARDS}/")
    environment = {**s3_server, **CANARIES, **PATIENCE, "AWS_MAX_ATTEMPTS": "1", "AWS_ENDPOINT_URL": proxy.url}
    environment["MAPO_STORAGE_PATIENCE_S"] = "0"  # a run would sit the outage out
    code, said = run_ingest(tmp_path, storage, photos, environment)
    assert (code, "StorageError" in said) == (1, True), said
    proxy.follow()
    kept = [storage.read(name).decode(errors="replace") for name in storage.names()]
    assert any('"failed"' in text for text in kept), "the journal says so"
    assert canaries_in(*told, caplog.text, said, *kept) == []


def failure(action: Callable[[], object]) -> str:
    """All that an error says of itself, its causes included; '' if there was none."""
    try:
        action()
    except StorageError as error:
        return repr(error) + str(error) + "".join(traceback.format_exception(error))
    return ""


def state_of(storage: Storage) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every shard."""
    return {name: (storage.read(name), Path(storage.path(name)).stat().st_mtime_ns) for name in storage.names(SHARDS)}


def test_of_one_new_file_among_twenty_old_ones_only_it_is_read(
    proxy: FaultyProxy, storage: Storage, tmp_path: Path
) -> None:
    source, target = storage.child("source"), Storage(str(tmp_path / "target"))
    sources = (SourceConfig(format="pickapic", path=source.url),)
    config = IngestConfig(sources=sources, max_shard_bytes=1 << 20, image_check="header")

    def add_file(number: int) -> int:
        rows = photo_pairs(2, seed=number, sizes=((1600, 1600),))
        file = write_parquet(tmp_path / "new.parquet", rows)
        source.upload(f"{number:02d}.parquet", file)
        return file.stat().st_size

    def bring_up_to_date() -> int:
        units = pending_of(plan_units(config), target)
        for unit, rows in zip(units, write_units(units, target), strict=True):
            Committer(pairs_table(target)).append(unit.id, rows)
        return len(units)

    old_bytes = sum(add_file(number) for number in range(20))
    assert bring_up_to_date() == 20
    rows, shards = pairs_table(target).read(), state_of(target)
    new_bytes = add_file(20)
    proxy.follow()
    assert bring_up_to_date() == 1
    read = {key: size for key, size in proxy.downloaded.items() if key.endswith(".parquet") and "source/" in key}
    footers = sum(size for key, size in read.items() if not key.endswith("20.parquet"))
    assert 0 < footers <= 20 * FOOTER_BYTES < 0.2 * old_bytes, "of an old file its end, once"
    of_new = next(size for key, size in read.items() if key.endswith("20.parquet"))
    assert 0.9 * new_bytes < of_new < new_bytes + 2 * FOOTER_BYTES
    assert shards.items() < state_of(target).items()
    assert len(state_of(target)) == len(shards) + 1 == 21
    assert pairs_table(target).read().num_rows == rows.num_rows + 2 == 42
