"""Statistics of pixels: images whose number is known without a computer."""

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scorer_twins import formula_image

from pipelines.scores.scorers import Failure, Score, new_scorer

BLACK, WHITE, RED = (Image.new("RGB", (64, 64), colour) for colour in ("black", "white", "red"))


def number(name: str, image: Image.Image) -> float:
    (found,) = new_scorer(name).score([image], [None])
    assert isinstance(found, float)
    return found


def halves(first: str, second: str, size: int = 256) -> Image.Image:
    image = Image.new("RGB", (size, size), first)
    image.paste(second, (size // 2, 0, size, size))
    return image


def from_array(values: Any) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("dark_share", BLACK, 1.0),
        ("dark_share", WHITE, 0.0),
        ("dark_share", halves("black", "white"), 0.5),
        ("saturation", RED, 1.0),
        ("saturation", WHITE, 0.0),
        ("saturation", BLACK, 0.0),
        ("saturation", halves("red", "gray"), 0.5),
        ("edge_density", WHITE, 0.0),
        ("edge_density", halves("black", "white"), 2 / 256),
        ("colour_entropy", RED, 0.0),
        ("colour_entropy", halves("red", "blue"), 1.0),
        ("grid_energy", WHITE, 0.0),
    ],
)
def test_known_images_have_known_numbers(name: str, image: Image.Image, expected: float) -> None:
    assert number(name, image) == pytest.approx(expected, abs=1e-12)


def test_all_colours_alike_have_nine_bits() -> None:
    colours = [(32 * r, 32 * g, 32 * b) for r in range(8) for g in range(8) for b in range(8)]
    assert number("colour_entropy", from_array(np.array(colours).reshape(16, 32, 3))) == pytest.approx(9)


def test_a_grid_of_latents_is_seen_at_any_phase_and_noise_is_none() -> None:
    places = np.arange(256)
    for phase in (0, 3):
        lines = np.where((places + phase) // 8 % 2, 200, 100)
        board = np.where((lines[:, None] == lines[None, :]), 200, 100)
        assert number("grid_energy", from_array(np.repeat(board[..., None], 3, 2))) == pytest.approx(
            math.sqrt(7), abs=0.05
        )
    noise = np.random.RandomState(0).randint(0, 256, (256, 256, 3))
    assert number("grid_energy", from_array(noise)) < 0.05


def test_small_images_have_numbers_too() -> None:
    for name in ("dark_share", "saturation", "edge_density", "colour_entropy", "grid_energy"):
        assert math.isfinite(number(name, Image.new("RGB", (1, 1), "gray")))


def test_edge_density_does_not_follow_the_resolution() -> None:
    small, large = (
        number("edge_density", halves("black", "white", 256)),
        number("edge_density", halves("black", "white", 1024)),
    )
    assert small == pytest.approx(large, abs=1 / 256)


def test_near_duplicates_are_found_through_light_changes_alone() -> None:
    image, other = formula_image(256, 256, 1), formula_image(256, 256, 2)
    near = ImageEnhance.Brightness(image.resize((200, 200))).enhance(1.1)
    scorer = new_scorer("near_duplicates")
    found = scorer.score([image, other, image], [None] * 3, siblings=[[near, other], [image, near], []])
    assert found[0] == Score(0.5, {"nearest_bits": pytest.approx(0, abs=10)})
    assert found[1].value == 0
    assert found[1].components["nearest_bits"] > 15
    assert found[2] == Failure("the image has no siblings")
