"""GenEval's detector and colours against other computations, and the scorer as a whole."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from geneval_twins import mask2former_model, write_mask2former
from PIL import Image
from scorer_twins import clip_model, formula_image, formula_tensor, write_clip_tokenizer, write_part

from pipelines.dataset.errors import ModelError
from pipelines.scores.scorers import Failure, Score, new_scorer
from pipelines.scores.scorers.geneval.boxes import Objects, box_of
from pipelines.scores.scorers.geneval.colours import load_colours
from pipelines.scores.scorers.geneval.detector import Sizes, load_detector, objects_of, prepared
from pipelines.scores.scorers.geneval.names import COLOURS, OBJECTS


def resized64(values_HW: np.ndarray[Any, Any], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Interpolate linearly between the centres of pixels, in float64."""
    for axis, count in enumerate(size):
        places = np.clip((np.arange(count) + 0.5) * values_HW.shape[axis] / count - 0.5, 0, None)
        low = np.floor(places).astype(int)
        high, part = np.minimum(low + 1, values_HW.shape[axis] - 1), places - low
        part = part[:, None] if axis == 0 else part
        values_HW = (1 - part) * values_HW.take(low, axis) + part * values_HW.take(high, axis)
    return values_HW


def detections64(classes_QK: Any, masks_QHW: Any, sizes: Sizes) -> list[tuple[str, float, np.ndarray[Any, Any]]]:
    """Return every pair of a query and a class with its confidence and mask, in float64."""
    classes, masks = classes_QK.double().numpy(), masks_QHW.double().numpy()
    found = []
    for logits_K, small_HW in zip(classes, masks, strict=True):
        powers = np.exp(logits_K - logits_K.max())
        padded = resized64(small_HW, sizes.padded)
        logits = resized64(padded[: sizes.resized[0], : sizes.resized[1]], sizes.original)
        mask = logits > 0
        mean = (1 / (1 + np.exp(-logits[mask]))).mean() if mask.any() else 0.0
        found += [
            (name, float(power / powers.sum() * mean), mask) for name, power in zip(OBJECTS, powers, strict=False)
        ]
    return found


def outputs(num_queries: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of classes and masks as a sure model gives them."""
    classes_QK = 6 * formula_tensor("classes", (num_queries, 81)) * 81**0.5
    coarse = formula_tensor("masks", (1, num_queries, 5, 7)) * 35**0.5
    masks = torch.nn.functional.interpolate(coarse, size=(height // 4, width // 4), mode="bicubic")[0]
    return classes_QK, 6 * masks * num_queries**0.5 + formula_tensor("noise", masks.shape)


def test_detections_at_384_pixels_are_those_of_transformers() -> None:
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

    classes_QK, masks_QHW = outputs(100, 384, 384)
    raw = Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=classes_QK[None], masks_queries_logits=masks_QHW[None]
    )
    (known,) = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        raw, threshold=0.3, return_binary_maps=True
    )
    theirs = sorted(
        (OBJECTS[each["label_id"]], -each["score"], mask.bool().numpy().tobytes())
        for each, mask in zip(known["segments_info"], known["segmentation"], strict=True)
    )
    found = objects_of(classes_QK, masks_QHW, Sizes((384, 384), (384, 384), (384, 384)), 0.3)
    ours = sorted(
        (name, -round(float(sure), 6), mask.tobytes())
        for name, each in found.items() for sure, mask in zip(each.confidences_N, each.masks, strict=True)
    )  # fmt: skip
    assert len(ours) == len(theirs) > 30
    assert [(name, mask) for name, _, mask in ours] == [(name, mask) for name, _, mask in theirs]
    assert [sure for _, sure, _ in ours] == pytest.approx([sure for _, sure, _ in theirs], abs=2e-6)


def test_a_whole_detection_equals_a_computation_in_float64(tmp_path: Path) -> None:
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    width, height = 300, 200
    model, image = mask2former_model(sureness=10), formula_image(width, height)
    size = {"shortest_edge": 800, "longest_edge": 1333}
    resized = Mask2FormerImageProcessorPil(size=size, size_divisor=1)(images=image, return_tensors="pt").pixel_values
    pixels = torch.zeros(1, 3, 800, 1216)  # to multiples of 32, as Meta pads; transformers would stretch the image
    pixels[..., :1200] = resized
    sizes = Sizes.of(width, height)
    torch.testing.assert_close(prepared(image, sizes)[None], pixels, rtol=0, atol=2e-6)
    with torch.no_grad():
        raw = model(pixel_values=pixels)
    every = detections64(raw.class_queries_logits[0], raw.masks_queries_logits[0], sizes)
    known = sorted([each for each in every if each[1] > 0.3], key=lambda each: (each[0], -each[1]))
    found = load_detector(write_mask2former(tmp_path, model), "cpu").detect(image, 0.3)
    ours = [
        (name, *each) for name in sorted(found)
        for each in zip(found[name].confidences_N, found[name].masks, found[name].boxes_N4, strict=True)
    ]  # fmt: skip
    assert len(ours) >= 3
    assert [each[0] for each in ours] == [name for name, *_ in known]
    assert [each[1] for each in ours] == pytest.approx([sure for _, sure, _ in known], abs=1e-4)
    for (_, _, mask, box), (_, _, known_mask) in zip(ours, known, strict=True):
        assert mask.shape == (height, width)
        assert (mask != known_mask).mean() < 1e-3
        down, across = np.nonzero(mask)
        assert box.tolist() == [across.min(), down.min(), across.max() + 1, down.max() + 1]


@pytest.mark.parametrize(
    ("sizes", "box"),
    [
        (Sizes((96, 128), (96, 128), (96, 128)), [8, 4, 24, 20]),
        (Sizes((48, 64), (96, 128), (96, 128)), [4, 2, 12, 10]),
        (Sizes((180, 240), (90, 120), (96, 128)), [16, 8, 48, 40]),
    ],
)
def test_boxes_are_at_the_size_of_the_image_and_end_after_the_last_pixel(sizes: Sizes, box: list[int]) -> None:
    classes_QK, masks_QHW = torch.zeros(1, 81), torch.full((1, 24, 32), -50.0)
    classes_QK[0, 3] = 50.0
    masks_QHW[0, 1:5, 2:6] = 50.0
    (found,) = objects_of(classes_QK, masks_QHW, sizes, 0.5).values()
    assert found.boxes_N4.tolist() == [box]
    assert found.masks[0].shape == sizes.original


def test_a_mask_without_pixels_is_no_object() -> None:
    classes_QK = torch.zeros(1, 81)
    classes_QK[0, 3] = 50.0
    assert objects_of(classes_QK, -torch.ones(1, 8, 8), Sizes.of(64, 64), 0.0) == {}
    assert box_of(np.zeros((4, 4), np.bool_)).tolist() == [0, 0, 0, 0]
    (each,) = objects_of(classes_QK, torch.ones(1, 8, 8) * 50, Sizes.of(64, 48), 0.9).values()
    assert (each.boxes_N4.tolist(), each.confidences_N.tolist()) == ([[0, 0, 64, 48]], [1.0])


@pytest.mark.parametrize(
    ("width", "height", "resized", "padded"),
    [
        (1024, 1024, (800, 800), (800, 800)),
        (512, 512, (800, 800), (800, 800)),
        (1216, 832, (800, 1169), (800, 1184)),
        (832, 1216, (1169, 800), (1184, 800)),
        (1152, 896, (800, 1029), (800, 1056)),
        (896, 1152, (1029, 800), (1056, 800)),
        (2000, 500, (333, 1333), (352, 1344)),
        (1, 4000, (1333, 1), (1344, 32)),
    ],
)
def test_images_are_resized_within_1333_and_800(
    width: int, height: int, resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    assert Sizes.of(width, height) == Sizes((height, width), resized, padded)


def test_a_model_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="knows 79 classes, not the 80"):
        load_detector(write_mask2former(tmp_path, mask2former_model(num_labels=79)), "cpu")


def test_without_scipy_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModelError) as caught:
        load_detector(tmp_path, "cpu")
    assert caught.value.hint == "pip install 'mapo[eval]'"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sure detector, and a CLIP whose embeddings differ."""
    root = tmp_path_factory.mktemp("geneval")
    try:
        write_clip_tokenizer(root)
    except FileNotFoundError:
        pytest.skip("CLIP's tokenizer is not on this machine")
    model = clip_model("quick_gelu")
    write_part(root / "clip-l14-openai", model.state_dict(), model.config.to_dict())
    write_mask2former(root, mask2former_model(sureness=10))
    return root


def direct_cosines(root: Path, image: Image.Image, name: str, objects: Objects) -> torch.Tensor:
    """Compute each object's cosine with each colour with transformers alone."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(root / "clip-l14-openai", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(root / "clip-tokenizer")
    crops = []
    for box, mask in zip(objects.boxes_N4, objects.masks, strict=True):
        pixels = np.array(image)
        pixels[~mask] = 0x99
        left, top, right, bottom = map(int, box)
        crops.append(Image.fromarray(pixels[top:bottom, left:right]))
    found = []
    with torch.no_grad():
        vision = model(
            pixel_values=CLIPImageProcessorPil()(images=crops, return_tensors="pt").pixel_values,
            **tokenizer(["a"], return_tensors="pt"),
        ).image_embeds
        for colour in COLOURS:
            texts = [f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}",
                     f"a photo of a {colour} object"]  # fmt: skip
            tokens = tokenizer(texts, padding=True, return_tensors="pt")
            mean = model(pixel_values=torch.zeros(1, 3, 224, 224), **tokens).text_embeds.mean(dim=0)
            found.append(vision @ (mean / mean.norm()))
    return torch.stack(found, dim=1)


def test_colours_equal_transformers_own_clip(parts: Path) -> None:
    image = formula_image(320, 200)
    masks = [np.zeros((200, 320), np.bool_) for _ in range(3)]
    masks[0][20:120, 30:130] = True
    masks[1][0:200, 100:300] = np.tri(200, dtype=np.bool_)
    masks[2][190:200, 0:20] = True
    objects = Objects(np.stack([box_of(each) for each in masks]), np.ones(3, np.float32), tuple(masks))
    classifier = load_colours(parts / "clip-l14-openai", parts / "clip-tokenizer", "cpu")
    for name in ("fire hydrant", "dog"):
        known = direct_cosines(parts, image, name, objects)
        torch.testing.assert_close(classifier.cosines(image, name, objects), known, rtol=0, atol=2e-6)
        assert classifier(image, name, objects) == [COLOURS[place] for place in known.argmax(dim=1).tolist()]
    assert float((direct_cosines(parts, image, "dog", objects) - known.roll(1, 0)).abs().max()) > 1e-4


def test_an_image_is_judged_by_what_it_shows(parts: Path) -> None:
    scorer, image = new_scorer("geneval"), formula_image(300, 40)  # a narrow image is resized to few pixels
    scorer.load(parts, "cpu")
    objects = scorer._detector.detect(image, 0.3)
    name = max(objects, key=lambda each: len(objects[each]))
    count, num_objects = len(objects[name]), float(sum(map(len, objects.values())))
    place = int(direct_cosines(parts, image, name, objects[name].first(1)).argmax())
    absent = next(each for each in OBJECTS if each not in objects)
    num_sure = {each: int((found.confidences_N > 0.9).sum()) for each, found in objects.items()}
    unsure = next(each for each in objects if num_sure[each] < len(objects[each]))
    shown = {"class": name, "count": count}
    rows: list[tuple[Any, Any]] = [
        ({"tag": "two_object", "include": [shown]}, Score(1.0, {"num_objects": num_objects, "include_0": 1.0})),
        ({"tag": "t", "include": [shown, {"class": absent, "count": 1}]},
         Score(0.0, {"num_objects": num_objects, "include_0": 1.0, "include_1": 0.0})),
        ({"tag": "t", "include": [shown], "exclude": [{"class": name, "count": count}]},
         Score(0.0, {"num_objects": num_objects, "include_0": 1.0, "exclude_0": 0.0})),
        ({"tag": "t", "include": [{"class": name, "count": 1, "color": COLOURS[place]}]},
         Score(1.0, {"num_objects": num_objects, "include_0": 1.0})),
        ({"tag": "t", "include": [{"class": name, "count": 1, "color": COLOURS[place - 1]}]},
         Score(0.0, {"num_objects": num_objects, "include_0": 0.0})),
        ({"tag": "counting", "exclude": [{"class": unsure, "count": num_sure[unsure] + 1}]},
         Score(1.0, {"num_objects": float(sum(num_sure.values())), "exclude_0": 1.0})),
        ({"tag": "t", "include": [{"class": "dragon", "count": 1}]},
         Failure("metadata: include 0 has class 'dragon', which the detector does not know")),
        (None, Failure("the image has no metadata")),
    ]  # fmt: skip
    metadata = [row for row, _ in rows]
    assert scorer.score([image] * len(rows), ["a photo"] * len(rows), metadata=metadata) == [each for _, each in rows]
    assert scorer.score([image], ["a photo"], metadata=metadata[:1]) == [rows[0][1]]
