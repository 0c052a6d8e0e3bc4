"""Geometry: one bucket for a pair, no stretching, the crop inside."""

import math

import numpy as np
import pytest
import torch
from encode_steps import place_pair
from factories import encoded, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.encode.geometry import (
    MAX_AREA_ERROR,
    SDXL_BUCKETS,
    bucket_list,
    choose_bucket,
    cover,
    open_image,
    place,
)

SIDES = st.integers(1, 20_000)
SIZES = st.tuples(SIDES, SIDES)
RESOLUTIONS = st.integers(4, 256).map(lambda eighths: 8 * eighths)


def gradient(height: int, width: int) -> Image.Image:
    """Red grows with the row, green with the column: a pixel tells where it came from."""
    rows, columns = np.mgrid[0:height, 0:width]
    values = np.stack([rows * 255 / max(1, height - 1), columns * 255 / max(1, width - 1), 0 * rows], axis=-1)
    return Image.fromarray(values.round().astype(np.uint8))


def test_at_1024_the_buckets_are_sdxls_own() -> None:
    assert set(bucket_list(1024, True)) == set(SDXL_BUCKETS)
    assert len(SDXL_BUCKETS) == 40


def test_diffusers_knows_the_same_buckets() -> None:
    module = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha")
    theirs = {(int(height), int(width)) for height, width in module.ASPECT_RATIO_1024_BIN.values()}
    assert theirs <= set(SDXL_BUCKETS)


@given(RESOLUTIONS)
def test_buckets_have_about_one_area_and_divide_by_eight(resolution: int) -> None:
    buckets = bucket_list(resolution, True)
    assert (resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    for height, width in buckets:
        assert height % 8 == width % 8 == 0
        assert abs(height * width / resolution**2 - 1) <= MAX_AREA_ERROR
    assert bucket_list(resolution, False) == ((resolution, resolution),)


@given(RESOLUTIONS, SIZES, SIZES)
def test_the_bucket_of_a_pair_is_the_nearest_and_does_not_depend_on_the_order(
    resolution: int, size_0: tuple[int, int], size_1: tuple[int, int]
) -> None:
    buckets = bucket_list(resolution, True)
    chosen = choose_bucket(size_0, size_1, buckets)
    assert chosen == choose_bucket(size_1, size_0, buckets)
    aspect = (math.log(size_0[1] / size_0[0]) + math.log(size_1[1] / size_1[0])) / 2
    distances = [abs(math.log(width / height) - aspect) for height, width in buckets]
    assert abs(math.log(chosen[1] / chosen[0]) - aspect) <= min(distances) + 1e-8


@given(SIZES, RESOLUTIONS, st.data())
def test_nothing_is_stretched_by_a_pixel_and_the_crop_is_inside(
    size: tuple[int, int], resolution: int, data: st.DataObject
) -> None:
    height, width = size
    bucket = data.draw(st.sampled_from(bucket_list(resolution, True)))
    covering = cover(height, width, bucket)
    scale = max(bucket[0] / height, bucket[1] / width)
    assert abs(covering.height - height * scale) < 1
    assert abs(covering.width - width * scale) < 1
    assert 0 <= covering.top <= covering.height - bucket[0]
    assert 0 <= covering.left <= covering.width - bucket[1]
    assert abs((covering.height - bucket[0]) - 2 * covering.top) <= 1  # the centre
    assert abs((covering.width - bucket[1]) - 2 * covering.left) <= 1


@pytest.mark.parametrize("size", [(64, 64), (100, 60), (33, 190), (640, 480)])
@pytest.mark.parametrize("bucket", [(64, 64), (48, 96), (96, 48)])
def test_placing_is_pillows_resize_and_then_a_crop(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    image = picture(np.random.default_rng(1), *size)
    covering = cover(*size, bucket)
    whole = image.resize((covering.width, covering.height), Image.Resampling.BILINEAR)
    cropped = whole.crop((covering.left, covering.top, covering.left + bucket[1], covering.top + bucket[0]))
    placed = place(image, bucket)
    assert placed.pixels.shape == (*bucket, 3)
    assert np.abs(placed.pixels.astype(int) - np.asarray(cropped).astype(int)).max() <= 2  # two passes, each rounded
    assert placed.time_ids == (*size, covering.top, covering.left, *bucket)


@pytest.mark.parametrize("size", [(64, 64), (100, 151), (151, 100), (97, 64), (200, 333), (40, 61), (1000, 1503)])
def test_a_square_is_the_official_scripts_centre_crop(size: tuple[int, int]) -> None:
    """utils.py of mapo-t2i/mapo: torchvision's Resize (bilinear, antialiased) of a tensor, then CenterCrop."""
    side, (height, width) = 64, size
    image = picture(np.random.default_rng(2), *size)
    short, long = min(size), max(size)
    resized = (side, int(side * long / short)) if height <= width else (int(side * long / short), side)
    pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    whole = torch.nn.functional.interpolate(pixels_CHW[None], resized, mode="bilinear", antialias=True)[0]
    top = max(0, round((resized[0] - side) / 2.0))
    left = max(0, round((resized[1] - side) / 2.0))
    expected_HWC = whole[:, top : top + side, left : left + side].permute(1, 2, 0) * 255
    (bucket,) = bucket_list(side, False)
    placed = place(image, bucket)
    assert placed.time_ids == (height, width, top, left, side, side)
    assert np.abs(placed.pixels - expected_HWC.numpy()).max() <= 1.5  # ours are whole numbers, rounded twice


def test_a_very_long_image_takes_no_more_memory_than_its_bucket() -> None:
    placed = place(Image.new("RGB", (1, 8192), (10, 20, 30)), (64, 64))  # resized whole: 64 x 524,288
    assert (placed.pixels == (10, 20, 30)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = gradient(40, 80)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(open_image(encoded(stored, "PNG", exif=exif))), np.asarray(upright))


def test_a_broken_exif_block_is_ignored() -> None:
    data = encoded(gradient(16, 16), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff broken")
    assert open_image(data).size == (16, 16)


def test_alpha_lies_on_white_and_every_mode_becomes_rgb() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (np.asarray(open_image(encoded(clear, "PNG"))) == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert (np.asarray(open_image(encoded(half, "PNG"))) == 127).all()
    grey = Image.fromarray(np.full((4, 4), 0x80FF, np.uint16))
    assert (np.asarray(open_image(encoded(grey, "PNG"))) == 0x80).all()
    palette = gradient(4, 4).quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert np.asarray(open_image(encoded(palette, "PNG", transparency=palette.info["transparency"])))[0, 0].min() == 255
    for mode in ("L", "LA", "P", "1", "CMYK"):
        name = "JPEG" if mode == "CMYK" else "PNG"
        assert open_image(encoded(gradient(4, 4).convert("L").convert(mode), name)).mode == "RGB"


@given(
    SIZES.map(lambda size: (1 + size[0] % 90, 1 + size[1] % 90)), SIZES.map(lambda s: (1 + s[0] % 90, 1 + s[1] % 90))
)
def test_both_images_of_a_pair_are_in_one_bucket(size_0: tuple[int, int], size_1: tuple[int, int]) -> None:
    images = [encoded(gradient(*size), "PNG") for size in (size_0, size_1)]
    bucket, image_0, image_1 = place_pair(*images, bucket_list(64, True))
    assert image_0.pixels.shape == image_1.pixels.shape == (*bucket, 3)
    assert image_0.time_ids[:2] == size_0
    assert image_1.time_ids[:2] == size_1
    assert image_0.time_ids[4:] == image_1.time_ids[4:] == bucket
