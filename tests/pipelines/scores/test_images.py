"""Images of every mode become RGB as a viewer shows them; damaged ones are named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scorer_twins import formula_image, value_of

from pipelines.scores.scorers import (
    new_scorer,
)
from pipelines.scores.scorers.images import Picture, UnreadableImage, to_rgb


def test_images_of_every_mode_become_rgb_as_a_viewer_shows_them() -> None:
    grey16 = Image.fromarray(np.array([[0, 0x8000], [0xFFFF, 0x00FF]], dtype=np.uint16))
    assert np.asarray(to_rgb(grey16))[..., 0].tolist() == [[0, 128], [255, 0]]
    wide = Image.fromarray(np.array([[0, 0xFFFF]], dtype=np.int32))
    assert np.asarray(to_rgb(wide))[..., 0].tolist() == [[0, 255]]
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("LA", (2, 2), (0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (127, 127, 127)
    palette = formula_image(64, 64).quantize(8)
    assert np.array_equal(np.asarray(to_rgb(palette)), np.asarray(palette.convert("RGB")))
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    assert to_rgb(turned).size in ((4, 2), (2, 4))
    for mode in ("1", "L", "CMYK", "YCbCr", "HSV"):
        assert to_rgb(Image.new(mode, (2, 2))).mode == "RGB"
    with pytest.raises(UnreadableImage, match="mode F"):
        to_rgb(Image.new("F", (2, 2)))
    with pytest.raises(UnreadableImage, match="outside"):
        to_rgb(Image.fromarray(np.array([[70000]], dtype=np.int32)))


def test_a_truncated_file_is_unreadable(tmp_path: Path) -> None:
    formula_image(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with Image.open(tmp_path / "cut.png") as opened:
        assert "cannot be decoded" in str(Picture(opened).unreadable)


def test_antialias_and_crop_are_other_scores(twins: Path) -> None:
    image = formula_image(640, 480, 3)
    found = []
    for name in ("hpsv2", "hpsv2-noantialias"):
        scorer = new_scorer(name)
        scorer.load(twins, "cpu")
        found.append(value_of(scorer.score([image], ["a cat"])[0]))
    assert abs(found[0] - found[1]) > 0.01
