"""Object stores: timeouts, retryable errors, and checked uploads.

Three layers retry: botocore a request, s3fs a part of a transfer, and `Storage` the whole transfer, because only it
knows the expected result. The lower two get few attempts, so that all layers together come to an end.
"""

import errno
import hashlib
import math
import mimetypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 15  # between two pieces of an answer, not for the whole of it
REQUEST_ATTEMPTS = 3  # of botocore, which AWS_MAX_ATTEMPTS overrides
TRANSFER_ATTEMPTS = 2  # of s3fs
PART_BYTES = 50 << 20  # uploads of twice as much and more go in parts of this size
MAX_PARTS = 10_000  # S3's limit
BLOCK_BYTES = 4 << 20

# Waiting does not mend these.
FINAL_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
FINAL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG})
# Back ends are optional, so their classes are known by name; none of these is an OSError.
TRANSIENT_CLASSES = frozenset(
    {
        "botocore.exceptions.HTTPClientError",  # resets, timeouts
        "botocore.exceptions.ConnectionError",
        "botocore.exceptions.IncompleteReadError",
        "botocore.exceptions.ChecksumError",  # a body that differs from the checksum it came with
        "botocore.parsers.ResponseParserError",  # half an answer
        "aiohttp.client_exceptions.ClientError",  # in the middle of a body
        "gcsfs.retry.HttpError",
    }
)
PRECONDITION_FAILED = 412  # there is an object already
# Client errors by number that are the network's or the moment's fault.
TRANSIENT_STATUS = frozenset({408, 409, 425, 429})
TRANSIENT_CODES = frozenset(
    {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
)


class WrongBytes(OSError):
    """The wrong bytes arrived, or were stored."""


class ShortBytes(WrongBytes):
    """Fewer bytes arrived than requested; the object's size tells whether it is truncated."""


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed a moment later."""
    if isinstance(error, FINAL_ERRORS):
        return False
    if isinstance(error, OSError):  # s3fs translates answers into them, with the answer as their cause
        return error.errno not in FINAL_ERRNOS and not _is_refusal(error.__cause__)
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return bool(names & TRANSIENT_CLASSES)


def _is_refusal(answer: BaseException | None) -> bool:
    """Return whether S3 understood a request and would refuse it again."""
    response = getattr(answer, "response", None)
    if not isinstance(response, dict):
        return False
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = response.get("Error", {}).get("Code")
    return 400 <= status < 500 and status not in TRANSIENT_STATUS and code not in TRANSIENT_CODES


def is_taken(error: BaseException | None) -> bool:
    """Return whether an object could not be created because its name is taken."""
    if isinstance(error, FileExistsError):
        return True
    for each in (error, error.__cause__ if error else None):
        code = getattr(each, "code", None)  # gcsfs
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code == PRECONDITION_FAILED:
            return True
    return False


def open_file_system(url: str) -> tuple[Any, str]:
    """Open the file system of a URL, with timeouts and few attempts; return it and the path on it.

    fsspec's own configuration (`FSSPEC_S3` in the environment, as JSON) takes precedence over mapo's.
    """
    options: dict[str, Any] = {"use_listings_cache": False}  # it would hide what other processes wrote since
    if is_s3(url):
        config: dict[str, Any] = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
        if "AWS_MAX_ATTEMPTS" not in os.environ:
            config["retries"] = {"mode": "standard", "total_max_attempts": REQUEST_ATTEMPTS}
        options["config_kwargs"] = config | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    fs, path = fsspec.core.url_to_fs(url, **options)
    if is_s3(url):
        fs.retries = TRANSFER_ATTEMPTS
    return fs, path


def is_s3(url: str) -> bool:
    """Return whether the URL is of a store that speaks S3."""
    return url.startswith(("s3://", "s3a://"))


@dataclass(frozen=True)
class Upload:
    """The content of an upload: bytes, or a local file."""

    content: bytes | Path

    @property
    def num_bytes(self) -> int:
        """The content's length."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def put(self, fs: Any, path: str) -> None:
        """Upload the content and check what is stored.

        Raises:
            WrongBytes: The store contains something else now.
        """
        options: dict[str, Any] = {"chunksize": self._part_bytes} if _speaks_s3(fs) else {}
        try:
            if isinstance(self.content, bytes):
                kind, _ = mimetypes.guess_type(path)  # so that a browser shows a page; of files s3fs knows it itself
                fs.pipe_file(path, self.content, **options, **({"ContentType": kind} if options and kind else {}))
            else:
                fs.put_file(str(self.content), path, **options)
        except FileNotFoundError:
            # An upload in parts that is not known any more may be one that was finished while its answer was lost.
            if isinstance(self.content, Path) and not self.content.exists():
                raise
            if self.num_bytes < 2 * self._part_bytes or not fs.exists(path):
                raise
        self.check(fs, path)

    def check(self, fs: Any, path: str) -> None:
        """Raise WrongBytes if the stored object differs: by size, and on S3 by digest."""
        info = fs.info(path)
        if (found := int(info["size"])) != self.num_bytes:
            raise WrongBytes(f"{found} bytes are stored instead of {self.num_bytes}")
        if not _speaks_s3(fs) or info.get("ETag", "").strip('"') == self._etag():
            return
        if not _etag_is_a_key(fs, path) and not self._is_stored(fs, path):
            raise WrongBytes(f"the {found} stored bytes differ from those sent")

    @property
    def _part_bytes(self) -> int:
        return max(PART_BYTES, math.ceil(self.num_bytes / MAX_PARTS))

    def _blocks(self, num_bytes: int) -> Any:
        """Yield the content in blocks of `num_bytes`."""
        if isinstance(self.content, bytes):
            for start in range(0, len(self.content), num_bytes):
                yield self.content[start : start + num_bytes]
            return
        with self.content.open("rb") as opened:
            while block := opened.read(num_bytes):
                yield block

    def _etag(self) -> str:
        """Return the ETag that S3 computes: MD5, or for parts the MD5 of their MD5s and their number."""
        if self.num_bytes < 2 * self._part_bytes:
            whole = _md5()
            for block in self._blocks(BLOCK_BYTES):
                whole.update(block)
            return str(whole.hexdigest())
        digests = [_md5(part).digest() for part in self._blocks(self._part_bytes)]
        return f"{_md5(b''.join(digests)).hexdigest()}-{len(digests)}"

    def _is_stored(self, fs: Any, path: str) -> bool:
        """Read the object back and compare."""
        start = 0
        for block in self._blocks(BLOCK_BYTES):
            if bytes(fs.cat_file(path, start=start, end=start + len(block))) != block:
                return False
            start += len(block)
        return True


def _md5(data: bytes = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)


def _speaks_s3(fs: Any) -> bool:
    return hasattr(fs, "call_s3")


def _etag_is_a_key(fs: Any, path: str) -> bool:
    """Return whether S3 encrypts the object with a key; then, by S3's documentation, its ETag is not a digest."""
    bucket, key, _ = fs.split_path(path)
    head = fs.call_s3("head_object", Bucket=bucket, Key=key)
    return str(head.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in head
