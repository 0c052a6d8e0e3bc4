"""Mask2Former as GenEval uses it: the objects of one image, with masks and boxes at the image's own size.

Letters: C channels, H rows, W columns, Q queries, K classes, N objects.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.dataset.errors import ModelError
from pipelines.scores.scorers.geneval.boxes import Objects, box_of, objects_by_class
from pipelines.scores.scorers.geneval.names import OBJECTS
from pipelines.scores.scorers.images import IMAGENET_MEAN, IMAGENET_STD
from pipelines.scores.scorers.trunks.trunk import (
    DAMAGED,
    check_float32,
    check_weights,
    frozen,
    full_precision,
    load_pretrained,
    shared,
)

LONGEST, SHORTEST = 1333, 800
"""Most pixels of the longer and of the shorter side; one of them is reached."""
DIVISOR = 32
"""The model takes sides that are multiples of it; images are padded with the mean colour at the right and below."""
MAX_DETECTIONS = 100
"""Pairs of a query and a class that are looked at, the likeliest ones."""
AREA_FLOOR = 1e-6
"""Added to a mask's area, so that an empty mask has confidence 0."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of one image, as rows and columns.

    Args:
        original: Its own.
        resized: After resizing.
        padded: After padding.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]

    @staticmethod
    def of(width: int, height: int) -> "Sizes":
        """Return the sizes of an image."""
        scale = min(LONGEST / max(width, height), SHORTEST / min(width, height))
        resized = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
        padded = -(-resized[0] // DIVISOR) * DIVISOR, -(-resized[1] // DIVISOR) * DIVISOR
        return Sizes((height, width), resized, padded)


class Detector:
    """Finds objects with a Mask2Former for instances, one image at a time.

    confidence = p(class | query) x mean of the sigmoid inside the mask; mask = pixels whose logit is above 0, at the
    image's own size. One image at a time: a judgement is 0 or 1, and must not depend on the images beside it.

    Args:
        model: A `Mask2FormerForUniversalSegmentation`.
        device: Its device.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model: Any = frozen(model, device)
        self._device = device

    def detect(self, image: Image.Image, threshold: float) -> dict[str, Objects]:
        """Return the objects of an RGB image that are surer than a threshold, by class."""
        check_float32(self._model)
        sizes = Sizes.of(*image.size)
        with full_precision(self._device):
            outputs = self._model(pixel_values=prepared(image, sizes)[None].to(self._device))
            return objects_of(outputs.class_queries_logits[0], outputs.masks_queries_logits[0], sizes, threshold)


def prepared(image: Image.Image, sizes: Sizes) -> Tensor:
    """Return an RGB image as the model takes it: C, H, W; resized with Pillow's bilinear filter, as Meta trained."""
    height, width = sizes.resized
    resized = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
    values_CHW = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    mean_C11, std_C11 = (torch.tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    down, across = sizes.padded[0] - height, sizes.padded[1] - width
    return nn.functional.pad((values_CHW - mean_C11) / std_C11, (0, across, 0, down))


def objects_of(classes_QK: Tensor, masks_QHW: Tensor, sizes: Sizes, threshold: float) -> dict[str, Objects]:
    """Return the objects in the model's outputs for one image.

    A confidence is no larger than the probability of its class. Pairs whose probability does not exceed the threshold
    are left out first: the masks of the others alone are made, one after the other.

    Args:
        classes_QK: Logits of classes; the last one is of no object.
        masks_QHW: Logits of masks, at a quarter of the padded size.
        sizes: The image's sizes.
        threshold: The confidence that an object must exceed.
    """
    num_classes = classes_QK.shape[-1] - 1
    probabilities = classes_QK.softmax(dim=-1)[:, :-1].flatten()
    likeliest = probabilities.topk(min(MAX_DETECTIONS, len(probabilities)))
    labels, boxes, confidences, masks = [], [], [], []
    for probability, place in zip(likeliest.values, likeliest.indices.tolist(), strict=True):
        if not probability > threshold:
            continue
        logits_HW = _at_original_size(masks_QHW[place // num_classes], sizes)
        mask_HW = logits_HW > 0
        inside = (logits_HW.sigmoid() * mask_HW).sum() / (mask_HW.sum() + AREA_FLOOR)
        confidences.append(float(probability * inside))
        masks.append(mask_HW.cpu().numpy())
        boxes.append(box_of(masks[-1]))
        labels.append(place % num_classes)
    return objects_by_class(
        np.array(labels, np.int64), np.array(boxes, np.float32).reshape(-1, 4), np.array(confidences, np.float32),
        masks, threshold,
    )  # fmt: skip


def _at_original_size(logits_HW: Tensor, sizes: Sizes) -> Tensor:
    """Return the logits of a mask at the image's own size: through the padded size, without the padding."""
    height, width = sizes.resized
    padded = _resized(logits_HW[None, None], sizes.padded)
    return _resized(padded[..., :height, :width], sizes.original)[0, 0]


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def load_detector(folder: Path, device: Any) -> Detector:
    """Load a Mask2Former for COCO's instances.

    Args:
        folder: The part's folder.
        device: A torch device.

    Raises:
        ModelError: Weights are missing, damaged or of other classes, or scipy is not installed.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    if importlib.util.find_spec("scipy") is None:  # its loss wants scipy, even where nothing is trained
        raise ModelError("transformers cannot build Mask2Former without scipy", "pip install 'mapo[eval]'")
    place = torch.device(device)
    key = ("mask2former", check_weights(folder))
    model: Any = shared(key, place, lambda: load_pretrained(Mask2FormerForUniversalSegmentation, folder))
    if (found := model.config.num_labels) != len(OBJECTS):
        raise ModelError(f"{folder} knows {found} classes, not the {len(OBJECTS)} of COCO's instances", DAMAGED)
    return Detector(model, place)
