"""Resolves image cells to bytes: bytes, an HF struct, a data URI, a path, a member of a tar, or a URL."""

import base64
import binascii
import posixpath
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import unquote

from pipelines.dataset.errors import SourceError, StorageError
from pipelines.dataset.pair import Reason
from pipelines.dataset.storage import Storage
from pipelines.sources.config import SourceConfig
from pipelines.sources.files import list_files, open_file
from pipelines.sources.records import whole_tar
from pipelines.sources.unit import SourceFile
from pipelines.sources.urls import UrlLimits, fetch_url

REMOTE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "oss", "memory")
"""File systems that a URL in a cell may use; none of them reads this machine's own files."""
SIGNATURES = ("/9j/", "iVBORw0KGgo", "UklGR")
"""The first characters of a JPEG, a PNG and a WebP in base64."""
MAX_NAME_BYTES = 255  # of one part of a path, on every common file system
MAX_PATH_BYTES = 1024  # of an object's key on S3 and GCS

Place = tuple[SourceFile, int, int]
"""A tar, and offset and length of a member's bytes in it."""


class Cells:
    """Resolves the image cells of one file.

    Args:
        config: The source's configuration: the base of paths, and whether URLs are followed.
        file: The file of the cells.
    """

    def __init__(self, config: SourceConfig, file: SourceFile) -> None:
        self._config = config
        self._limits = UrlLimits(config.url_timeout_s, config.max_image_bytes, config.allow_private_urls)
        self._folder = Storage(config.images or file.uri.rpartition("/")[0])
        self._tars = config.images is not None and config.images.endswith(".tar")

    def read(self, cell: object) -> bytes | Reason | None:
        """Read the bytes of a cell; return a reason if there are none, None for an empty cell.

        Raises:
            SourceError: The base folder of image paths cannot be read at all.
        """
        if isinstance(cell, Mapping):
            inner = cell.get("bytes")
            if isinstance(inner, str):
                return self._sized(_base64(inner))
            return self.read(_text(cell.get("path")) if inner is None else inner)
        if isinstance(cell, bytes):
            return self._sized(cell)
        if cell is None:
            return None
        if not isinstance(cell, str):
            return Reason.NOT_AN_IMAGE
        if cell.startswith("data:"):
            return self._sized(_base64(cell.partition(",")[2]))
        if cell.startswith(SIGNATURES) and isinstance(found := _base64(cell), bytes):
            return self._sized(found)
        if "://" in cell:
            return self._from_url(cell)
        return self._from_path(cell)

    def _sized(self, found: bytes | Reason) -> bytes | Reason:
        too_large = isinstance(found, bytes) and len(found) > self._config.max_image_bytes
        return Reason.IMAGE_TOO_LARGE if too_large else found

    def _from_url(self, url: str) -> bytes | Reason:
        if not self._config.allow_urls:
            return Reason.URL_NOT_ALLOWED
        scheme = url.partition("://")[0].lower()
        if scheme in ("http", "https"):
            return fetch_url(url, self._limits)
        if scheme not in REMOTE or "::" in url:  # fsspec would chain file systems
            return Reason.URL_NOT_ALLOWED
        folder, _, name = url.rpartition("/")
        return self._from_storage(Storage(folder), name)

    def _from_path(self, path: str) -> bytes | Reason:
        name = posixpath.normpath(path)
        root = self._folder.path().rstrip("/") + "/"
        if self._folder.is_local and name.startswith(root):
            name = name.removeprefix(root)
        if name.startswith(("/", "../")) or name in ("..", ".") or "\0" in name:
            return Reason.IMAGE_OUTSIDE
        if not _can_be_a_path(name):
            return Reason.MISSING_IMAGE
        if self._tars:
            assert self._config.images is not None
            places = _members(self._config.images).get(name, [])
            if len(places) > 1:
                raise SourceError(
                    f"{name} is in both {places[0][0].uri} and {places[1][0].uri}", "give only one of them as `images:`"
                )
            return self._from_tar(places[0]) if places else Reason.MISSING_IMAGE
        return self._from_storage(self._folder, name)

    def _from_tar(self, place: Place) -> bytes | Reason:
        tar, offset, length = place
        if length > self._config.max_image_bytes:
            return Reason.IMAGE_TOO_LARGE
        folder, _, name = tar.uri.rpartition("/")
        try:
            return Storage(folder).read_range(name, offset, length) if length else b""
        except StorageError as error:
            raise SourceError(error.message, "is the tar still there and complete?") from error

    def _from_storage(self, folder: Storage, name: str) -> bytes | Reason:
        try:
            if folder.size(name) > self._config.max_image_bytes:
                return Reason.IMAGE_TOO_LARGE
            return folder.read(name)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError | IsADirectoryError | NotADirectoryError):
                return Reason.MISSING_IMAGE
            raise SourceError(error.message, "check the path of the images (`images:`) and the credentials") from error


@lru_cache(4)
def _members(pattern: str) -> dict[str, list[Place]]:
    """Return every file in the tars of a glob by name; the headers are read once per process."""
    found: dict[str, list[Place]] = {}
    for file in list_files(pattern, (".tar",)):
        with open_file(file, read_ahead=True) as opened, whole_tar(opened) as tar:
            for member in tar:
                if member.isfile():
                    place = (file, member.offset_data, member.size)
                    found.setdefault(posixpath.normpath(member.name), []).append(place)
    return found


def _can_be_a_path(name: str) -> bool:
    """Return whether a file could have this name: other text fails in the file system in various ways."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    return len(encoded) <= MAX_PATH_BYTES and all(len(part) <= MAX_NAME_BYTES for part in encoded.split(b"/"))


def _base64(text: str) -> bytes | Reason:
    try:
        return base64.b64decode(unquote(text), validate=True)
    except (binascii.Error, ValueError):
        return Reason.NOT_AN_IMAGE


def _text(value: object) -> object:
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
