"""WebDataset shards: tars written and read with the offset and digest of every member.

The bytes of a shard are a pure function of its members and their order: fixed time stamp, owner and mode, USTAR
headers. Readers use the offsets in the table and never rely on the tar's end, because every tar iterator silently
accepts a tar that is truncated between two members.
"""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

BLOCK_BYTES = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member:
    """The place of one member's payload in its shard."""

    name: str
    offset: int
    length: int
    sha256: str
    crc32: int


class ShardWriter:
    """Write members to a binary stream as one tar; the caller names and publishes the result.

    `num_bytes` grows with every `add`; `close` writes the tar's end and returns the digest of the whole.
    """

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)

    def add(self, name: str, data: bytes, sha256: str | None = None) -> Member:
        """Append one member.

        Args:
            name: `<key>.<part>`, ASCII, at most 100 characters; the parts of a key follow each other.
            data: The payload.
            sha256: The payload's digest (hex), if the caller has it already.
        """
        self._write(_header(name, len(data)))
        offset = self.num_bytes
        self._write(data)
        self._write(b"\0" * (-len(data) % BLOCK_BYTES))
        return Member(name, offset, len(data), sha256 or hashlib.sha256(data).hexdigest(), zlib.crc32(data))

    def close(self) -> str:
        """Write the end of the tar; return the sha256 (hex) of the whole shard."""
        self._write(b"\0" * (2 * BLOCK_BYTES))
        self._write(b"\0" * (-self.num_bytes % tarfile.RECORDSIZE))
        self._out.flush()
        return self._digest.hexdigest()


def _header(name: str, size: int) -> bytes:
    """Return the header that `tarfile` would write, in a third of the time if only name and size differ."""
    encoded = name.encode()
    if len(encoded) >= 100 or size >= 8**11 or not name.isascii():
        return _tar_info(name, size).tobuf(tarfile.USTAR_FORMAT)
    header = bytearray(TEMPLATE)
    header[: len(encoded)] = encoded
    header[124:135] = b"%011o" % size
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _tar_info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    return info


def _template() -> bytes:
    header = bytearray(_tar_info("", 0).tobuf(tarfile.USTAR_FORMAT))
    header[148:156] = b" " * 8  # as what the checksum counts itself
    return bytes(header)


TEMPLATE = _template()


def write_shard(file: Path, members: list[tuple[str, bytes]]) -> tuple[list[Member], int, str]:
    """Write a whole shard to a local file; return its members, its number of bytes and its sha256."""
    with file.open("wb") as out:
        writer = ShardWriter(out)
        written = [writer.add(name, data) for name, data in members]
        sha256 = writer.close()
    return written, writer.num_bytes, sha256


def read_shard(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield every member of a shard in order: name and payload.

    Raises:
        tarfile.ReadError: The tar is damaged.
    """
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for info in tar:
            payload = tar.extractfile(info)
            assert payload is not None
            yield info.name, payload.read()
