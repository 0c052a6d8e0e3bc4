"""From an image file to the pixels that are encoded: one bucket for a pair, no stretching, a centre crop.

Both images of a pair land in one bucket, so that a micro-batch has one shape; a single image lands in that of its own
size. Letters: H rows, W columns, C channels.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Bucket = tuple[int, int]
"""Height and width in pixels."""

# Height, width. Source: SDXL report (arXiv 2307.01952), appendix I, "Multi-aspect training hyperparameters".
SDXL_BUCKETS: tuple[Bucket, ...] = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896),
    (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640),
    (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip
SDXL_RESOLUTION = 1024
MAX_STEP = 64  # eight latent pixels of SDXL's VAE, as in its own list
MIN_STEP = 16  # four latent pixels of a VAE of factor 4: a UNet of three levels halves them twice
STEPS_A_SIDE = 8  # a smaller resolution takes a smaller step, so that it keeps more than a few buckets
MAX_AREA_ERROR = 0.125  # of a bucket's area against resolution^2; SDXL's own list stays within 0.10


@dataclass(frozen=True)
class Cover:
    """How an image covers a bucket: its resized size, and the bucket's place in it (pixels)."""

    height: int
    width: int
    top: int
    left: int


@dataclass(frozen=True)
class Placed:
    """An image in its bucket, with its six time ids for SDXL."""

    pixels: NDArray[np.uint8]
    """H, W, C."""
    time_ids: tuple[int, int, int, int, int, int]
    """Original height and width, crop top and left (in resized pixels), target height and width."""


def bucket_list(resolution: int, buckets: bool | Sequence[Bucket]) -> tuple[Bucket, ...]:
    """Return the buckets of a resolution: SDXL's own list scaled, the square alone, or the given ones.

    Args:
        resolution: Side of the square bucket; the others have about its area.
        buckets: True for SDXL's list, False for the square alone, or a list, whatever the resolution is.
    """
    square = (resolution, resolution)
    if not isinstance(buckets, bool):
        return tuple(sorted(buckets))
    if not buckets:
        return (square,)
    step = MAX_STEP
    while step > MIN_STEP and step * STEPS_A_SIDE > resolution:
        step //= 2
    scaled = [(_scaled(height, resolution, step), _scaled(width, resolution, step)) for height, width in SDXL_BUCKETS]
    fitting = [
        found
        for found in scaled
        if found[0] != found[1] and abs(found[0] * found[1] / resolution**2 - 1) <= MAX_AREA_ERROR
    ]
    return tuple(sorted({*fitting, square}))


def _scaled(side: int, resolution: int, step: int) -> int:
    """Scale a side of SDXL's list to this resolution, to the nearest multiple of `step` (halves go up)."""
    return max(1, (2 * side * resolution + SDXL_RESOLUTION * step) // (2 * SDXL_RESOLUTION * step)) * step


def choose_bucket(size_0: tuple[int, int], size_1: tuple[int, int], buckets: tuple[Bucket, ...]) -> Bucket:
    """Choose the bucket of a pair: nearest, in log aspect, to the geometric mean of both aspects.

    If several are equally near, it is the one whose area is nearest to the geometric mean of both areas; if there are
    still several, the first.

    Args:
        size_0: Height and width of one image.
        size_1: Height and width of the other; the order does not matter. A single image is its own other one.
        buckets: From `bucket_list`.
    """
    aspect = math.log((size_0[1] * size_1[1]) / (size_0[0] * size_1[0])) / 2
    area = math.log(size_0[0] * size_0[1] * size_1[0] * size_1[1]) / 2

    def distance(bucket: Bucket) -> tuple[float, float]:
        height, width = bucket
        # Rounded, so that two buckets equally far away are equal whatever the last bit of a logarithm is.
        return round(abs(math.log(width / height) - aspect), 9), round(abs(math.log(height * width) - area), 9)

    return min(buckets, key=distance)


def cover(height: int, width: int, bucket: Bucket) -> Cover:
    """Scale an image until it just covers the bucket, which is then its centre. It is stretched by less than a pixel.

    For a square, sizes and offsets equal those of the official training scripts: `torchvision.transforms.Resize`, which
    truncates fractions of a pixel, and `CenterCrop`, which rounds halves to even.
    """
    bucket_height, bucket_width = bucket
    if bucket_width * height >= bucket_height * width:  # the image is narrower than the bucket: its width decides
        resized = max(bucket_height, height * bucket_width // width), bucket_width
    else:
        resized = bucket_height, max(bucket_width, width * bucket_height // height)
    return Cover(*resized, round((resized[0] - bucket_height) / 2), round((resized[1] - bucket_width) / 2))


def open_image(data: bytes) -> Image.Image:
    """Open an image as a viewer shows it: EXIF orientation applied, alpha on white, RGB.

    Raises:
        OSError, SyntaxError, ValueError, EOFError: The image is damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is not ours to judge
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        with contextlib.suppress(Exception):  # a broken EXIF block says nothing; Pillow's parser fails in many ways
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # 16 bits of grey: Pillow would clip where it should scale
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")


def place(image: Image.Image, bucket: Bucket) -> Placed:
    """Resize to cover the bucket (bilinear, antialiased, as in the official scripts) and crop the centre, in one pass.

    Only the part of the image inside the bucket is resampled, so that a very long image takes no extra memory.
    """
    bucket_height, bucket_width = bucket
    height, width = image.height, image.width
    covering = cover(height, width, bucket)
    box = (
        covering.left * width / covering.width,
        covering.top * height / covering.height,
        min(width, (covering.left + bucket_width) * width / covering.width),
        min(height, (covering.top + bucket_height) * height / covering.height),
    )
    resized = image.resize((bucket_width, bucket_height), Image.Resampling.BILINEAR, box=box)
    time_ids = (height, width, covering.top, covering.left, bucket_height, bucket_width)
    return Placed(np.array(resized, dtype=np.uint8), time_ids)


def mirror(placed: Placed) -> Placed:
    """Mirror an image in its bucket left to right, as if it had been mirrored before it was resized.

    The crop's left edge is that of the mirrored image: it differs by one if the crop removes an odd number of columns.
    """
    height, width, top, left, *bucket = placed.time_ids
    cut_off = cover(height, width, (bucket[0], bucket[1])).width - bucket[1]
    time_ids = (height, width, top, cut_off - left, bucket[0], bucket[1])
    return Placed(np.ascontiguousarray(placed.pixels[:, ::-1]), time_ids)
