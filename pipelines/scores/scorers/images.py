"""Images as the models of scorers take them: RGB first, then a preprocessing that has a name.

Letters: C channels, H rows, W columns.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.float32]
"""C, H, W."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224
STYLE_SIDE = 512
VQA_SIDE = 480


class UnreadableImage(Exception):
    """An image cannot be decoded, or its numbers have no defined meaning as colours."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as a viewer shows it, as `encode` does: EXIF orientation applied, alpha on white, 16 bits scaled.

    The official scripts drop alpha and show whatever colour lies under it, resize palette images without interpolation
    and clip 16 bits to white; an 8-bit RGB image has the same pixels in both.

    Raises:
        UnreadableImage: The image is damaged, or its mode holds numbers of unknown range.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is not ours to judge
            image.load()
            with contextlib.suppress(Exception):  # a broken EXIF block says nothing; Pillow's parser fails in many ways
                image = ImageOps.exif_transpose(image)
            return _converted(image)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders fail in many ways
        raise UnreadableImage(f"the image cannot be decoded: {str(error) or type(error).__name__}") from error


def _converted(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImage("an image of floats (mode F) has no defined range of colours")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip; mode I holds them in 32 bits
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
            raise UnreadableImage(f"an image of mode {image.mode} has values outside 0..65535")
        return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


class Picture:
    """One image of a batch: decoded once, resized once for each size, prepared once for each preprocessing.

    Args:
        image: The image; None for one that could not even be opened.
    """

    def __init__(self, image: Image.Image | None) -> None:
        self._image = image
        self._memo: dict[Any, Any] = {}

    @classmethod
    def broken(cls, reason: str) -> "Picture":
        """Return the picture of a file that is no image, with the reason."""
        picture = cls(None)
        picture.remember("unreadable", lambda: reason)
        return picture

    def remember(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return what was computed under a key before, or compute it."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    @property
    def rgb(self) -> Image.Image:
        """The image as 8-bit RGB.

        Raises:
            UnreadableImage: It has no such form.
        """
        if "rgb" not in self._memo:
            if self._image is None:
                raise UnreadableImage(str(self.unreadable))
            self._memo["rgb"], self._image = to_rgb(self._image), None
        found: Image.Image = self._memo["rgb"]
        return found

    @property
    def unreadable(self) -> str | None:
        """The reason why the image cannot be scored, if it cannot."""
        reason: str | None = self.remember("unreadable", self._find_unreadable)
        return reason

    def _find_unreadable(self) -> str | None:
        try:
            rgb = self.rgb
        except UnreadableImage as error:
            return str(error)
        return None if rgb.width and rgb.height else "the image has no pixels"

    def shortest(self, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
        """Return the image resized so that its shorter side is `side`; fractions of a pixel are cut off."""
        found: Image.Image = self.remember(("shortest", side, resample), lambda: _shortest(self.rgb, side, resample))
        return found

    def prepared(self, preprocessing: str) -> Pixels:
        """Return the image as a model takes it."""
        found: Pixels = self.remember(("prepared", preprocessing), lambda: PREPROCESSINGS[preprocessing](self))
        return found


def _shortest(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    width, height = image.size
    if min(width, height) == side:
        return image
    if width <= height:
        return image.resize((side, int(side * height / width)), resample)
    return image.resize((int(side * width / height), side), resample)


def _half_to_even(excess: int) -> int:
    return round(excess / 2)


def _floor(excess: int) -> int:
    return excess // 2


def _centre(image: Image.Image, side: int, rounding: Callable[[int], int]) -> Image.Image:
    left, top = rounding(image.width - side), rounding(image.height - side)
    return image.crop((left, top, left + side, top + side))


def scaled(image: Image.Image) -> Pixels:
    """Return C, H, W in 0..1."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1)) / np.float32(255)


def _normalised(values: Pixels, mean: Sequence[float], std: Sequence[float]) -> Pixels:
    mean_C11, std_C11 = (np.array(each, dtype=np.float32)[:, None, None] for each in (mean, std))
    return (values - mean_C11) / std_C11


def _clip(picture: Picture) -> Pixels:
    """Prepare as OpenAI's transform for CLIP, which also open_clip, ImageReward and CSD use."""
    return _normalised(scaled(_centre(picture.shortest(SIDE), SIDE, _half_to_even)), CLIP_MEAN, CLIP_STD)


def _clip_hf(picture: Picture) -> Pixels:
    """Prepare as the processor of transformers for CLIP, which rounds odd crops down."""
    return _normalised(scaled(_centre(picture.shortest(SIDE), SIDE, _floor)), CLIP_MEAN, CLIP_STD)


def _dino(picture: Picture) -> Pixels:
    centre = _centre(picture.shortest(256), SIDE, _half_to_even)
    return _normalised(scaled(centre), IMAGENET_MEAN, IMAGENET_STD)


def _style(picture: Picture) -> Pixels:
    centre = _centre(picture.shortest(STYLE_SIDE), STYLE_SIDE, _half_to_even)
    return _normalised(scaled(centre), IMAGENET_MEAN, IMAGENET_STD)


def _squash(picture: Picture) -> Pixels:
    """Prepare as T2I-CompBench's transform for BLIP: a square, whatever the shape of the image."""
    squashed = picture.rgb.resize((VQA_SIDE, VQA_SIDE), Image.Resampling.BICUBIC)
    return _normalised(scaled(squashed), CLIP_MEAN, CLIP_STD)


def _letterbox(picture: Picture, *, antialias: bool) -> Pixels:
    """Prepare as HPSv2's transform: resize 0..1 so that the longer side fits, add black bars, then normalise.

    Bicubic overshoots 0..1 a little; nothing is clamped, as in the official code.
    """
    import torch

    values_CHW = torch.from_numpy(scaled(picture.rgb))
    height, width = values_CHW.shape[1:]
    scale = SIDE / float(max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if size != (height, width):
        values_CHW = torch.nn.functional.interpolate(
            values_CHW[None], size=size, mode="bicubic", align_corners=False, antialias=antialias
        )[0]
    down, across = SIDE - size[0], SIDE - size[1]
    bars = (across // 2, across - across // 2, down // 2, down - down // 2)
    padded = torch.nn.functional.pad(values_CHW, bars)
    return _normalised(padded.numpy(), CLIP_MEAN, CLIP_STD)


PREPROCESSINGS: dict[str, Callable[[Picture], Pixels]] = {
    "clip-224": _clip,
    "clip-224-hf": _clip_hf,
    "hps-224-antialias": lambda picture: _letterbox(picture, antialias=True),
    "hps-224-noantialias": lambda picture: _letterbox(picture, antialias=False),
    "dino-224": _dino,
    "vgg-512": _style,
    "blip-480": _squash,
}
"""Preprocessings by the name that goes into a scorer's fingerprint."""


def prepare(images: Sequence[Image.Image | Picture], preprocessing: str) -> "Tensor":
    """Return images as one batch for a model: B, C, H, W; float32, on the CPU.

    Raises:
        UnreadableImage: An image cannot be decoded.
        KeyError: There is no such preprocessing.
    """
    import torch

    pictures = [image if isinstance(image, Picture) else Picture(image) for image in images]
    return torch.from_numpy(np.stack([picture.prepared(preprocessing) for picture in pictures]))
