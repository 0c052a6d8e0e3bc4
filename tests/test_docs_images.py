"""The pictures of the documentation: drawn again they are the same, and the page says what the functions give."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from pipelines.encode.geometry import bucket_list, choose_bucket

DOCS = Path(__file__).parents[1] / "docs"
IMAGES = DOCS / "images"
PAGE = DOCS / "concepts" / "geometry.md"
MAX_BYTES = 120_000
MAX_TOTAL_BYTES = 400_000


def times(size: tuple[int, int]) -> str:
    return f"{size[0]} \N{MULTIPLICATION SIGN} {size[1]}"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_images_geometry", IMAGES / "geometry.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text() -> str:
    """The page with one space for any white space."""
    return " ".join(PAGE.read_text().split())


def test_the_script_draws_the_committed_pictures(script: ModuleType, tmp_path: Path) -> None:
    drawn = script.write(tmp_path)
    assert {path.name for path in drawn} == {path.name for path in IMAGES.iterdir() if path.suffix in (".png", ".jpg")}
    for path in drawn:
        with Image.open(path) as ours, Image.open(IMAGES / path.name) as committed:
            same = ours.size == committed.size and np.array_equal(np.asarray(ours), np.asarray(committed))
        assert same, f"{path.name} is stale: run `python docs/images/geometry.py`"
        if path.suffix == ".jpg":
            assert path.read_bytes() == (IMAGES / path.name).read_bytes()


def test_the_pictures_are_small_and_all_on_the_page(text: str) -> None:
    pictures = [path for path in IMAGES.iterdir() if path.suffix in (".png", ".jpg")]
    assert all(f"](../images/{path.name})" in text for path in pictures)
    assert max(path.stat().st_size for path in pictures) <= MAX_BYTES
    assert sum(path.stat().st_size for path in pictures) <= MAX_TOTAL_BYTES


def test_the_table_says_what_the_functions_give(script: ModuleType) -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.endswith("]` |")]
    assert rows == [
        f"| {name} | {times(each.size)} | {times((each.covering.height, each.covering.width))} "
        f"| {times(each.bucket)} | {100 * each.kept_ratio:.0f} % | `{list(each.placed.time_ids)}` |"
        for name, each in script.examples().items()
    ]


def test_the_sentences_say_what_the_functions_give(script: ModuleType, text: str) -> None:
    found = script.examples()
    first, second = (found[name].size[1] / found[name].size[0] for name in ("image_0", "image_1"))
    bucket = found["image_0"].bucket
    assert (
        f"aspects (width by height) are {first:.2f} and {second:.2f}, their geometric mean is "
        f"{math.sqrt(first * second):.2f}, and the nearest bucket is {times(bucket)} ({bucket[1] / bucket[0]:.2f})"
    ) in text
    default = bucket_list(script.RESOLUTION, True)
    widest, tallest = max(default, key=lambda each: each[1]), max(default)
    assert not any(side % 64 for each in default for side in each)
    assert (
        f"has {len(default)} buckets at {script.RESOLUTION}, with sides in multiples of 64 pixels "
        f"from {times(widest)} to {times(tallest)}"
    ) in text
    pair, own_list = script.OWN_PAIR, script.OWN_LIST
    assert f"buckets: {[list(each) for each in own_list]}" in text
    chosen = choose_bucket(*pair, own_list)
    assert f"a pair of {times(pair[0])} and {times(pair[1])} goes into {times(chosen)}" in text
