"""Is this image whole? Format, size and the full entropy-coded stream, without keeping the pixels."""

import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from pipelines.dataset.pair import Reason

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more after it
STARTS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)  # of these kinds of file
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 64 * 1024 * 1024  # 8192 x 8192: more is a decompression bomb, not a preference


@dataclass(frozen=True)
class ImageInfo:
    """What ingest records of an image: its extension and its size in pixels, as stored (before EXIF)."""

    extension: str
    width: int
    height: int


def inspect_image(data: bytes | None) -> ImageInfo | Reason:
    """Look at one image; `Reason` says what is wrong with it.

    A JPEG is decoded at 1/8 scale: the whole entropy-coded stream is still read, so a cut is found.
    """
    if data is None:
        return Reason.MISSING_IMAGE
    if not data:
        return Reason.EMPTY_IMAGE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is not ours to judge
            with Image.open(io.BytesIO(data)) as image:
                if image.format not in EXTENSIONS:
                    return Reason.UNSUPPORTED_FORMAT
                info = ImageInfo(EXTENSIONS[image.format], image.width, image.height)
                if image.width * image.height > MAX_PIXELS:
                    return Reason.IMAGE_TOO_LARGE
                image.draft(None, (1, 1))
                image.load()
                if image.format == "PNG":
                    _check_png_chunks(data)
                return info
    except UnidentifiedImageError:
        return Reason.TRUNCATED_IMAGE if STARTS.match(data) else Reason.NOT_AN_IMAGE
    except Image.DecompressionBombError:
        return Reason.IMAGE_TOO_LARGE
    except MemoryError:
        raise
    except Exception:  # OSError, SyntaxError, ValueError, EOFError, struct.error, ...: one image must not end the job
        return Reason.TRUNCATED_IMAGE


def _check_png_chunks(data: bytes) -> None:
    """Every chunk is there to IEND, with its checksum: Pillow is content once it has the last pixel.

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
