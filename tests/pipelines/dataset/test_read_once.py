"""Small files are read once, and read again after they have changed."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.dataset.errors import ModelError, StorageError
from pipelines.dataset.read_once import SETTLED_S, read_once
from pipelines.dataset.storage import Storage

PLACE = "memory://read-once"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the objects whose content was read from a file system in memory."""
    found, cat_file = [], MemoryFileSystem.cat_file

    def counted(self: MemoryFileSystem, path: str, *args: object, **kwargs: object) -> object:
        found.append(path.rpartition("/")[2])
        return cat_file(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    yield found
    MemoryFileSystem.store.clear()


def test_a_file_is_read_again_only_after_it_was_written_again(reads: list[str]) -> None:
    storage = Storage(PLACE)
    storage.write("a.txt", b"one")
    reads.clear()  # a write reads it back
    found = [read_once(Storage(PLACE), "a.txt", bytes.upper, as_what="upper") for _ in range(3)]
    assert (found, reads) == ([b"ONE"] * 3, ["a.txt"])
    storage.write("a.txt", b"two")  # of the same size
    reads.clear()
    found = [read_once(storage, "a.txt", bytes.upper, as_what="upper") for _ in range(3)]
    assert (found, reads) == ([b"TWO"] * 3, ["a.txt"])
    assert read_once(storage, "a.txt", len, as_what="length") == 3, "another result of the same file"
    storage.delete("a.txt")
    assert read_once(storage, "a.txt", bytes.upper, as_what="upper") is None


def test_an_error_in_a_file_is_raised_each_time_until_it_is_corrected(reads: list[str]) -> None:
    def refuse(data: bytes) -> bytes:
        if data == b"bad":
            raise ModelError("damaged", "write it again")
        return data

    storage = Storage(PLACE)
    storage.write("a.txt", b"bad")
    for _ in range(2):
        with pytest.raises(ModelError, match="damaged"):
            read_once(storage, "a.txt", refuse, as_what="checked")
    storage.write("a.txt", b"fit")
    assert read_once(storage, "a.txt", refuse, as_what="checked") == b"fit"


def test_a_local_file_is_remembered_once_its_time_tells_of_a_change(tmp_path: Path) -> None:
    file, storage, parsed = tmp_path / "a.txt", Storage(str(tmp_path)), list[bytes]()

    def parse(data: bytes) -> bytes:
        parsed.append(data)
        return data

    for number in range(20):  # faster than the clock of many file systems
        file.write_text(f"{number:02}")
        assert read_once(storage, "a.txt", parse, as_what="text") == f"{number:02}".encode()
    before = time.time() - 2 * SETTLED_S
    os.utime(file, (before, before))
    parsed.clear()
    for _ in range(3):
        read_once(storage, "a.txt", parse, as_what="text")
    assert parsed == [b"19"]
    file.write_text("20")
    os.utime(file, (before, before))  # as `cp -p` leaves a file of the same size and time
    (tmp_path / "b.txt").write_text("21")
    assert read_once(storage, "a.txt", parse, as_what="text") == b"20"
    (tmp_path / "b.txt").replace(file)
    os.utime(file, (before, before))
    assert read_once(storage, "a.txt", parse, as_what="text") == b"21"


def test_what_cannot_be_looked_up_is_told_by_the_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="cannot read"):
        read_once(Storage(str(tmp_path)), "folder", bytes, as_what="text")
    assert read_once(Storage(str(tmp_path)), "folder/none.txt", bytes, as_what="text") is None
