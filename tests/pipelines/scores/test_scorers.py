"""Scorers: one result for each image, never a number for a failure, the same alone, together and in any batch."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scorer_twins import MIXED_PROMPTS, clip_model, formula_image, value_of, write_part

from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.scores.scorers import (
    Failure,
    needs_of,
    new_scorer,
    score_together,
    scorer_names,
)
from pipelines.scores.scorers.images import prepare
from pipelines.scores.scorers.scorer import Scorer

WITH_WEIGHTS = [name for name in scorer_names() if new_scorer(name).parts]


def test_the_registry_is_light() -> None:
    code = (
        "import sys; from pipelines.scores.scorers import new_scorer, scorer_names\n"
        "import pipelines.scores.weights\n"
        "[new_scorer(name).scale for name in scorer_names()]\n"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("name", scorer_names())
def test_every_scorer_says_what_it_is(name: str) -> None:
    scorer = new_scorer(name)
    assert isinstance(scorer, Scorer)
    assert scorer.name == name
    assert scorer.description
    assert scorer.licence not in ("", "AGPL-3.0", "CC-BY-NC-4.0")
    assert needs_of(scorer)[0] == "image"


@pytest.mark.parametrize("name", ["no-such-scorer", "json:NoClass", "no.module:Class"])
def test_an_unknown_scorer_is_one_message(name: str) -> None:
    with pytest.raises(ConfigError, match=name.split(":")[0]):
        new_scorer(name)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_one_image_scores_as_in_a_batch(
    name: str, all_loaded: list[Any], images: list[Image.Image], extra: dict[str, Any]
) -> None:
    scorer = next(each for each in all_loaded if each.name == name)
    rows = [place % len(images) for place in range(33)]
    lists = {each: extra[each] for each in scorer.needs if each in extra}
    batch = scorer.score(
        [images[row] for row in rows], [MIXED_PROMPTS[row] for row in rows],
        **{each: [found[row] for row in rows] for each, found in lists.items()},
    )  # fmt: skip
    scale = 100 if scorer.scale.startswith("100") else 1
    for row in (1, 3, 6):
        single = scorer.score(
            [images[row]], [MIXED_PROMPTS[row]], **{each: [found[row]] for each, found in lists.items()}
        )
        assert value_of(single[0]) == pytest.approx(value_of(batch[row]), abs=1e-5 * scale, rel=1e-5)


def test_weights_that_give_nan_fail(twins: Path, tmp_path: Path, images: list[Image.Image]) -> None:
    model = clip_model("quick_gelu")
    model.visual_projection.weight.data.fill_(math.nan)
    for part in ("clip-l14-openai", "clip-b32-openai"):
        write_part(tmp_path / part, model.state_dict(), model.config.to_dict())
    for part in ("aesthetic-sac-logos-ava1", "clip-tokenizer"):
        shutil.copytree(twins / part, tmp_path / part)
    for name in ("clipscore", "aesthetic", "clip-t"):
        scorer = new_scorer(name)
        scorer.load(tmp_path, "cpu")
        assert scorer.score(images[:1], ["a cat"]) == [Failure("the score is not a finite number")]


@pytest.mark.parametrize("name", ["pickscore", "clipscore-h14", "clip-t", "hpsv2"])
def test_identical_embeddings_have_cosine_one(
    name: str, twins: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = new_scorer(name)
    scorer.load(twins, "cpu")
    same_BD = torch.randn(2, 32)
    monkeypatch.setattr(type(scorer._images), "forward", lambda *_: same_BD * 3)
    monkeypatch.setattr(type(scorer._texts), "forward", lambda *_: (same_BD, [0.0, 0.0]))
    found = [value_of(each) for each in scorer.score(images[:2], ["a", "b"])]
    assert found == pytest.approx([1.0 if name == "clip-t" else 100.0] * 2, rel=1e-6)


@pytest.mark.parametrize("name", ["dino", "clip-i", "csd", "gram"])
def test_an_image_is_like_itself(name: str, all_loaded: list[Any], images: list[Image.Image]) -> None:
    scorer = next(each for each in all_loaded if each.name == name)
    (found,) = scorer.score([images[0]], [None], references=[[images[0]]])
    assert value_of(found) == pytest.approx(0.0 if name == "gram" else 1.0, abs=1e-5)


def test_a_head_of_zeros_gives_imagerewards_constant(twins: Path, tmp_path: Path, images: list[Image.Image]) -> None:
    state = load_file(twins / "imagereward-v1.0" / "model.safetensors")
    state |= {name: torch.zeros_like(state[name]) for name in ("head.weight", "head.bias")}
    write_part(tmp_path / "imagereward-v1.0", state, json.loads((twins / "imagereward-v1.0/config.json").read_text()))
    shutil.copytree(twins / "bert-tokenizer", tmp_path / "bert-tokenizer")
    scorer = new_scorer("imagereward")
    scorer.load(tmp_path, "cpu")
    assert value_of(scorer.score(images[:1], ["a cat"])[0]) == pytest.approx(-0.1618, abs=1e-4)


def test_pickscore_equals_transformers_own_processor_and_model(twins: Path, images: list[Image.Image]) -> None:
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(twins / "pickscore-v1", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(twins / "clip-tokenizer")
    pixels_BCHW = CLIPImageProcessorPil()(images=images, return_tensors="pt").pixel_values
    texts = tokenizer(MIXED_PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        outputs = model(pixel_values=pixels_BCHW, **texts)
    torch.testing.assert_close(prepare(images, "clip-224-hf"), pixels_BCHW, rtol=0, atol=1e-5)
    scorer = new_scorer("pickscore")
    scorer.load(twins, "cpu")
    found = scorer.score(images, MIXED_PROMPTS)
    logits = torch.diagonal(outputs.logits_per_image).tolist()
    assert [each.components["logit"] for each in found] == pytest.approx(logits, abs=1e-4)
    assert [each.value for each in found] == pytest.approx(logits, abs=1e-3)
    assert found[3].components["cut_token_ratio"] == pytest.approx(25 / 100)


def test_another_activation_than_the_weights_were_trained_with_is_refused(twins: Path, tmp_path: Path) -> None:
    for part in ("clip-l14-openai", "clip-tokenizer"):
        shutil.copytree(twins / part, tmp_path / part)
    file = tmp_path / "clip-l14-openai" / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="hidden_act gelu, but these weights were trained with quick_gelu"):
        new_scorer("clipscore").load(tmp_path, "cpu")


def test_bfloat16_is_refused(twins: Path, tmp_path: Path, images: list[Image.Image]) -> None:
    state = load_file(twins / "dino-vits16/model.safetensors")
    config = json.loads((twins / "dino-vits16/config.json").read_text())
    write_part(tmp_path / "rounded", {name: each.bfloat16() for name, each in state.items()}, config)
    with pytest.raises(ModelError, match="bfloat16"):
        new_scorer("dino").load(tmp_path / "rounded", "cpu")
    write_part(tmp_path / "own", state | {"layernorm.bias": state["layernorm.bias"] + 1}, config)  # shared with nobody
    scorer = new_scorer("dino")
    scorer.load(tmp_path / "own", "cpu")
    scorer._images.model.bfloat16()
    with pytest.raises(ModelError, match="float32 alone"):
        scorer.score(images[:1], [None], references=[[images[0]]])


def test_autocast_of_the_caller_changes_nothing(all_loaded: list[Any], images: list[Image.Image]) -> None:
    scorers = [each for each in all_loaded if each.name in ("aesthetic", "imagereward", "hpsv2", "pickscore")]
    plain = score_together(scorers, images[:3], ["a cat"] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert score_together(scorers, images[:3], ["a cat"] * 3) == plain


def test_scoring_before_loading_is_one_message(images: list[Image.Image]) -> None:
    with pytest.raises(ModelError, match="pickscore has no weights yet"):
        new_scorer("pickscore").score(images[:1], ["a cat"])


def test_a_fingerprint_follows_from_weights_and_preprocessing_alone(twins: Path, tmp_path: Path) -> None:
    prints = {name: json.dumps(new_scorer(name).fingerprint(twins)) for name in WITH_WEIGHTS}
    assert len(set(prints.values())) == len(prints)
    shutil.copytree(twins, tmp_path / "copied")
    assert json.dumps(new_scorer("hpsv2").fingerprint(tmp_path / "copied")) == prints["hpsv2"]
    vocab = tmp_path / "copied" / "clip-tokenizer" / "vocab.json"
    vocab.write_bytes(vocab.read_bytes() + b" ")
    assert json.dumps(new_scorer("hpsv2").fingerprint(tmp_path / "copied")) != prints["hpsv2"]


def test_configurations_that_old_versions_of_transformers_wrote_are_read(twins: Path, tmp_path: Path) -> None:
    """They repeat every default of their time, and the size of the shared space as a default that is wrong."""
    old = {
        "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
        "chunk_size_feed_forward": 0, "do_sample": False, "early_stopping": False, "finetuning_task": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "is_decoder": False,
        "max_length": 20, "num_beams": 1, "output_attentions": False, "prefix": None, "pruned_heads": {}, "top_k": 50,
        "torch_dtype": None, "torchscript": False, "transformers_version": "4.16.0.dev0", "typical_p": 1.0,
        "use_bfloat16": False, "return_dict": True, "attention_dropout": 0.0, "dropout": 0.0, "initializer_factor": 1.0,
        "projection_dim": 512,
    }  # fmt: skip
    shutil.copytree(twins, tmp_path / "old")
    file = tmp_path / "old" / "clip-l14-openai" / "config.json"
    config = json.loads(file.read_text())
    for tower, ids in (
        ("text_config", {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}),
        ("vision_config", {}),
    ):
        config[tower] |= old | ids
    file.write_text(json.dumps(config | {"torch_dtype": "float32", "transformers_version": None}))
    found = []
    for root in (twins, tmp_path / "old"):
        scorer = new_scorer("clipscore")
        scorer.load(root, "cpu")
        found.append(scorer.score([formula_image(224, 224)] * 2, ["a cat", "dog " * 100]))
    assert found[0] == found[1]
