"""Scorers over one batch: the same results as alone, each trunk once, and a failure is never a number."""

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scorer_twins import MIXED_PROMPTS, value_of

from pipelines.scores.scorers import (
    Failure,
    Score,
    load_scorer,
    score_together,
)


def test_scorers_together_equal_each_alone_and_run_each_trunk_once(
    all_loaded: list[Any], images: list[Image.Image], extra: dict[str, Any]
) -> None:
    alone = {
        scorer.name: scorer.score(
            images, MIXED_PROMPTS, **{name: extra[name] for name in scorer.needs if name in extra}
        )
        for scorer in all_loaded
    }
    image_trunks = {id(scorer._images): scorer._images for scorer in all_loaded if hasattr(scorer, "_images")}
    text_trunks = {id(scorer._texts): scorer._texts for scorer in all_loaded if hasattr(scorer, "_texts")}
    before = {place: each.num_forwards for place, each in (image_trunks | text_trunks).items()}
    assert score_together(all_loaded, images, MIXED_PROMPTS, **extra) == alone
    by_name = {scorer.name: scorer for scorer in all_loaded}
    twice = {id(by_name[name]._images) for name in ("dino", "clip-i", "csd", "gram")}  # with references
    twice.add(id(by_name["compbench-clip-complex"]._texts))  # with other texts than prompts
    for place, each in (image_trunks | text_trunks).items():
        assert each.num_forwards - before[place] == (2 if place in twice else 1)
    assert by_name["aesthetic"]._images is by_name["clipscore"]._images is by_name["clipscore-l14"]._images
    assert by_name["clip-t"]._texts is by_name["clipscore-b32"]._texts is by_name["compbench-clip-complex"]._texts
    assert by_name["pickscore"]._texts is by_name["clipscore-h14"]._texts  # equal files of other names


def test_an_image_is_decoded_and_prepared_once(
    all_loaded: list[Any], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    monkeypatch.setattr(
        "pipelines.scores.scorers.images.to_rgb", lambda image: decoded.append(image) or image.convert("RGB")
    )
    names = ("aesthetic", "clipscore", "pickscore", "hpsv2", "saturation")
    score_together([each for each in all_loaded if each.name in names], images[:2], ["a cat"] * 2)
    assert len(decoded) == 2


def test_a_failure_is_never_a_number_and_stays_with_its_image(
    all_loaded: list[Any], images: list[Image.Image], extra: dict[str, Any]
) -> None:
    broken = Image.fromarray(np.zeros((8, 8), dtype=np.float32))
    mixed = [images[0], broken, images[1], images[2]]
    prompts = ["a cat", "a dog", None, "a house"]
    lists = {
        "references": [*extra["references"][:3], []],
        "questions": extra["questions"][:4],
        "siblings": [extra["siblings"][0], [images[0]], [broken], []],
        "metadata": [extra["metadata"][1]] * 3 + [None],
        "without_adjectives": ["a cat", "a dog", "a bird", None],
    }
    for scorer in all_loaded:
        passed = {name: lists[name] for name in scorer.needs if name in lists}
        results = scorer.score(mixed, prompts, **passed)
        assert [type(each) for each in results].count(Failure) == _expected_failures(scorer.needs)
        assert isinstance(results[1], Failure)
        assert "mode F" in results[1].reason
        if "prompt" in scorer.needs:
            assert results[2] == Failure("the image has no prompt")
        whole = scorer.score([images[0]], ["a cat"], **{name: [each[0]] for name, each in passed.items()})
        assert value_of(results[0]) == pytest.approx(value_of(whole[0]), abs=1e-3)


def _expected_failures(needs: tuple[str, ...]) -> int:
    one = sum(name in needs for name in ("references", "metadata", "without_adjectives"))
    lists = one + 2 * ("siblings" in needs)
    return 1 + ("prompt" in needs) + lists


def test_a_batch_of_failures_runs_no_model(all_loaded: list[Any]) -> None:
    broken = Image.fromarray(np.zeros((8, 8), dtype=np.float32))
    results = score_together(
        all_loaded,
        [broken],
        ["a cat"],
        references=[[broken]],
        siblings=[[broken]],
        metadata=[None],
        without_adjectives=[None],
        questions=[["a cat?"]],
    )
    assert all(isinstance(each[0], Failure) for each in results.values())


class Brightness:
    """A user's scorer of before: no `load`, no `needs`."""

    name = "brightness"
    description = "of all pixels"

    def score(self, images: Any, prompts: Any) -> list[float]:
        assert all(image.mode == "RGB" for image in images)
        return [float(np.asarray(image).mean()) / 255 if prompt != "broken" else math.nan
                for image, prompt in zip(images, prompts, strict=True)]  # fmt: skip


class Asking:
    """A user's scorer that needs questions."""

    name = "asking"
    needs = ("image", "prompt", "questions")

    def score(self, images: Any, prompts: Any, questions: Any) -> list[Any]:
        return [Score(float(len(each)), {"asked": 1.0}) for each in questions]


def test_scorers_of_users_work_as_before() -> None:
    load_scorer(Brightness(), None, "cpu")
    white, broken = Image.new("L", (8, 8), 255), Image.fromarray(np.zeros((8, 8), dtype=np.float32))
    found = score_together(
        [Brightness(), Asking()], [white, broken, white], ["a", "b", "broken"], questions=[[1, 2], [], [3]]
    )
    assert found["brightness"][0] == 1.0
    assert isinstance(found["brightness"][1], Failure)
    assert found["brightness"][2] == Failure("the score is not a finite number")
    assert found["asking"][2] == Score(1.0, {"asked": 1.0})
    with pytest.raises(ValueError, match="questions"):
        score_together([Asking()], [white], ["a"])
    with pytest.raises(ValueError, match="2 prompts"):
        score_together([Brightness()], [white], ["a", "b"])
