"""Checks an image: format, size and the complete stream, without keeping the pixels."""

import contextlib
import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from typing import Literal

from PIL import ExifTags, Image, UnidentifiedImageError

from pipelines.dataset.pair import Reason
from pipelines.ingest.jpeg import jpeg_skeleton

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more after it
STARTS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)  # of these kinds of file
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ANIMATED = ("PNG", "WEBP")  # which frame was preferred nobody knows; an MPO's first one is the photo
MIN_SIDE = 16  # pixels: less is a tracking pixel or a placeholder
MAX_PIXELS = 64 * 1024 * 1024  # 8192 x 8192: more is a decompression bomb, not a preference
MAX_WEBP_PIXELS = 16 * 1024 * 1024  # 4096 x 4096: its decoder takes 16 bytes a pixel, the others at most 4


@dataclass(frozen=True)
class ImageInfo:
    """The facts about an image that ingest records: its extension, and its size in pixels as stored (before EXIF)."""

    extension: str
    width: int
    height: int
    orientation: int = 1
    """EXIF orientation, 1..8; 1 is upright."""
    mode: str = field(default="RGB", compare=False)
    """Pillow's name for the mode of the stored pixels: RGB, L, CMYK, P, RGBA, I;16, ..."""


def inspect_image(data: bytes | None, check: Literal["full", "header"] = "full") -> ImageInfo | Reason:
    """Check one image; return its facts, or the `Reason` why it cannot be used.

    The whole file is read, so that truncation is found: a JPEG with `_check_jpeg`, other formats by decoding them.

    Args:
        data: The file.
        check: `header` reads only size and format.
    """
    if data is None:
        return Reason.MISSING_IMAGE
    if not data:
        return Reason.EMPTY_IMAGE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is not ours to judge
            with Image.open(io.BytesIO(data)) as image:
                found = _look_at_header(image)
                if isinstance(found, Reason) or check == "header":
                    return found
                if found.extension == "jpg":
                    _check_jpeg(data)
                else:
                    image.load()
                if image.format == "PNG":
                    _check_png_chunks(data)
                return found
    except UnidentifiedImageError:
        return Reason.TRUNCATED_IMAGE if STARTS.match(data) else Reason.NOT_AN_IMAGE
    except Image.DecompressionBombError:
        return Reason.IMAGE_TOO_LARGE
    except MemoryError:
        raise
    except Exception:  # OSError, SyntaxError, ValueError, EOFError, struct.error, ...: one image must not end the job
        return Reason.TRUNCATED_IMAGE


def _look_at_header(image: Image.Image) -> ImageInfo | Reason:
    """Return the facts in an opened image's header before a pixel is decoded, or why it cannot be used."""
    if image.format not in EXTENSIONS:
        return Reason.UNSUPPORTED_FORMAT
    if image.width * image.height > (MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS):
        return Reason.IMAGE_TOO_LARGE
    if min(image.width, image.height) < MIN_SIDE:
        return Reason.IMAGE_TOO_SMALL
    if image.format in ANIMATED and getattr(image, "is_animated", False):
        return Reason.ANIMATED_IMAGE
    return ImageInfo(EXTENSIONS[image.format], image.width, image.height, _orientation(image), image.mode)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 for a broken EXIF block, on which Pillow's parser fails in many ways."""
    if "exif" not in image.info:
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _check_jpeg(data: bytes) -> None:
    """Check a JPEG as strictly as a decoder, eight times as fast: in the entropy-coded data only markers are read.

    Raises:
        OSError: The error that Pillow raises when it decodes the file.
    """
    if (skeleton := jpeg_skeleton(data)) is not None:
        with contextlib.suppress(Exception):  # the file itself has the last word
            return _load_small(skeleton)
    return _load_small(data)


def _load_small(jpeg: bytes) -> None:
    with Image.open(io.BytesIO(jpeg)) as image:
        image.draft("L", (1, 1))  # an eighth of the size, without colours
        image.load()


def _check_png_chunks(data: bytes) -> None:
    """Check every chunk and its checksum up to IEND: Pillow stops once it has the last pixel.

    Raises:
        EOFError: The file ends before IEND.
        ValueError: A checksum differs.
    """
    view, start, kind = memoryview(data), len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        if start + 12 > len(data):
            raise EOFError(f"cut after chunk {kind!r} at {start}")
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 8 + length
        if end + 4 > len(data):
            raise EOFError(f"cut in chunk {kind!r} at {start}")
        if zlib.crc32(view[start + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ValueError(f"wrong checksum of chunk {kind!r} at {start}")
        start = end + 4
