"""Checks that the text encoders and tokenizers of a base exist, belong to its family, and fit each other."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import CHOOSE_A_BASE, SDXL, Family, read_config, read_family, weight_files
from pipelines.dataset.safetensors_header import tensor_shapes

DEFAULTS = {"hidden_size": 512, "projection_dim": 512, "max_position_embeddings": 77, "vocab_size": 49408}
"""Defaults of transformers' `CLIPTextConfig`, for files that leave a key out."""
TOKENIZER = "CLIPTokenizer"  # and CLIPTokenizerFast
SHORTEST = 3  # tokens: both end marks and one of the prompt
SAVE_AGAIN = "the model folder is incomplete or damaged; fetch it again"


def check_text(
    folder: Path, index: Mapping[str, Any], family: Family, *, model: str, variant: str | None
) -> list[tuple[int, int]]:
    """Check the parts that embed prompts.

    Args:
        folder: The pipeline's folder.
        index: Its `model_index.json`.
        family: The family, which says what parts it must have.
        model: The base, for messages.
        variant: The variant of the weights.

    Returns:
        Hidden size and projection of each text encoder, in the family's order.

    Raises:
        ModelError: A part is missing, has another class, or does not fit its weights or its tokenizer.
    """
    configs = []
    for name, expected in family.text_encoders.items():
        found = (index.get(name) or (None, None))[1]
        if found != expected:
            lacks_first = found is None and family is SDXL and name == "text_encoder"
            raise ModelError(
                f"the {name} of {model} is {found}, not {expected}"
                + (": SDXL's refiner does not have it" if lacks_first else ""),
                CHOOSE_A_BASE,
            )
        configs.append(_encoder(folder / name, f"{name} of {model}", variant))
    _check_tokenizers(folder, index, family, configs, model)
    return [(config["hidden_size"], config["projection_dim"]) for config in configs]


def embedding_sizes(folder: Path) -> tuple[int, int]:
    """Return the numbers of a prompt's embedding per token, and of its pooled embedding (0 without one).

    Args:
        folder: The pipeline's folder.

    Raises:
        ModelError: It belongs to no family, or a part's configuration is missing.
    """
    family = read_family(folder)
    configs = [DEFAULTS | read_config(folder / name / "config.json") for name in family.text_encoders]
    return sum(each["hidden_size"] for each in configs), configs[-1]["projection_dim"] if family.has_pooled else 0


def _check_tokenizers(
    folder: Path, index: Mapping[str, Any], family: Family, configs: Sequence[dict[str, int]], model: str
) -> None:
    """Check that each tokenizer fits its encoder, and that all cut a prompt at the same length."""
    lengths = {}
    for name, (encoder, config) in zip(family.tokenizers, zip(family.text_encoders, configs, strict=True), strict=True):
        kind = (index.get(name) or (None, None))[1]
        if not str(kind).startswith(TOKENIZER):
            raise ModelError(f"the {name} of {model} is {kind}, not {TOKENIZER}", CHOOSE_A_BASE)
        lengths[name] = _tokenizer_length(folder / name, name, encoder, config, model)
    if len(set(lengths.values())) > 1:
        raise ModelError(
            f"the tokenizers of {model} differ in model_max_length: "
            + ", ".join(f"{name} has {length}" for name, length in lengths.items()),
            "set the same in both tokenizer_config.json; SDXL has 77",
        )


def _encoder(part: Path, title: str, variant: str | None) -> dict[str, int]:
    """Return the sizes of a text encoder, checked against its weights."""
    found = read_config(part / "config.json")
    config = {}
    for key, default in DEFAULTS.items():
        config[key] = value = found.get(key, default)
        if type(value) is not int or value < 1:
            raise ModelError(f"{key} of the {title} is {value}, not a whole number", SAVE_AGAIN)
    shapes = tensor_shapes(weight_files(part, "model", variant))
    expected = (
        ("token_embedding.weight", 0, "vocab_size"),
        ("token_embedding.weight", 1, "hidden_size"),
        ("position_embedding.weight", 0, "max_position_embeddings"),
        ("text_projection.weight", 0, "projection_dim"),
    )
    for end, axis, key in expected:
        for name, shape in shapes.items():
            if name.endswith(end) and shape[axis] != config[key]:
                raise ModelError(
                    f"{key} of the {title} is {config[key]}, but {name} has the shape {list(shape)}: "
                    "config.json does not belong to these weights",
                    "put back the config.json that belongs to the weights; or fetch the model again",
                )
    return config


def _tokenizer_length(part: Path, name: str, encoder: str, config: dict[str, int], model: str) -> int:
    """Return the number of tokens that a prompt is padded to, checked against the encoder's positions."""
    found = read_config(part / "tokenizer_config.json").get("model_max_length")
    most = config["max_position_embeddings"]
    if type(found) is not int or not SHORTEST <= found <= most:
        raise ModelError(
            f"{name}.model_max_length of {model} is {found}, but {encoder}.max_position_embeddings is {most}",
            f"set `model_max_length` in {name}/tokenizer_config.json to {most}",
        )
    if (size := _vocabulary_size(part)) > config["vocab_size"]:
        raise ModelError(
            f"{name} of {model} has {size} tokens, but {encoder}.vocab_size is {config['vocab_size']}: they belong to "
            "different models",
            "fetch the model again; or save tokenizer and text encoder of one model",
        )
    return found


def _vocabulary_size(part: Path) -> int:
    """Return the size of the vocabulary, from files in today's format or in that of 2022.

    Raises:
        ModelError: There are no such files.
    """
    try:
        if (file := part / "vocab.json").is_file():
            return len(json.loads(file.read_text(encoding="utf-8")))
        return len(json.loads((part / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read the vocabulary of {part}: {error}", SAVE_AGAIN) from error
