"""BLIP-VQA: the official model's answers, never padded, the same in any batch."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compbench_vqa import SHOWN, STRIDE, VQA_QUESTIONS, VQA_SIZES
from PIL import Image
from safetensors.torch import load_file
from scorer_twins import formula_image, formula_weights, write_bert_tokenizer, write_part

from pipelines.dataset.errors import ModelError
from pipelines.scores.conversions.convert import convert
from pipelines.scores.scorers import Failure, Score, new_scorer
from pipelines.scores.scorers.blip_vqa import NO_QUESTION, NO_TEXTS, BlipVqa, clean_question, product
from pipelines.scores.scorers.images import Picture, prepare
from pipelines.scores.weights import fetch

DATA = Path(__file__).parents[2] / "data" / "compbench" / "recorded.json"
PART = "blip-vqa-capfilt-large"
PROMPT = "a prompt"


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DATA.read_text())["vqa"]
    return found


@pytest.fixture(scope="module")
def weights(official: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of the recorded model, in its own names."""
    return formula_weights(official["shapes"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, torch.Tensor]) -> Path:
    """The tiny twin, converted, and its tokenizer."""
    root = tmp_path_factory.mktemp("vqa")
    state, config = convert("blip_vqa", weights, Path("twin"))
    write_part(root / PART, state, config)
    write_bert_tokenizer(root)
    return root


@pytest.fixture(scope="module")
def scorer(root: Path) -> BlipVqa:
    scorer = BlipVqa()
    scorer.load(root, "cpu")
    return scorer


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [formula_image(*size, place) for place, size in enumerate(VQA_SIZES)]


def shares(result: Any) -> list[float]:
    assert isinstance(result, Score)
    return list(result.components.values())


def ask(scorer: BlipVqa, pictures: list[Image.Image], questions: list[Any]) -> list[Any]:
    return scorer.score(pictures, [PROMPT] * len(pictures), questions=questions)


@pytest.fixture(scope="module")
def states(scorer: BlipVqa, pictures: list[Image.Image]) -> torch.Tensor:
    return scorer._images.embed([Picture(each) for each in pictures])


ROWS = [row for row, asked in enumerate(VQA_QUESTIONS) for _ in asked]
"""The image of each recorded question."""


def test_the_answers_are_those_of_the_official_model(
    scorer: BlipVqa, pictures: list[Image.Image], states: torch.Tensor, official: dict[str, Any]
) -> None:
    found = ask(scorer, pictures, VQA_QUESTIONS)
    assert [f"{share:.4f}" for each in found for share in shares(each)] == official["printed"]
    asked = [clean_question(each) for asked in VQA_QUESTIONS for each in asked]
    assert asked == official["questions"]
    assert scorer._head(states, ROWS, asked) == pytest.approx(official["shares"], abs=1e-6)
    pixels = torch.tensor(official["pixels"])
    torch.testing.assert_close(prepare(pictures, "blip-480")[SHOWN][:, ::STRIDE, ::STRIDE], pixels, rtol=0, atol=1e-5)


def test_a_score_is_the_product_of_its_rounded_answers(
    scorer: BlipVqa, pictures: list[Image.Image], official: dict[str, Any]
) -> None:
    for each in ask(scorer, pictures, VQA_QUESTIONS):
        assert each.value == pytest.approx(math.prod(shares(each)), abs=5.1e-5)
        assert each.value == float(f"{each.value:.4f}")
    assert product([0.5, 0.25]) == Score(0.125, {"question_0": 0.5, "question_1": 0.25})
    assert product([0.0105, 0.5]).value == 0.0052, "in float32 the product lies below 0.00525"


def test_answers_equal_those_of_transformers_own_model_in_float64(
    scorer: BlipVqa, root: Path, pictures: list[Image.Image], states: torch.Tensor, official: dict[str, Any]
) -> None:
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering

    config = json.loads((root / PART / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = False
    model = BlipForQuestionAnswering(BlipConfig(**config)).eval()
    model.load_state_dict(load_file(root / PART / "model.safetensors"))
    model.double()
    tokenizer = BertTokenizer.from_pretrained(root / "bert-tokenizer")
    found = []
    with torch.no_grad():
        for row, question in zip(ROWS, official["questions"], strict=True):
            seen = model.vision_model(prepare([pictures[row]], "blip-480").double()).last_hidden_state
            ids = tokenizer(question, truncation=True, max_length=35, return_tensors="pt").input_ids
            ids[0, 0] = 30523
            asked = model.text_encoder(ids, encoder_hidden_states=seen).last_hidden_state
            logits = model.text_decoder(torch.tensor([[30522]]), encoder_hidden_states=asked).logits[0, 0]
            both = logits[[2748, 2053]].exp()
            found.append(float(both[0] / both.sum()))
    assert scorer._head(states, ROWS, official["questions"]) == pytest.approx(found, abs=1e-6)


def test_a_batch_of_equal_lengths_equals_one_at_a_time(scorer: BlipVqa, states: torch.Tensor) -> None:
    rows = [place % len(states) for place in range(40)]
    questions = [f"a {word} {'red ' * (place % 3)}house?" for place, word in enumerate(["cat", "dog"] * 20)]
    together = scorer._head(states, rows, questions)
    alone = [scorer._head(states[[row]], [0], [each])[0] for row, each in zip(rows, questions, strict=True)]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len({round(each, 4) for each in together}) > 10


def test_padding_would_change_the_answers(scorer: BlipVqa, states: torch.Tensor, official: dict[str, Any]) -> None:
    """The trap: transformers' decoder attends to padding whatever the mask says."""
    head: Any = scorer._head
    ids_BS, mask_BS, _ = head._tokens(["a red cat?"])
    ids_BS[:, 0] = 30523
    length = int(mask_BS.sum())
    whole = head.answer(ids_BS[:, :length], states[:1]).item()
    assert whole == pytest.approx(official["shares"][0], abs=1e-6)
    with torch.no_grad():
        asked = head._encoder(ids_BS, attention_mask=mask_BS, encoder_hidden_states=states[:1]).last_hidden_state
        logits = head._decoder(
            torch.tensor([[30522]]), encoder_hidden_states=asked, encoder_attention_mask=mask_BS
        ).logits[0, 0]
    padded = (logits[2748] - logits[2053]).sigmoid().item()
    assert abs(padded - whole) > 1e-3


def test_rows_that_cannot_be_asked_about_fail_and_change_no_other(scorer: BlipVqa, pictures: list[Image.Image]) -> None:
    expected = ask(scorer, pictures[:1], VQA_QUESTIONS[:1])
    broken = Image.new("F", (8, 8))
    found = scorer.score(
        [pictures[1], broken, pictures[0], pictures[2], pictures[3]],
        [PROMPT, PROMPT, PROMPT, None, PROMPT],
        questions=[[], ["a cat?"], VQA_QUESTIONS[0], ["a cat?"], [3]],
    )
    assert found[2] == expected[0]
    assert [found[0], found[4]] == [Failure(NO_QUESTION), Failure(NO_TEXTS)]
    assert isinstance(found[1], Failure)
    assert isinstance(found[3], Failure)
    assert ask(scorer, pictures[:1], [None]) == [Failure(NO_QUESTION)]


def test_the_published_file_converts_without_running_code(
    tmp_path: Path, weights: dict[str, torch.Tensor], pictures: list[Image.Image], scorer: BlipVqa
) -> None:
    given = tmp_path / "given"
    write_bert_tokenizer(given).joinpath("vocab.txt").rename(given / "vocab.txt")
    beside = {"text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    torch.save({"model": weights | beside}, given / "model_base_vqa_capfilt_large.pth")
    fetched = new_scorer("blip-vqa")
    fetched.load(fetch("blip-vqa", given, tmp_path / "cache"), "cpu")
    assert ask(fetched, pictures, VQA_QUESTIONS) == ask(scorer, pictures, VQA_QUESTIONS)


def wider(state: dict[str, torch.Tensor]) -> None:
    name = "visual_encoder.patch_embed.proj.weight"
    state[name] = torch.zeros(128, *state[name].shape[1:])


def headless(state: dict[str, torch.Tensor]) -> None:
    state["visual_encoder.head.weight"] = torch.zeros(1)


@pytest.mark.parametrize(("change", "message"), [(wider, "images are 128 wide"), (headless, "no counterpart")])
def test_other_weights_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, weights: dict[str, torch.Tensor]
) -> None:
    state = dict(weights)
    change(state)
    with pytest.raises(ModelError, match=message):
        convert("blip_vqa", state, Path("twin"))


def test_the_hubs_conversion_for_384_pixels_is_refused(root: Path, tmp_path: Path) -> None:
    config = json.loads((root / PART / "config.json").read_text())
    config["vision_config"]["image_size"] = 384
    write_part(tmp_path / PART, load_file(root / PART / "model.safetensors"), config)
    write_bert_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="for images of 384 pixels, but T2I-CompBench's BLIP sees 480"):
        BlipVqa().load(tmp_path, "cpu")
