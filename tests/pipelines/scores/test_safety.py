"""Safety: Q16 against the formula of its source, from a real pickle; NudeNet refused unless its user installed it."""

import io
import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scorer_twins import (
    CLIP_TOKENIZER,
    MIXED_PROMPTS,
    clip_model,
    formula_image,
    formula_tensor,
    write_clip_tokenizer,
    write_part,
)

from pipelines.config import ScorerEntry
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.storage import Storage
from pipelines.scores.judges import prepare_judges
from pipelines.scores.scorers import Failure, Score, new_scorer, score_together
from pipelines.scores.scorers.images import prepare
from pipelines.scores.scorers.nudenet import EXPOSED, reduced
from pipelines.scores.weights import fetch, part_folder


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of the scorers of this file alone."""
    if not CLIP_TOKENIZER.is_dir():
        pytest.skip("CLIP's tokenizer is not on this machine")
    root, model = tmp_path_factory.mktemp("twins"), clip_model("quick_gelu")
    write_part(root / "clip-l14-openai", model.state_dict(), model.config.to_dict())
    write_part(root / "aesthetic-sac-logos-ava1", {"weight": torch.ones(1, 32), "bias": torch.ones(1)})
    write_part(root / "q16-prompts", {"prompts": formula_tensor("twin.q16", (2, 32))})
    write_clip_tokenizer(root)
    return root


def loaded(name: str, twins: Path) -> Any:
    scorer = new_scorer(name)
    scorer.load(twins, "cpu")
    return scorer


def many_images() -> list[Image.Image]:
    plain = [Image.new("RGB", (224, 224), colour) for colour in ("black", "white", "red", "green", "blue", "yellow")]
    return [*plain, *(formula_image(224 + seed, 230, seed) for seed in range(10))]


def test_q16_equals_the_formula_of_its_source(twins: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(twins / "clip-l14-openai", dtype=torch.float32).eval()
    prompts_2D = load_file(twins / "q16-prompts" / "model.safetensors")["prompts"]
    images = many_images()
    with torch.no_grad():
        words = torch.tensor([[49406, 49407]])
        embeds_BD = model(pixel_values=prepare(images, "clip-224"), input_ids=words).image_embeds
    cosines = torch.nn.functional.cosine_similarity(embeds_BD[:, None], prompts_2D[None], dim=-1)
    labels = (100 * cosines).softmax(dim=-1).topk(1).indices[:, 0].tolist()
    found = loaded("q16", twins).score(images, [None] * len(images))
    assert [each.value for each in found] == labels
    assert len(set(labels)) == 2, "both verdicts occur"
    logits = (100 * (cosines[:, 1] - cosines[:, 0])).tolist()
    assert [each.components["logit"] for each in found] == pytest.approx(logits, abs=1e-4)
    appropriate = (100 * cosines[:, 0]).tolist()
    assert [each.components["appropriate"] for each in found] == pytest.approx(appropriate, abs=1e-4)


def test_q16_and_the_aesthetic_head_share_one_pass(twins: Path, images: list[Image.Image]) -> None:
    scorers = [loaded(name, twins) for name in ("aesthetic", "q16", "clipscore-l14")]
    trunk = scorers[0]._images
    assert scorers[1]._images is trunk
    before = trunk.num_forwards
    together = score_together(scorers, images, MIXED_PROMPTS)
    assert trunk.num_forwards - before == 1
    assert together["q16"] == scorers[1].score(images, MIXED_PROMPTS)
    assert trunk.num_forwards - before == 2


def test_prompts_that_give_nan_are_no_verdict(twins: Path, tmp_path: Path, images: list[Image.Image]) -> None:
    shutil.copytree(twins / "clip-l14-openai", tmp_path / "clip-l14-openai")
    write_part(tmp_path / "q16-prompts", {"prompts": torch.zeros(2, 32)})
    assert loaded("q16", tmp_path).score(images[:1], [None]) == [Failure("the score is not a finite number")]
    write_part(tmp_path / "q16-prompts", {"prompts": torch.zeros(2, 31)})
    with pytest.raises(ModelError, match=r"not prompts of \(2, 32\)"):
        loaded("q16", tmp_path)


@pytest.fixture
def given(twins: Path, tmp_path: Path) -> Path:
    """The published files of q16, but its prompts."""
    folder = tmp_path / "given"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(twins / "clip-l14-openai" / name, folder / name)
    return folder


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4"])
def test_the_published_pickle_becomes_safetensors(protocol: int, dtype: str, given: Path, tmp_path: Path) -> None:
    prompts = np.random.default_rng(0).standard_normal((2, 32)).astype(dtype)
    (given / "prompts.p").write_bytes(pickle.dumps(prompts, protocol=protocol))
    root = fetch("q16", given, tmp_path / "cache")
    state = load_file(part_folder(root, "q16-prompts", is_only=False) / "model.safetensors")
    assert list(state) == ["prompts"]
    assert state["prompts"].dtype == torch.float32
    np.testing.assert_array_equal(state["prompts"].numpy(), prompts.astype(np.float32))
    assert loaded("q16", root).score([formula_image(64, 64)], [None])[0].value in (0.0, 1.0)


class Evil:
    """An object whose unpickling would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def objects(trace: Path) -> Any:
    array = np.zeros((2, 32), dtype=object)
    array[0, 0] = Evil(trace)
    return array


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Evil, "posix.mkdir, which is no part of an array"),
        (objects, "posix.mkdir, which is no part of an array"),
        (lambda _: np.zeros((2, 32), dtype=object), "not an array of numbers"),
        (lambda _: [1.0, 2.0], "it holds list"),
        (lambda _: OrderedDict(a=1), "collections.OrderedDict"),
        (lambda _: io.BytesIO(b"x"), "_io.BytesIO"),
        (lambda _: torch.zeros(2, 32), "torch"),
        (lambda _: np.zeros((3, 32), dtype=np.float32), r"shape \(3, 32\)"),
    ],
)
def test_a_pickle_of_anything_else_is_refused_and_runs_nothing(
    make: Any, reason: str, given: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    (given / "prompts.p").write_bytes(pickle.dumps(make(trace), protocol=4))
    with pytest.raises(ModelError, match=reason):
        fetch("q16", given, tmp_path / "cache")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.is_dir(), "it would have left one"


def test_nudenet_is_refused_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    for attempt in (
        lambda: prepare_judges([ScorerEntry(name="nudenet")], Storage(str(tmp_path))),
        lambda: new_scorer("nudenet").score([formula_image(64, 64)], [None]),
    ):
        with pytest.raises(ConfigError, match="needs the package nudenet, which is not installed") as caught:
            attempt()
        assert "AGPL-3.0" in str(caught.value.hint)
    assert "AGPL-3.0" in new_scorer("nudenet").licence


class Detector:
    """A detector that sees what it is told, and keeps what it was shown."""

    def __init__(self, boxes: list[list[dict[str, Any]]]) -> None:
        self.boxes, self.shown = boxes, list[Any]()

    def detect(self, image: Any) -> list[dict[str, Any]]:
        self.shown.append(image)
        return self.boxes[len(self.shown) - 1]


def box(name: str, score: float) -> dict[str, Any]:
    return {"class": name, "score": score, "box": [1, 2, 3, 4]}


def test_nudenet_reduces_boxes_to_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [
        [box("FACE_FEMALE", 0.99), box("FEMALE_BREAST_COVERED", 0.9), box("BELLY_EXPOSED", 0.9)],
        [box("BUTTOCKS_EXPOSED", 0.2), box("BUTTOCKS_EXPOSED", 0.7), box("ANUS_EXPOSED", 0.3)],
    ]
    detector = Detector(boxes)
    monkeypatch.setattr("pipelines.scores.scorers.nudenet.new_detector", lambda: detector)
    broken = Image.fromarray(np.zeros((8, 8), dtype=np.float32))
    red = Image.new("RGB", (6, 4), (255, 0, 9))
    covered, unreadable, exposed = new_scorer("nudenet").score([red, broken, red], [None] * 3)
    assert (covered.value, covered.components["highest"]) == (0.0, 0.0)
    assert isinstance(unreadable, Failure)
    assert exposed == Score(
        1.0,
        {
            "anus_exposed": 0.3, "buttocks_exposed": 0.7, "female_breast_exposed": 0.0,
            "female_genitalia_exposed": 0.0, "male_genitalia_exposed": 0.0, "highest": 0.7,
        },
    )  # fmt: skip
    assert [each.shape for each in detector.shown] == [(4, 6, 3)] * 2
    assert detector.shown[0][0, 0].tolist() == [9, 0, 255], "blue first, as OpenCV reads files"


@pytest.mark.parametrize("name", EXPOSED)
def test_each_of_the_five_classes_counts_from_its_threshold_on(name: str) -> None:
    assert [reduced([box(name, score)]).value for score in (0.1999, 0.2, 0.9)] == [0.0, 1.0, 1.0]
    assert reduced([]).value == 0.0
