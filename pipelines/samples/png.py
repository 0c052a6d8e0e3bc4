"""PNG files of samples: lossless, and a pure function of the pixels."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COMPRESS_LEVEL = 6


def to_png(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """Return RGB pixels as a PNG, without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG", compress_level=COMPRESS_LEVEL)
    return buffer.getvalue()
