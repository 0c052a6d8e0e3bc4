"""A corpus of broken rows: each kind has one reason, none is lost, none ends the job."""

import io
import json
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import encoded, picture
from PIL import Image

from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset.pair import PAIRS_SCHEMA, Reason
from pipelines.dataset.storage import Storage
from pipelines.ingest.image_check import ImageInfo, inspect_image
from pipelines.ingest.pair_shards import MAX_PROMPT_CHARACTERS, judge, write_unit
from pipelines.sources.labels import from_labels, from_votes
from pipelines.sources.unit import SourceFile, SourceRow, SourceUnit, UnitSettings, make_unit

PHOTO = picture(np.random.default_rng(0), 48, 64)
NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8))
GOOD, OTHER = encoded(PHOTO, quality=90), encoded(NOISE, quality=90)
PNG, WEBP = encoded(PHOTO, "PNG"), encoded(PHOTO, "WEBP")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def animated(kind: str) -> bytes:
    return encoded(PHOTO, kind, save_all=True, append_images=[NOISE], duration=100)


def flipped(data: bytes, place: float) -> bytes:
    changed = bytearray(data)
    changed[int(len(data) * place)] ^= 0xFF
    return bytes(changed)


ROW: dict[str, Any] = {"row": 0, "prompt": "a cat", "image_0": GOOD, "image_1": OTHER, "label_0": 1.0}
BROKEN: dict[str, tuple[dict[str, Any], Reason]] = {
    # prompts
    "prompt null": ({"prompt": None}, Reason.MISSING_PROMPT),
    "prompt empty": ({"prompt": ""}, Reason.EMPTY_PROMPT),
    "prompt blank": ({"prompt": " \t\n\u3000"}, Reason.EMPTY_PROMPT),
    "prompt latin-1": ({"prompt": "caf\xe9".encode("latin-1")}, Reason.UNREADABLE_PROMPT),
    "prompt cut in a character": ({"prompt": "caf\xe9".encode()[:-1]}, Reason.UNREADABLE_PROMPT),
    "prompt utf-16": ({"prompt": "cat".encode("utf-16")}, Reason.UNREADABLE_PROMPT),
    "prompt with NUL": ({"prompt": "a\0cat"}, Reason.UNREADABLE_PROMPT),
    "prompt with a lone surrogate": ({"prompt": json.loads('"\\ud800"')}, Reason.UNREADABLE_PROMPT),
    "prompt over-long": ({"prompt": "a" * (MAX_PROMPT_CHARACTERS + 1)}, Reason.OVERLONG_PROMPT),
    "row unreadable": ({"prompt": Reason.UNREADABLE_ROW}, Reason.UNREADABLE_ROW),
    # labels
    "label null": ({"label_0": from_labels(None, 1)}, Reason.MISSING_LABEL),
    "label of the other image null": ({"label_0": from_labels(1, None)}, Reason.MISSING_LABEL),
    "label text": ({"label_0": from_labels("left", "right")}, Reason.UNREADABLE_LABEL),
    "label NaN": ({"label_0": from_labels(float("nan"), 0)}, Reason.UNREADABLE_LABEL),
    "label infinite": ({"label_0": from_labels(float("inf"), 0)}, Reason.UNREADABLE_LABEL),
    "label above 1": ({"label_0": from_labels(2, -1)}, Reason.UNREADABLE_LABEL),
    "label a list": ({"label_0": from_labels([1], [0])}, Reason.UNREADABLE_LABEL),
    "labels both 1": ({"label_0": from_labels(1, 1)}, Reason.INCONSISTENT_LABELS),
    "labels both 0": ({"label_0": from_labels(0, 0)}, Reason.INCONSISTENT_LABELS),
    "votes none": ({"label_0": from_votes(0, 0)}, Reason.MISSING_LABEL),
    "votes negative": ({"label_0": from_votes(-1, 2)}, Reason.UNREADABLE_LABEL),
    # images: nothing, or nothing of the kind
    "image null": ({"image_0": None}, Reason.MISSING_IMAGE),
    "image empty": ({"image_1": b""}, Reason.EMPTY_IMAGE),
    "image an error page": ({"image_0": b"<html><body>404 Not Found</body></html>"}, Reason.NOT_AN_IMAGE),
    "image JSON": ({"image_0": b'{"error": "expired"}'}, Reason.NOT_AN_IMAGE),
    "image zeros": ({"image_0": bytes(4096)}, Reason.NOT_AN_IMAGE),
    "image text as base64": ({"image_0": b"/9j/4AAQSkZJRgABAQAAAQABAAD"}, Reason.NOT_AN_IMAGE),
    "image GIF": ({"image_1": encoded(PHOTO.convert("P"), "GIF")}, Reason.UNSUPPORTED_FORMAT),
    "image BMP": ({"image_1": encoded(PHOTO, "BMP")}, Reason.UNSUPPORTED_FORMAT),
    "image TIFF": ({"image_1": encoded(PHOTO, "TIFF")}, Reason.UNSUPPORTED_FORMAT),
    "image JPEG 2000": ({"image_1": encoded(PHOTO, "JPEG2000")}, Reason.UNSUPPORTED_FORMAT),
    "image outside": ({"image_0": Reason.IMAGE_OUTSIDE}, Reason.IMAGE_OUTSIDE),
    "image behind a forbidden address": ({"image_0": Reason.URL_NOT_ALLOWED}, Reason.URL_NOT_ALLOWED),
    "image unreachable": ({"image_1": Reason.UNREACHABLE_IMAGE}, Reason.UNREACHABLE_IMAGE),
    # images: damaged
    "JPEG of two bytes": ({"image_0": GOOD[:3]}, Reason.TRUNCATED_IMAGE),
    "JPEG header alone": ({"image_0": GOOD[:200]}, Reason.TRUNCATED_IMAGE),
    "JPEG half": ({"image_0": GOOD[: len(GOOD) // 2]}, Reason.TRUNCATED_IMAGE),
    "JPEG without its end": ({"image_0": GOOD[:-2]}, Reason.TRUNCATED_IMAGE),
    "progressive JPEG cut": ({"image_0": encoded(PHOTO, progressive=True)[:-40]}, Reason.TRUNCATED_IMAGE),
    "PNG cut": ({"image_0": PNG[:-20]}, Reason.TRUNCATED_IMAGE),
    "PNG with a flipped byte": ({"image_0": flipped(PNG, 0.5)}, Reason.TRUNCATED_IMAGE),
    "WebP cut": ({"image_0": WEBP[:-10]}, Reason.TRUNCATED_IMAGE),
    # images: sizes and kinds
    "image too large": ({"image_1": bomb(8193, 8192)}, Reason.IMAGE_TOO_LARGE),
    "decompression bomb": ({"image_1": bomb(60_000, 60_000)}, Reason.IMAGE_TOO_LARGE),
    "tracking pixel": ({"image_0": encoded(PHOTO.resize((1, 1)), "PNG")}, Reason.IMAGE_TOO_SMALL),
    "strip of 8 pixels": ({"image_0": encoded(PHOTO.resize((640, 8)))}, Reason.IMAGE_TOO_SMALL),
    "animated WebP": ({"image_0": animated("WEBP")}, Reason.ANIMATED_IMAGE),
    "animated PNG": ({"image_0": animated("PNG")}, Reason.ANIMATED_IMAGE),
    "both images alike": ({"image_1": GOOD}, Reason.IDENTICAL_IMAGES),
}
SOUND: dict[str, bytes] = {
    "grey": encoded(PHOTO.convert("L")),
    "CMYK": encoded(PHOTO.convert("CMYK")),
    "palette": encoded(PHOTO.convert("P"), "PNG"),
    "alpha": encoded(PHOTO.convert("RGBA"), "PNG"),
    "palette with alpha": encoded(PHOTO.convert("RGBA").quantize(), "PNG"),
    "16 bits": encoded(Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)), "PNG"),
    "trailing junk": GOOD + b"<!-- served by -->",
    "lossless WebP": encoded(NOISE, "WEBP", lossless=True),
    "broken EXIF": encoded(PHOTO, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
}


@pytest.fixture
def unit() -> SourceUnit:
    config = IngestConfig(sources=(SourceConfig(format="jsonl", path="x"),))
    file = SourceFile("file:///x.jsonl", 1, "1")
    return make_unit(
        config.sources[0],
        file,
        UnitSettings(config.max_shard_bytes, config.image_check),
        part=(0, 1),
        first_row=0,
        num_rows=1,
    )


def test_there_are_at_least_forty_kinds() -> None:
    assert len(BROKEN) >= 40


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_has_its_one_reason(unit: SourceUnit, kind: str) -> None:
    change, reason = BROKEN[kind]
    row, images = judge(SourceRow(**ROW | change), unit)
    assert (row["status"], row["reason"]) == ("quarantined", str(reason))
    assert images is None
    assert set(row) == set(PAIRS_SCHEMA.names)


@pytest.mark.parametrize("kind", SOUND)
def test_an_unusual_image_that_can_be_decoded_is_sound(unit: SourceUnit, kind: str) -> None:
    assert isinstance(inspect_image(SOUND[kind]), ImageInfo)
    row, images = judge(SourceRow(**ROW | {"image_1": SOUND[kind]}), unit)
    assert (row["status"], row["reason"]) == ("kept", None)
    assert images is not None
    assert images[1][1] == SOUND[kind], "the bytes stay as they came"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken EXIF
        with Image.open(io.BytesIO(SOUND[kind])) as image:
            assert row["mode_1"] == image.mode


def test_the_whole_corpus_goes_through_a_unit_and_every_row_comes_out(tmp_path: Path) -> None:
    """As files on disk, named by an object a line: what a person would have."""
    lines, wanted = [], Counter[str | None]()
    for number, (change, reason) in enumerate(BROKEN.values()):
        cells = {name: (ROW | change)[name] for name in ("prompt", "image_0", "image_1", "label_0")}
        if any(isinstance(cell, Reason) for cell in cells.values()) or isinstance(cells["prompt"], bytes):
            continue  # reasons of a reader, which has its own tests; JSON holds no bytes
        for side in ("image_0", "image_1"):
            if isinstance(cells[side], bytes):
                (tmp_path / f"{number}-{side}").write_bytes(cells[side])
                cells[side] = f"{number}-{side}"
        lines.append(json.dumps(cells))
        wanted[str(reason)] += 1
    lines += [json.dumps({"prompt": "fine", "image_0": "g", "image_1": "o", "label_0": 1.0}), "{broken", '"text"']
    wanted.update({None: 1, str(Reason.UNREADABLE_ROW): 2})
    (tmp_path / "g").write_bytes(GOOD)
    (tmp_path / "o").write_bytes(OTHER)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    from pipelines.ingest.execution import plan_units

    config = IngestConfig(sources=(SourceConfig(format="jsonl", path=str(tmp_path / "rows.jsonl")),))
    (planned,) = plan_units(config)
    found = write_unit(planned, Storage(str(tmp_path / "storage"))).to_pylist()
    assert [row["source_row"] for row in found] == list(range(len(lines)))
    assert Counter(row["reason"] for row in found) == wanted


def test_a_bomb_costs_no_memory() -> None:
    import tracemalloc

    tracemalloc.start()
    assert inspect_image(bomb(8193, 8192)) is Reason.IMAGE_TOO_LARGE
    assert inspect_image(bomb(60_000, 60_000)) is Reason.IMAGE_TOO_LARGE
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
