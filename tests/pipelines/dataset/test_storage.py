"""Storage: whole or absent, exactly the bytes, and an error that says where."""

import errno
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error

from pipelines.dataset import storage as storage_module
from pipelines.dataset.errors import MapoError, ShardCorrupt, StorageError
from pipelines.dataset.storage import MAX_ATTEMPTS, Storage

OLD, NEW_BYTES = b"old" * 100, 64 << 20

WRITER = """
import sys
from pathlib import Path
from pipelines.dataset.storage import Storage
source = Path(sys.argv[2])
data = source if sys.argv[3] == "upload" else source.read_bytes()
storage = Storage(sys.argv[1])
print("ready", flush=True)
storage.upload("object", data) if sys.argv[3] == "upload" else storage.write("object", data)
print("done", flush=True)
"""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """In memory, but each operation fails `faults` times at first: with an OSError, or with too few bytes."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[Counter[str]] = Counter()
    calls: ClassVar[Counter[str]] = Counter()
    error: ClassVar[Exception] = ConnectionResetError("connection reset by peer")

    def _fail(self, operation: str) -> bool:
        type(self).calls[operation] += 1
        if type(self).faults[operation] <= 0:
            return False
        type(self).faults[operation] -= 1
        return True

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if self._fail("read"):
            raise self.error
        data: bytes = super().cat_file(path, start=start, end=end, **options)
        return data[:-1] if self._fail("short") else data

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        if self._fail("write"):
            raise self.error
        super().pipe_file(path, value, **options)

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        if self._fail("list"):
            raise self.error
        return super().find(path, *arguments, **options)


@pytest.fixture
def faulty(no_waiting: None) -> type[FaultyFileSystem]:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.store.clear()
    FaultyFileSystem.faults, FaultyFileSystem.calls = Counter(), Counter()
    FaultyFileSystem.error = ConnectionResetError("connection reset by peer")
    return FaultyFileSystem


def test_what_is_written_is_read_and_listed(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "b").write_bytes(b"from a file")
    storage.write("a/x", b"one")
    storage.write("a/x", b"two")
    storage.upload("a/b/y", tmp_path / "local" / "b")
    storage.upload_folder("c", tmp_path / "local")
    assert storage.names() == ["a/b/y", "a/x", "c/b"]
    assert storage.names("a/b") == ["a/b/y"]
    assert storage.names("none") == []
    assert (storage.read("a/x"), storage.read("a/b/y"), storage.size("c/b")) == (b"two", b"from a file", 11)
    storage.download_folder("a", tmp_path / "back")
    assert (tmp_path / "back" / "b" / "y").read_bytes() == b"from a file"
    storage.delete("a/x")
    storage.delete("a/x")
    assert [storage.exists(name) for name in ("a/x", "a", "c/b", "d")] == [False, True, True, False]
    assert storage.child("a").names() == ["b/y"]


@pytest.mark.parametrize("url", ["{}/a", "file://{}/a", "{}/b/../a", "{}/a/"])
def test_a_place_has_one_url_however_it_is_written(tmp_path: Path, url: str) -> None:
    assert Storage(url.format(tmp_path)).url == str(tmp_path / "a")


def test_a_relative_path_means_the_folder_where_the_command_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs/photos")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.write("x", b"1")
    assert (tmp_path / "runs" / "photos" / "x").read_bytes() == b"1"


def test_the_root_folder_is_not_the_working_folder() -> None:
    root = Storage("/")
    assert (root.path(), root.path("tmp"), root.uri("tmp")) == ("/", "/tmp", "/tmp")
    assert root.exists("tmp")


def test_a_storage_crosses_process_borders_as_its_url(storage: Storage) -> None:
    storage.write("x", b"1")
    pickled = pickle.dumps(storage)
    assert len(pickled) < 200 + len(storage.url)
    assert pickle.loads(pickled).read("x") == b"1"


@pytest.mark.parametrize("how", ["write", "upload"])
@pytest.mark.parametrize("before", [None, OLD])
def test_a_writer_killed_midway_leaves_the_old_object_or_none(
    storage: Storage, tmp_path: Path, how: str, before: bytes | None
) -> None:
    folder, source = Path(storage.path()), tmp_path / "source"
    folder.mkdir()
    source.write_bytes(os.urandom(1 << 20) * (NEW_BYTES >> 20))
    if before is not None:
        storage.write("object", before)
    command = [sys.executable, "-c", WRITER, storage.url, str(source), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == b"ready\n"
        while not any(file.name != "object" and file.stat().st_size for file in folder.iterdir()):
            assert writer.poll() is None, "the writer was done before it was seen at work"
        writer.send_signal(signal.SIGKILL)
        assert writer.stdout.read() == b""
    assert [file.name for file in folder.iterdir() if file.name != "object"], "it was killed midway"
    assert storage.exists("object") == (before is not None)
    if before is not None:
        assert storage.read("object") == before
    assert storage.names() == ([] if before is None else ["object"]), "what it left is no object"


def test_a_failed_local_write_leaves_nothing_beside_the_old_object(storage: Storage, tmp_path: Path) -> None:
    storage.write("object", OLD)
    with pytest.raises(StorageError):
        storage.upload("object", tmp_path / "missing")
    assert [file.name for file in Path(storage.path()).iterdir()] == ["object"]
    assert storage.read("object") == OLD


def test_a_range_is_exactly_its_bytes(storage: Storage) -> None:
    storage.write("object", bytes(range(256)))
    assert storage.read_range("object", 250, 6) == bytes(range(250, 256))
    assert storage.read_range("object", 3, 2, hashlib.sha256(b"\3\4").hexdigest()) == b"\3\4"
    assert storage.read_range("object", 3, 2, crc32=zlib.crc32(b"\3\4")) == b"\3\4"
    assert storage.read_range("object", 3, 2, "of which the CRC-32 is the faster", zlib.crc32(b"\3\4")) == b"\3\4"


@pytest.mark.parametrize(
    ("offset", "length", "known", "says"),
    [
        (250, 7, (), "6 of 7 bytes at 250"),
        (300, 7, (), "0 of 7 bytes at 300"),
        (3, 2, ("ab" * 32,), "the 2 bytes at 3 differ from their digest abababababab"),
        (3, 2, (None, 0xAB), "the 2 bytes at 3 differ from their CRC-32 000000ab"),
        (3, 2, (hashlib.sha256(b"\3\4").hexdigest(), 0), "the 2 bytes at 3 differ from their CRC-32 00000000"),
    ],
)
def test_short_or_wrong_bytes_are_an_error_never_data(
    storage: Storage, no_waiting: None, offset: int, length: int, known: tuple[Any, ...], says: str
) -> None:
    storage.write("object", bytes(range(256)))
    with pytest.raises(ShardCorrupt) as caught:
        storage.read_range("object", offset, length, *known)
    assert caught.value.message == f"cannot read {storage.url}/object: {says}"
    assert "mapo data verify" in str(caught.value.hint)


def below_a_file(folder: Path) -> Storage:
    (folder / "file").write_bytes(b"")
    return Storage(str(folder / "file" / "storage"))


@pytest.mark.parametrize("place", [below_a_file, lambda _: Storage("/proc/mapo")])
def test_a_place_that_cannot_be_written_is_named_with_a_way_out(
    tmp_path: Path, place: Callable[[Path], Storage]
) -> None:
    storage = place(tmp_path)
    with pytest.raises(StorageError) as caught:
        storage.check_writable()
    assert caught.value.message.startswith(f"cannot write {storage.url}/.write-probe-")
    assert "check that the path exists" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("what", "action"),
    [
        ("read", lambda storage: storage.read("no/object")),
        ("read", lambda storage: storage.read_range("no/object", 0, 1)),
        ("look up", lambda storage: storage.size("no/object")),
    ],
)
def test_a_missing_object_is_named(storage: Storage, what: str, action: Callable[[Storage], object]) -> None:
    with pytest.raises(StorageError) as caught:
        action(storage)
    assert caught.value.message.startswith(f"cannot {what} {storage.url}/no/object: ")
    assert not isinstance(caught.value, ShardCorrupt)
    assert caught.value.hint


def test_a_missing_object_may_be_asked_for_in_one_read(storage: Storage) -> None:
    assert storage.read_if_there("folder/none") is None
    storage.write("folder/one", b"one")
    assert storage.read_if_there("folder/one") == b"one"


def test_an_unknown_kind_of_url_is_an_error_with_a_way_out() -> None:
    with pytest.raises(StorageError, match=r"no file system for carrier-pigeon://x") as caught:
        Storage("carrier-pigeon://x").read("y")
    assert "s3://" in str(caught.value.hint)


def test_probing_leaves_nothing(storage: Storage) -> None:
    storage.check_writable()
    assert list(Path(storage.path()).iterdir()) == []


@pytest.mark.parametrize("operation", ["read", "short", "write", "list"])
def test_transient_faults_are_retried_and_not_seen(faulty: type[FaultyFileSystem], operation: str) -> None:
    storage = Storage("faulty://bucket/folder")
    faulty.faults[operation] = MAX_ATTEMPTS - 1
    storage.write("a", b"12345")
    assert storage.read_range("a", 1, 3) == b"234"
    assert storage.names() == ["a"]
    assert faulty.faults[operation] == 0, "the faults have happened"


@pytest.mark.parametrize(
    ("operation", "action"),
    [
        ("read", lambda storage: storage.read("a")),
        ("read", lambda storage: storage.read_range("a", 1, 3)),
        ("write", lambda storage: storage.write("a", b"")),
        ("list", lambda storage: storage.names()),
    ],
)
def test_a_fault_that_stays_is_a_storage_error_after_the_last_attempt(
    faulty: type[FaultyFileSystem], operation: str, action: Callable[[Storage], object]
) -> None:
    storage = Storage("faulty://bucket/folder")
    storage.write("a", b"12345")
    faulty.calls.clear()
    faulty.faults[operation] = 1000
    with pytest.raises(StorageError, match=r"faulty://bucket/folder.*connection reset by peer"):
        action(storage)
    assert faulty.calls[operation] == MAX_ATTEMPTS


def refused(code: str, status: int) -> OSError:
    """An answer of S3 as s3fs raises it."""
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(answer, "GetObject"))


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        refused("SlowDown", 503),
        refused("InternalError", 500),
        refused("RequestTimeout", 400),
        refused("BadDigest", 400),
        ReadTimeoutError(endpoint_url="s3"),
        EndpointConnectionError(endpoint_url="s3", error="refused"),
        ClientPayloadError("not enough data"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_moment_mends_is_retried_whoever_raises_it(faulty: type[FaultyFileSystem], error: Exception) -> None:
    storage = Storage("faulty://bucket/folder")
    storage.write("a", b"12345")
    faulty.error, faulty.faults["read"] = error, MAX_ATTEMPTS - 1
    assert storage.read("a") == b"12345"
    assert faulty.faults["read"] == 0


def test_a_storage_that_is_slow_to_fail_is_given_up_after_two_minutes(
    faulty: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(storage_module.time, "monotonic", lambda: next(clock))
    storage = Storage("faulty://bucket/folder")
    storage.write("a", b"12345")
    faulty.calls.clear()
    faulty.faults["read"] = 1000
    with pytest.raises(StorageError):
        storage.read("a")
    assert faulty.calls["read"] == 3


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("no"),
        FileNotFoundError("gone"),
        OSError(errno.ENOSPC, "no space left on device"),
        refused("InvalidRange", 416),
        refused("InvalidRequest", 400),
        RuntimeError("of a back end"),
    ],
    ids=str,
)
def test_what_waiting_does_not_mend_is_not_retried(faulty: type[FaultyFileSystem], error: Exception) -> None:
    storage = Storage("faulty://bucket/folder")
    storage.write("a", b"12345")
    faulty.error, faulty.faults["read"] = error, 1000
    faulty.calls.clear()
    with pytest.raises(MapoError) as caught:
        storage.read_range("a", 0, 5)
    assert type(caught.value) is StorageError
    assert faulty.calls["read"] == 1
