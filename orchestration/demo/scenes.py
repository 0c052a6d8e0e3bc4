"""Scenes: square crops of the photos that come with scikit-image, their captions, and the style to be learned.

A scene is one photo seen from one distance at one place, and it has one caption; each scene gives any number of
crops that differ by a small seeded shift. Nothing is downloaded: the files lie in the installed package.
"""

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

RESOLUTION = 64
"""Side of every crop, in pixels; also the resolution of the base model."""

SUBJECTS = {
    "astronaut.png": "an astronaut in orange",
    "chelsea.png": "a ginger cat",
    "coffee.png": "a cup of coffee",
    "rocket.jpg": "a rocket at dusk",
    "hubble_deep_field.jpg": "a field of galaxies",
    "ihc.png": "stained tissue under a microscope",
    "motorcycle_left.png": "a red motorcycle",
    "retina.jpg": "the back of an eye",
}
"""File name of each photo in `skimage/data`, and what a caption calls it."""

DISTANCES = {"wide": 0.96, "medium": 0.72, "close": 0.52}
"""Side of the crop as a share of the photo's shorter side."""

PLACES = {
    "centre": (0.5, 0.5),
    "upper left": (0.08, 0.08),
    "upper right": (0.92, 0.08),
    "lower left": (0.08, 0.92),
    "lower right": (0.92, 0.92),
}
"""Position of the crop in the remaining space, across and down: 0 is the left or upper edge, 1 the other."""

SHIFT_RATIO = 0.05
"""Crops of one scene differ by up to this share of their side, in place and in size."""

STYLE_STOPS = (0.0, 0.4, 0.72, 1.0)
STYLE_COLOURS = ((12, 24, 66), (28, 92, 150), (150, 190, 196), (255, 241, 208))
"""Cyanotype on warm paper: the colour (sRGB, 0..255) that each lightness (0..1) becomes."""

_LUMA = np.array([0.299, 0.587, 0.114])
_CAPTION = re.compile(r"^an? (?:wide|medium|close) photo of (?P<subject>[^,]+), [a-z ]+$")


@dataclass(frozen=True)
class Scene:
    """One photo (file name in `SUBJECTS`) at one distance (`DISTANCES`) and place (`PLACES`)."""

    photo: str
    distance: str
    place: str

    @property
    def caption(self) -> str:
        """The prompt of every crop of this scene, such as "a close photo of a ginger cat, upper left"."""
        return f"a {self.distance} photo of {SUBJECTS[self.photo]}, {self.place}"


def scenes() -> list[Scene]:
    """List every scene in a fixed order: ten of each photo (wide only from the centre, close only off it)."""
    views = [("wide", "centre"), *(("medium", place) for place in PLACES)]
    views += [("close", place) for place in PLACES if place != "centre"]
    return [Scene(photo, distance, place) for photo in SUBJECTS for distance, place in views]


def subject_of(prompt: str) -> str:
    """Return the part of a caption that names its photo's subject: "a ginger cat".

    Raises:
        ValueError: The prompt is not a caption of this data set.
    """
    match = _CAPTION.match(prompt)
    if match is None:
        raise ValueError(f"not a caption of the demo: {prompt!r}\nhint: an example is {scenes()[-1].caption!r}")
    return match["subject"]


def photo_folder() -> Path:
    """Return the folder of the photos in the installed scikit-image, which is not imported.

    Raises:
        FileNotFoundError: scikit-image is not installed, or one of its photos is missing.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the demo's photos come with scikit-image, which is not installed\nhint: pip install scikit-image"
        )
    folder = Path(spec.origin).parent / "data"
    missing = [name for name in SUBJECTS if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)} missing from {folder}\nhint: pip install --force-reinstall scikit-image"
        )
    return folder


@cache
def _photo(name: str) -> Image.Image:
    with Image.open(photo_folder() / name) as image:
        return image.convert("RGB")


def crop(scene: Scene, shift: tuple[float, float, float], *, resolution: int = RESOLUTION) -> Image.Image:
    """Crop a scene: RGB, `resolution` pixels square.

    Args:
        scene: The scene to crop.
        shift: Shift across, down and in size, each -1..1 in units of `SHIFT_RATIO`; a crop never leaves its photo.
        resolution: Side of the result in pixels.
    """
    photo = _photo(scene.photo)
    side = min(photo.size) * DISTANCES[scene.distance] * (1 + SHIFT_RATIO * shift[2])
    side = min(side, float(min(photo.size)))
    corner = []
    for room, place, move in zip(photo.size, PLACES[scene.place], shift[:2], strict=True):
        corner.append(min(max((room - side) * place + side * SHIFT_RATIO * move, 0.0), room - side))
    box = (corner[0], corner[1], corner[0] + side, corner[1] + side)
    return photo.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def draw_shift(rng: np.random.Generator) -> tuple[float, float, float]:
    """Draw a random `shift` for `crop`."""
    across, down, size = rng.uniform(-1, 1, size=3)
    return float(across), float(down), float(size)


def lightness(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the luma (Rec. 601) of an image, one value in 0..1 for each pixel, rows first."""
    luma: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.asarray(image.convert("RGB"), np.float64) @ _LUMA
    return luma / 255


def cyanotype(image: Image.Image) -> Image.Image:
    """Apply the style of the chosen images: each pixel's lightness printed in Prussian blue on warm paper.

    A pure function of each pixel: shapes stay in place, and lighter pixels stay lighter.
    """
    luma = lightness(image)
    toned = 0.35 * luma + 0.65 * luma * luma * (3 - 2 * luma)
    colours = np.array(STYLE_COLOURS, dtype=np.float64)
    channels = [np.interp(toned, STYLE_STOPS, colours[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
