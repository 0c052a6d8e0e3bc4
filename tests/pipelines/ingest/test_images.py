"""Images: whole ones pass as they are, and each kind of damage has its own reason."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from factories import encoded, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.dataset.pair import Reason
from pipelines.ingest.image_check import ImageInfo, inspect_image

HEIGHT, WIDTH = 90, 120
PHOTO = picture(np.random.default_rng(0), HEIGHT, WIDTH)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
DEEP = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16))

FILES = {
    "jpeg": encoded(PHOTO, quality=90),
    "jpeg of noise": encoded(NOISE, quality=100),
    "progressive jpeg": encoded(PHOTO, quality=90, progressive=True),
    "png": encoded(PHOTO, "PNG"),
    "webp": encoded(PHOTO, "WEBP"),
    "lossless webp": encoded(NOISE, "WEBP", lossless=True),
}


PEAK = """
import resource
from pipelines.ingest.image_check import inspect_image

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
print(inspect_image({data!r}))
print(peak() - before)
"""


def header_only_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("image", "image_format", "options", "extension"),
    [
        (PHOTO, "JPEG", {}, "jpg"),
        (PHOTO, "JPEG", {"progressive": True}, "jpg"),
        (PHOTO.convert("CMYK"), "JPEG", {}, "jpg"),
        (PHOTO.convert("L"), "JPEG", {}, "jpg"),
        (PHOTO, "MPO", {"save_all": True, "append_images": [NOISE]}, "jpg"),
        (PHOTO, "PNG", {}, "png"),
        (DEEP, "PNG", {}, "png"),
        (PHOTO.convert("P"), "PNG", {}, "png"),
        (PHOTO.convert("1"), "PNG", {}, "png"),
        (PHOTO.convert("RGBA"), "PNG", {}, "png"),
        (PHOTO.convert("LA"), "PNG", {}, "png"),
        (PHOTO, "WEBP", {}, "webp"),
        (NOISE.convert("RGBA"), "WEBP", {"lossless": True}, "webp"),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_a_whole_image_is_known_by_kind_and_size(
    image: Image.Image, image_format: str, options: dict[str, Any], extension: str
) -> None:
    assert inspect_image(encoded(image, image_format, **options)) == ImageInfo(extension, WIDTH, HEIGHT)


def test_the_size_is_as_stored_before_any_turn_by_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    assert inspect_image(encoded(PHOTO, exif=exif)) == ImageInfo("jpg", WIDTH, HEIGHT, orientation=6)


def test_what_follows_the_image_does_no_harm() -> None:
    assert inspect_image(FILES["jpeg"] + b"junk" * 100) == ImageInfo("jpg", WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, Reason.MISSING_IMAGE),
        (b"", Reason.EMPTY_IMAGE),
        (b"<html>404 Not Found</html>", Reason.NOT_AN_IMAGE),
        (b"\0" * 5000, Reason.NOT_AN_IMAGE),
        (encoded(PHOTO.convert("P"), "GIF"), Reason.UNSUPPORTED_FORMAT),
        (encoded(PHOTO, "BMP"), Reason.UNSUPPORTED_FORMAT),
        (encoded(PHOTO, "TIFF"), Reason.UNSUPPORTED_FORMAT),
        (header_only_png(8193, 8192), Reason.IMAGE_TOO_LARGE),
        (header_only_png(20_000, 20_000), Reason.IMAGE_TOO_LARGE),  # where Pillow itself refuses
        (header_only_png(64, 64), Reason.TRUNCATED_IMAGE),
    ],
    ids=str,
)
def test_what_cannot_be_used_has_its_own_reason(data: bytes | None, reason: Reason) -> None:
    assert inspect_image(data) is reason


@pytest.mark.parametrize(("side", "wanted"), [(4096, ImageInfo("webp", 4096, 4096)), (4104, Reason.IMAGE_TOO_LARGE)])
def test_a_webp_of_a_few_bytes_takes_no_more_memory_than_the_limit(
    run_python: Callable[[str], str], side: int, wanted: object
) -> None:
    data = encoded(Image.new("RGB", (side, side)), "WEBP", lossless=True, method=0)
    assert len(data) < 100
    found, grown_kib = run_python(PEAK.format(data=data)).splitlines()
    assert found == str(wanted)
    assert int(grown_kib) < 300 * 1024


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_image_is_never_taken_for_whole(kind: str, share: float) -> None:
    data = FILES[kind]
    cut = data[: max(1, int(share * len(data)))]
    assert inspect_image(cut) in (Reason.TRUNCATED_IMAGE, Reason.NOT_AN_IMAGE)
    assert len(cut) < 12 or inspect_image(cut) is Reason.TRUNCATED_IMAGE, "enough is left to see what it was"


@pytest.mark.parametrize("kind", FILES)
def test_an_image_that_lacks_its_last_bytes_is_cut(kind: str) -> None:
    for missing in (1, 2, 10):
        assert inspect_image(FILES[kind][:-missing]) is Reason.TRUNCATED_IMAGE


@pytest.mark.parametrize("chunk", [b"IHDR", b"IDAT", b"IEND"])
def test_a_flipped_bit_in_a_png_is_found_by_its_checksum(chunk: bytes) -> None:
    data = bytearray(FILES["png"])
    data[data.index(chunk) + 4 + (1 if chunk == b"IEND" else 9)] ^= 1
    assert inspect_image(bytes(data)) is Reason.TRUNCATED_IMAGE


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_no_damage_ends_the_job(kind: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(FILES[kind])
    for place, value in changes:
        data[int(place * place * len(data))] = value  # the headers more often
    found = inspect_image(bytes(data))
    assert isinstance(found, ImageInfo | Reason)
    if isinstance(found, ImageInfo):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            with Image.open(io.BytesIO(data)) as image:
                assert image.size == (found.width, found.height)
