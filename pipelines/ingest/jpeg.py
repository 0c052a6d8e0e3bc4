"""Checks that a JPEG is complete, without decoding it.

libjpeg, and so Pillow, fails on a truncated file and on invalid tables. It does not fail on wrong bits between two
markers, which decode to some image. So the entropy-coded data need only be scanned for markers, and the rest is decoded
without it. tests/pipelines/ingest/test_jpeg.py compares both verdicts.
"""

import numpy as np

START, END = b"\xff\xd8", b"\xff\xd9"
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
STANDALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # without a length: TEM, RST0..7, SOI


def jpeg_skeleton(data: bytes) -> bytes | None:
    """Return the file without the entropy-coded data of its scans; None if a marker, a segment or the end is missing.

    A decoder decodes the skeleton to some image, or fails as it would on the file. None is not a verdict: libjpeg
    accepts some bytes between segments, where no writer should have put them.
    """
    if data[:2] != START:
        return None
    markers = _markers(data)
    parts, start = [START], 2
    while True:
        code = start
        while data[code : code + 1] == b"\xff":  # a marker's first byte may be repeated
            code += 1
        if code == start or code >= len(data):
            return None
        if data[code] == END_OF_IMAGE:
            return b"".join((*parts, END))
        end = code + 1
        if data[code] not in STANDALONE:
            length = int.from_bytes(data[end : end + 2], "big")
            end += length
            if length < 2 or end > len(data):
                return None
        parts.append(data[start:end])
        if data[code] == START_OF_SCAN:
            following = int(markers.searchsorted(end))
            if following == len(markers):
                return None
            end = int(markers[following])
        start = end


def _markers(data: bytes) -> np.ndarray:
    """Find where 0xFF starts a marker that ends a scan: not a stuffed data byte, a fill byte or a restart marker."""
    values = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(values[:-1] == 0xFF)
    code = values[at + 1]
    found: np.ndarray = at[(code != 0x00) & (code != 0xFF) & (code & 0xF8 != 0xD0)]
    return found
