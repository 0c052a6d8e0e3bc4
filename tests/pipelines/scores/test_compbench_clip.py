"""CLIP's part of complex prompts: the cosine with the prompt without its adjectives, as the official script has it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compbench_cases import tagged
from PIL import Image
from scorer_twins import value_of

from pipelines.scores.scorers import Failure, new_scorer
from pipelines.scores.scorers.compbench_clip import NO_TEXT
from pipelines.scores.scorers.images import prepare
from pipelines.suites.compbench.words import without_adjectives

PROMPTS = ["The red cat was by the fluffy dog.", "A tall old house stands near the green hill.", "no adjective"]


@pytest.fixture(scope="module")
def loaded(twins: Path) -> dict[str, Any]:
    scorers = {name: new_scorer(name) for name in ("clip-t", "compbench-clip-complex")}
    for scorer in scorers.values():
        scorer.load(twins, "cpu")
    return scorers


def test_the_score_is_the_cosine_that_transformers_gives_for_the_text_without_adjectives(
    loaded: dict[str, Any], twins: Path, images: list[Image.Image]
) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    texts = [without_adjectives(tagged(prompt)) for prompt in PROMPTS]
    assert texts[0] == "The cat was by the dog ."
    model = CLIPModel.from_pretrained(twins / "clip-b32-openai", dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(twins / "clip-tokenizer")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(pixel_values=prepare(images[:3], "clip-224"), **tokens)
    expected = (outputs.image_embeds * outputs.text_embeds).sum(dim=-1).tolist()
    found = loaded["compbench-clip-complex"].score(images[:3], PROMPTS, without_adjectives=texts)
    assert [value_of(each) for each in found] == pytest.approx(expected, abs=1e-6)
    assert found == loaded["clip-t"].score(images[:3], texts), "clip-t of another text"
    assert [value_of(each) for each in loaded["clip-t"].score(images[:2], PROMPTS[:2])] != pytest.approx(expected[:2])


def test_a_prompt_without_such_a_text_is_a_failure(loaded: dict[str, Any], images: list[Image.Image]) -> None:
    scorer = loaded["compbench-clip-complex"]
    found = scorer.score(images[:2], PROMPTS[:2], without_adjectives=[None, "The cat"])
    assert found[0] == Failure(NO_TEXT)
    assert value_of(found[1]) == value_of(loaded["clip-t"].score(images[1:2], ["The cat"])[0])
    assert scorer.score(images[:1], PROMPTS[:1], without_adjectives=[None]) == [Failure(NO_TEXT)]
