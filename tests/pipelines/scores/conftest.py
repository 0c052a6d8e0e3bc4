"""Tiny twins of all scorers' weights, in one folder, and what the official code said of them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("torchvision") and torch.version.cuda is None:  # before transformers imports it
    import benchmarks.torchvision_stub  # noqa: F401

from geneval_twins import write_mask2former
from PIL import Image
from qwen_twins import write_qwen_twins
from safetensors.torch import load_file
from scorer_twins import (
    BERT_VOCAB,
    CLIP_TOKENIZER,
    SIZES,
    clip_model,
    formula_image,
    formula_tensor,
    formula_weights,
    hf_dino_names,
    write_bert_tokenizer,
    write_clip_tokenizer,
    write_part,
)

from pipelines.scores.conversions.convert import convert
from pipelines.scores.scorers import new_scorer, scorer_names

NOT_HERE = ("graded_vlm", "nudenet")
"""Scorers whose model is a server's, or a package that is not installed."""
DATA = Path(__file__).parents[2] / "data" / "scorers"


@pytest.fixture(scope="session")
def recorded() -> dict[str, Any]:
    """Shapes, token ids and scores of the official code."""
    found: dict[str, Any] = json.loads((DATA / "recorded.json").read_text())
    return found


@pytest.fixture(scope="session")
def recorded_tensors() -> dict[str, torch.Tensor]:
    """Prepared images and embeddings of the official code."""
    return dict(load_file(DATA / "recorded.safetensors"))


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    return [formula_image(*size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory, recorded: dict[str, Any]) -> Path:
    """A folder with one folder for each part."""
    if not CLIP_TOKENIZER.is_dir():
        pytest.skip("CLIP's tokenizer is not on this machine")
    root = tmp_path_factory.mktemp("twins")
    write_clip_tokenizer(root)
    write_bert_tokenizer(root)
    for hidden_act, parts in (
        ("gelu", ("pickscore-v1", "clip-h14-laion")),
        ("quick_gelu", ("clip-l14-openai", "clip-b32-openai")),
    ):
        model = clip_model(hidden_act)
        state = model.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(50)[None]}  # old files do
        for part in parts:
            write_part(root / part, state, model.config.to_dict())
    for part, name, kind in (
        ("hps-v2.0", "hps", "open_clip"),
        ("hps-v2.1", "hps", "open_clip"),
        ("imagereward-v1.0", "imagereward", "imagereward"),
        ("csd-vit-l", "csd", "csd"),
        ("vgg19-features", "vgg", "vgg"),
    ):
        state, config = convert(kind, formula_weights(recorded[name]["shapes"]), Path(name))
        write_part(root / part, state, config)
    vqa = json.loads((DATA.parent / "compbench" / "recorded.json").read_text())["vqa"]["shapes"]
    state, config = convert("blip_vqa", formula_weights(vqa), Path("blip-vqa"))
    write_part(root / "blip-vqa-capfilt-large", state, config)
    head = {"weight": formula_tensor("twin.head", (1, 32)), "bias": torch.tensor([5.0])}
    write_part(root / "aesthetic-sac-logos-ava1", head)
    config = {
        "model_type": "vit", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
        "intermediate_size": 256, "patch_size": 32, "image_size": 224, "layer_norm_eps": 1e-12, "qkv_bias": True,
    }  # fmt: skip
    write_part(root / "dino-vits16", hf_dino_names(formula_weights(recorded["dino"]["shapes"])), config)
    prompts = {"prompts": formula_tensor("twin.q16", (2, 32))}
    write_part(root / "q16-prompts", prompts)
    write_qwen_twins(root)
    write_mask2former(root)
    assert len(BERT_VOCAB) < 100
    return root


@pytest.fixture(scope="session")
def all_loaded(twins: Path) -> list[Any]:
    scorers = [new_scorer(name) for name in scorer_names() if name not in NOT_HERE]
    for scorer in scorers:
        scorer.load(twins if scorer.parts else None, "cpu")
    return scorers


@pytest.fixture(scope="session")
def extra(images: list[Image.Image]) -> dict[str, list[Any]]:
    dog = {"tag": "single_object", "exclude": [{"class": "dog", "count": 1}]}
    return {
        "metadata": [dog if place in (1, 3, 6) else None for place in range(len(images))],  # the detector is slow
        "references": [[images[0], images[1]]] * len(images),
        "questions": [["a red cat?", "the house?"]] * len(images),
        "siblings": [[other for other in images if other is not image] for image in images],
    }
