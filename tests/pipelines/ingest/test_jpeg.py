"""The check without decoding says of a damaged JPEG what a decoder says of it."""

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
from factories import encoded, picture
from PIL import Image

from pipelines.dataset.pair import Reason
from pipelines.ingest.image_check import ImageInfo, inspect_image
from pipelines.ingest.jpeg import jpeg_skeleton

PHOTO = picture(np.random.default_rng(0), 160, 224)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 224, 3), dtype=np.uint8))
FILES = {
    "baseline": encoded(PHOTO, quality=90),
    "noise": encoded(NOISE, quality=95),
    "progressive": encoded(PHOTO, quality=90, progressive=True),
    "restarts": encoded(NOISE, quality=80, restart_marker_rows=1),
    "grey": encoded(PHOTO.convert("L")),
    "CMYK": encoded(PHOTO.convert("CMYK"), quality=90, subsampling=0),
}
NUM_DAMAGED = 150


def flip(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def without(data: bytes, at: int, count: int) -> bytes:
    return data[:at] + data[at + count :]


def damages(data: bytes) -> dict[str, Callable[[random.Random], bytes]]:
    scan, size = data.index(b"\xff\xda"), len(data)
    return {
        "cut": lambda chance: data[: chance.randrange(2, size - 1)],
        "last bytes missing": lambda chance: data[: -chance.randrange(1, 40)],
        "cut and ended": lambda chance: data[: chance.randrange(scan + 20, size)] + b"\xff\xd9",
        "zeros to the end": lambda chance: data[: chance.randrange(scan, size)].ljust(size, b"\0"),
        "bit in the head": lambda chance: flip(data, chance.randrange(2, scan + 14), chance.randrange(8)),
        "bit in the data": lambda chance: flip(data, chance.randrange(scan + 14, size - 2), chance.randrange(8)),
        "bytes missing": lambda chance: without(data, chance.randrange(2, size - 700), 500),
        "tail of another": lambda chance: data[: chance.randrange(scan, size - 700)] + FILES["restarts"][3000:],
    }


def decodes(data: bytes) -> bool:
    """Whether Pillow decodes it, all pixels of it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception:
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_the_verdict_is_that_of_a_decoder(name: str) -> None:
    told_apart = set()
    for kind, damage in damages(FILES[name]).items():
        chance = random.Random(f"{name} {kind}")
        for damaged in (damage(chance) for _ in range(NUM_DAMAGED)):
            is_whole = isinstance(inspect_image(damaged), ImageInfo)
            can_be_opened = isinstance(inspect_image(damaged, "header"), ImageInfo)
            assert is_whole == (decodes(damaged) and can_be_opened), f"{kind}: {is_whole}, {can_be_opened}"
            told_apart.add((kind, is_whole))
    assert {("cut", False), ("last bytes missing", False), ("bit in the head", False)} <= told_apart
    assert {("bit in the head", True), ("bit in the data", True)} <= told_apart


@pytest.mark.parametrize("name", FILES)
def test_a_skeleton_is_small_and_has_every_table(name: str) -> None:
    skeleton = jpeg_skeleton(FILES[name])
    assert skeleton
    assert len(skeleton) < min(2000, len(FILES[name]))
    for table in (b"\xff\xdb", b"\xff\xc4", b"\xff\xda"):
        assert skeleton.count(table) >= FILES[name].count(table) > 0
    with Image.open(io.BytesIO(skeleton)) as image:
        assert image.size == PHOTO.size
        image.load()


def test_bytes_that_libjpeg_forgives_are_forgiven() -> None:
    whole = FILES["baseline"]
    scan = whole.index(b"\xff\xda")
    for forgiven in (
        whole + b"more after the end",
        whole + whole,
        whole[:-2] + b"\xff\xff\xff\xd9",  # fill bytes before a marker
        whole[:scan] + b"\xff\xff" + whole[scan:],
        whole[:scan] + b"stray" + whole[scan:],
        whole[:2] + b"\xff\xfe\x00\x06\xff\xd9\xff\xda" + whole[2:],  # markers inside a comment
    ):
        assert decodes(forgiven)
        assert isinstance(inspect_image(forgiven), ImageInfo)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", *(b"\xff\xd8" + rest for rest in (b"", b"\xff", b"\xff\xda", b"\xff\xfe\0\1"))]
)
def test_a_stump_has_no_skeleton(data: bytes) -> None:
    assert jpeg_skeleton(data) is None
    assert isinstance(inspect_image(data), Reason)
