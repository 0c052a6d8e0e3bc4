"""Tiny twins of all scorers' weights, in one folder, and what the official code said of them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("torchvision") and torch.version.cuda is None:  # before transformers imports it
    import benchmarks.torchvision_stub  # noqa: F401

from all_twins import write_twins
from PIL import Image
from safetensors.torch import load_file
from scorer_twins import (
    BERT_VOCAB,
    CLIP_TOKENIZER,
    SIZES,
    formula_image,
)

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
    write_twins(root)
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
        "without_adjectives": [None if place == 2 else f"a cat and house {place % 3}" for place in range(len(images))],
        "siblings": [[other for other in images if other is not image] for image in images],
    }
