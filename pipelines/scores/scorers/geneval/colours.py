"""The colour of an object: the one of ten that CLIP finds most like it, with the rest of the image painted grey.

Letters: B objects, D embedding size, K colours.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipelines.scores.scorers.geneval.boxes import Floats, Mask, Objects
from pipelines.scores.scorers.geneval.names import COLOURS
from pipelines.scores.scorers.images import Picture
from pipelines.scores.scorers.trunks.clip import OPENAI, ClipImages, ClipTexts, load_images, load_texts

BACKGROUND = "#999"
PREPROCESSING = "clip-224"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class ColourClassifier:
    """Zero-shot classifier of colours by CLIP.

    cos(crop, colour) is compared, where a colour's embedding is the mean of three normalised prompts. The official
    script runs open_clip's `ViT-L-14` of `openai` under autocast; the weights need QuickGELU, and run in float32 here.

    Args:
        images: CLIP's vision tower.
        texts: CLIP's text tower.
    """

    def __init__(self, images: ClipImages, texts: ClipTexts) -> None:
        self._images, self._texts = images, texts
        self._colours_of: dict[str, Tensor] = {}

    def __call__(self, image: Image.Image, name: str, objects: Objects) -> Sequence[str]:
        """Return the colour of each object of a class.

        Args:
            image: The image, RGB.
            name: The class, such as `fire hydrant`.
            objects: Objects with masks.
        """
        return [COLOURS[place] for place in self.cosines(image, name, objects).argmax(dim=-1).tolist()]

    def cosines(self, image: Image.Image, name: str, objects: Objects) -> Tensor:
        """Return the cosine of each object and each colour: B, K."""
        crops = [Picture(cut_out(image, *each)) for each in zip(objects.boxes_N4, objects.masks, strict=True)]
        if name not in self._colours_of:
            self._colours_of[name] = self._embed_colours(name)
        return _normalised(self._images.embed(crops)) @ self._colours_of[name].T

    def _embed_colours(self, name: str) -> Tensor:
        prompts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
        embeds_BD = _normalised(self._texts.embed(prompts)[0])
        return _normalised(embeds_BD.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(dim=1))


def cut_out(image: Image.Image, box_4: Floats, mask_HW: Mask) -> Image.Image:
    """Return an object on grey, cropped to its box."""
    alone = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), Image.fromarray(mask_HW))
    left, top, right, bottom = (int(each) for each in box_4)
    return alone.crop((left, top, right, bottom))


def load_colours(clip: Path, tokenizer: Path, device: Any) -> ColourClassifier:
    """Load the classifier, whose towers other scorers share.

    Args:
        clip: The folder of OpenAI's CLIP ViT-L/14.
        tokenizer: The folder of its tokenizer.
        device: A torch device.

    Raises:
        ModelError: Weights are missing or damaged.
    """
    return ColourClassifier(
        load_images(clip, PREPROCESSING, OPENAI, device), load_texts(clip, tokenizer, OPENAI, device)
    )


def _normalised(embeds: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeds, dim=-1)
