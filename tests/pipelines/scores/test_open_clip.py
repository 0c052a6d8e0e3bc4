"""CLIP scorers against open_clip, whose tiny model has the same weights: model, transform and tokenizer are its own."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scorer_twins import fill, formula_image, write_clip_tokenizer, write_part

from pipelines.scores.conversions.convert import convert
from pipelines.scores.scorers import new_scorer
from pipelines.scores.scorers.cosine import CosineScorer

open_clip = pytest.importorskip("open_clip")
TOWER = {"width": 64, "layers": 2}
PROMPTS = ["a red cat", "The House of CATS, 4k!", "dog " * 100, "a photo"]
SIZES = [(224, 224), (320, 224), (256, 512), (1024, 1024)]
"""Crops of an even number of pixels, where torchvision and transformers agree."""


def twin(*, quick_gelu: bool) -> Any:
    model = open_clip.CLIP(
        32,
        {**TOWER, "image_size": 224, "patch_size": 32, "head_width": 64},
        {**TOWER, "heads": 1, "vocab_size": 49408, "context_length": 77},
        quick_gelu=quick_gelu,
    ).eval()
    fill(model)
    model.logit_scale.data.fill_(math.log(100))
    return model


@torch.no_grad()
def official_cosines(model: Any, images: list[Image.Image]) -> list[float]:
    transform = open_clip.image_transform(224, is_train=False)
    images_BD = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
    texts_BD = model.encode_text(open_clip.SimpleTokenizer()(PROMPTS), normalize=True)
    found: list[float] = (images_BD * texts_BD).sum(dim=1).tolist()
    return found


def write_twin(root: Path, part: str, model: Any, hidden_act: str) -> None:
    state, config = convert("open_clip", dict(model.state_dict()), Path("twin.pt"))
    assert config is not None
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = hidden_act
    write_part(root / part, state, config)


@pytest.mark.parametrize(
    ("name", "scale", "quick_gelu"), [("pickscore", 100, False), ("clipscore-h14", 100, False), ("clip-t", 1, True)]
)
def test_scores_equal_open_clip(tmp_path: Path, name: str, scale: float, quick_gelu: bool) -> None:
    model, scorer = twin(quick_gelu=quick_gelu), new_scorer(name)
    assert isinstance(scorer, CosineScorer)
    write_clip_tokenizer(tmp_path)
    write_twin(tmp_path, scorer.parts[0], model, scorer.hidden_act)
    images = [formula_image(*size, seed) for seed, size in enumerate(SIZES)]
    scorer.load(tmp_path, "cpu")
    cosines = [score.components.get("cosine", score.value / scale) for score in scorer.score(images, PROMPTS)]  # type: ignore[union-attr]
    assert cosines == pytest.approx(official_cosines(model, images), abs=1e-6)


def test_the_wrong_activation_gives_other_scores(tmp_path: Path) -> None:
    """OpenAI's weights under plain GELU: the trap that open_clip 3 only warns of."""
    right, scorer = twin(quick_gelu=True), new_scorer("clip-t")
    write_clip_tokenizer(tmp_path)
    write_twin(tmp_path, scorer.parts[0], right, "quick_gelu")
    images = [formula_image(*size, seed) for seed, size in enumerate(SIZES)]
    scorer.load(tmp_path, "cpu")
    found = [score.value for score in scorer.score(images, PROMPTS)]
    wrong = official_cosines(twin(quick_gelu=False), images)
    assert max(abs(a - b) for a, b in zip(found, wrong, strict=True)) > 1e-3


def test_hps_converts_at_its_real_size() -> None:
    """Names, shapes and heads of ViT-H-14; the tensors have no memory."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        official = open_clip.CLIP(
            1024,
            {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
            {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
        )
        state, config = convert("open_clip", dict(official.state_dict()), Path("HPS_v2.1_compressed.pt"))
        assert config is not None
        ours = CLIPModel(CLIPConfig(**{name: each for name, each in config.items() if name != "architectures"}))
    assert {name: each.shape for name, each in ours.state_dict().items()} == {
        name: each.shape for name, each in state.items()
    }
    assert sum(each.numel() for each in state.values()) == 986_109_441
    assert config["vision_config"]["num_attention_heads"] == config["text_config"]["num_attention_heads"] == 16
    assert ours.config.vision_config.hidden_act == ours.config.text_config.hidden_act == "gelu"


def test_image_scores_equal_open_clip_with_quick_gelu(tmp_path: Path) -> None:
    """The aesthetic head and CLIP-I stand on OpenAI's towers."""
    model = twin(quick_gelu=True)
    for part in ("clip-l14-openai", "clip-b32-openai"):
        write_twin(tmp_path, part, model, "quick_gelu")
    weight, bias = torch.linspace(-1, 1, 32)[None], torch.tensor([5.0])
    write_part(tmp_path / "aesthetic-sac-logos-ava1", {"weight": weight, "bias": bias})
    images = [formula_image(*size, seed) for seed, size in enumerate(SIZES)]
    transform = open_clip.image_transform(224, is_train=False)
    with torch.no_grad():
        units_BD = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
    expected = {
        "aesthetic": (units_BD @ weight[0] + bias).tolist(),
        "clip-i": (units_BD @ units_BD[:2].T).mean(dim=1).tolist(),
    }
    for name, values in expected.items():
        scorer = new_scorer(name)
        scorer.load(tmp_path, "cpu")
        extra = {"references": [images[:2]] * 4} if "references" in scorer.needs else {}
        assert scorer.score(images, [None] * 4, **extra) == pytest.approx(values, abs=1e-5)
