"""moto's S3 server, with ranges as S3 has them: `python -m benchmarks.s3_server -H 127.0.0.1 -p PORT`.

moto reads a whole object to answer for a part of it: 34 ms of its time for 256 KiB of a shard of 64 MiB, 2 ms so. All
who ask for parts gain by that, boto3's and obstore's downloads of whole shards too.
"""

import sys
from typing import Any

from moto.s3.models import FakeKey
from moto.s3.responses import S3Response
from moto.server import main

get_object = S3Response.get_object


class LazyBytes:
    """An object's bytes, read where they are asked for."""

    def __init__(self, key: FakeKey) -> None:
        self._key = key

    def __len__(self) -> int:
        return int(self._key.contentsize)

    def __getitem__(self, part: slice) -> bytes:
        with self._key.lock:
            self._key._value_buffer.seek(part.start)
            return bytes(self._key._value_buffer.read(part.stop - part.start))


class LazyKey:
    """A key whose value is not read yet."""

    def __init__(self, key: FakeKey) -> None:
        self._key = key

    def __getattr__(self, name: str) -> Any:
        return LazyBytes(self._key) if name == "value" else getattr(self._key, name)


def get_part(self: S3Response) -> Any:
    """Answer a GET; its range is cut out by moto afterwards."""
    if self.headers.get("range"):
        key, not_modified = self._get_key()
        self._get_key = lambda *_, **__: (LazyKey(key), not_modified)
    return get_object(self)


S3Response.get_object = get_part

if __name__ == "__main__":
    main(sys.argv[1:])
