"""Published weights to safetensors with the names of transformers, without ever running code of a pickle."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.dataset.errors import ModelError
from pipelines.dataset.values import JsonObject

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

VERSION = 1
"""Raise it when a conversion would give other tensors."""
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts put a state dict."""
HEAD_WIDTHS = {1280: 80}
"""Width of a vision head by the model's width, where it is not 64."""
CLIP_LAYER = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
CLIP_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
CLIP_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
BLIP_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
BLIP_LAYER = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "mlp.": "mlp.",
}


def read_weights(file: Path) -> "Weights":
    """Read a state dict from a safetensors file, or from a pickle of tensors alone.

    Raises:
        ModelError: The file is damaged, or holds anything else than tensors: it would have to run code.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        found: Any = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle, zip, torch and safetensors have no common tree
        raise ModelError(
            f"{file} is refused: it cannot be read as plain tensors ({str(error).strip().splitlines()[0][:200]})",
            "mapo never runs code from a weights file; give a state dict or a safetensors file from the publisher",
        ) from error
    found = found if isinstance(found, Mapping) else {}
    found = next((found[each] for each in WRAPPERS if isinstance(found.get(each), Mapping)), found)
    tensors = {str(name).removeprefix("module."): each for name, each in found.items() if torch.is_tensor(each)}
    if not tensors:
        raise ModelError(f"{file} has no tensors by name", "give a state dict or a safetensors file")
    return tensors


def check_precision(weights: "Weights", file: Path) -> None:
    """Check that no tensor was rounded to bfloat16.

    Raises:
        ModelError: One was.
    """
    rounded = [name for name, tensor in weights.items() if str(tensor.dtype) == "torch.bfloat16"]
    if rounded:
        raise ModelError(
            f"{len(rounded)} tensors of {file} are bfloat16, such as {rounded[0]}: scores would move by 4 % of their "
            "standard deviation, which flips close pairs",
            "give the published weights in float32 or float16",
        )


def convert(name: str, weights: "Weights", file: Path) -> "tuple[Weights, JsonObject | None]":
    """Rename and reshape weights.

    Args:
        name: The conversion, as in the table of parts.
        weights: The published tensors by name.
        file: The file that they come from, for messages.

    Returns:
        The tensors, contiguous and with memory of their own, and the configuration of the model; None if it has a
        published one, or needs none.

    Raises:
        ModelError: A tensor is missing, or bfloat16.
    """
    check_precision(weights, file)
    try:
        tensors, config = CONVERSIONS[name](weights)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{file} does not hold the weights that the conversion {name} expects: {error}",
            "is it the file of this scorer? compare its size with the publisher's",
        ) from error
    return {each: tensor.detach().clone().contiguous() for each, tensor in tensors.items()}, config


def collapse_affine(weights: "Weights", prefix: str = "") -> "Weights":
    """Multiply out linear layers without activations between them, in float64: weight (1, D) and bias (1).

    The five layers of the aesthetic head and of ImageReward are one affine map; dropout does nothing at evaluation.
    """
    import torch

    if f"{prefix}weight" in weights and f"{prefix}bias" in weights:
        return {name: weights[f"{prefix}{name}"].float() for name in ("weight", "bias")}
    found = (re.fullmatch(re.escape(prefix) + r"layers\.(\d+)\.weight", name) for name in weights)
    places = sorted(int(match[1]) for match in found if match)
    if not places:
        raise KeyError(f"{prefix}layers.0.weight")
    first = weights[f"{prefix}layers.{places[0]}.weight"]
    weight, bias = torch.eye(first.shape[1], dtype=torch.float64), torch.zeros(first.shape[1], dtype=torch.float64)
    for place in places:
        layer, shift = (weights[f"{prefix}layers.{place}.{each}"].double() for each in ("weight", "bias"))
        weight, bias = layer @ weight, layer @ bias + shift
    return {"weight": weight.float(), "bias": bias.float()}


def _affine(weights: "Weights") -> "tuple[Weights, None]":
    return collapse_affine(weights), None


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    """Return the name with its known beginning replaced; None if no beginning is known."""
    return next((new + name.removeprefix(old) for old, new in table.items() if name.startswith(old)), None)


def _clip_tower(weights: "Weights", prefix: str, top: Mapping[str, str], new_prefix: str) -> "Weights":
    """Return one tower of a model in OpenAI's and open_clip's names under the names of transformers."""
    found = {f"{new_prefix}{new}": weights[f"{prefix}{old}"] for old, new in top.items()}
    blocks = f"{prefix}transformer.resblocks."
    for name, tensor in weights.items():
        if not name.startswith(blocks):
            continue
        place, _, inner = name.removeprefix(blocks).partition(".")
        layer = f"{new_prefix}encoder.layers.{place}."
        if inner.startswith("attn.in_proj_"):
            kind = inner.removeprefix("attn.in_proj_")
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{layer}self_attn.{part}_proj.{kind}"] = piece
        elif (new := _renamed(inner, CLIP_LAYER)) is not None:
            found[layer + new] = tensor
        else:
            raise KeyError(f"{name} has no counterpart in transformers")
    return found


def _layers(weights: "Weights", prefix: str) -> int:
    """Return the number of numbered layers under a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def _clip_vision_config(weights: "Weights", prefix: str, hidden_act: str) -> JsonObject:
    patch_CCHW, positions = weights[f"{prefix}conv1.weight"], weights[f"{prefix}positional_embedding"]
    width, _, patch_size, _ = patch_CCHW.shape
    return {
        "hidden_size": width,
        "intermediate_size": weights[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _layers(weights, f"{prefix}transformer.resblocks."),
        "num_attention_heads": width // HEAD_WIDTHS.get(width, 64),
        "image_size": patch_size * round((positions.shape[0] - 1) ** 0.5),
        "patch_size": patch_size,
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
    }


def _open_clip(weights: "Weights") -> "tuple[Weights, JsonObject]":
    """Convert an open_clip model whose activation is plain GELU, as LAION's ViT-H-14 and thus HPSv2 have."""
    found = _clip_tower(weights, "visual.", CLIP_VISION, "vision_model.")
    found |= _clip_tower(weights, "", CLIP_TEXT, "text_model.")
    found["visual_projection.weight"] = weights["visual.proj"].T
    found["text_projection.weight"] = weights["text_projection"].T
    found["logit_scale"] = weights["logit_scale"].reshape(())
    vocab_size, width = weights["token_embedding.weight"].shape
    text = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _layers(weights, "transformer.resblocks."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": weights["positional_embedding"].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
    }
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": weights["text_projection"].shape[1],
        "text_config": text,
        "vision_config": _clip_vision_config(weights, "visual.", "gelu"),
    }
    return found, config


def _csd(weights: "Weights") -> "tuple[Weights, JsonObject]":
    """Convert CSD: OpenAI's ViT-L/14 (QuickGELU) without its projection, and the projection to style."""
    found = _clip_tower(weights, "backbone.", CLIP_VISION, "")
    found["style_projection"] = weights["last_layer_style"]
    return found, {"model_type": "clip_vision_model", **_clip_vision_config(weights, "backbone.", "quick_gelu")}


def _imagereward(weights: "Weights") -> "tuple[Weights, JsonObject]":
    """Convert ImageReward: BLIP's vision tower, its text tower with cross attention, and the head as one affine map."""
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    found = {f"head.{name}": tensor for name, tensor in collapse_affine(weights, "mlp.").items()}
    for name, tensor in weights.items():
        inner = name.removeprefix(vision)
        if inner.startswith("blocks."):
            _, place, inside = inner.split(".", 2)
            found[f"vision_model.encoder.layers.{place}.{_renamed(inside, BLIP_LAYER)}"] = tensor
        elif name.startswith(vision):
            found[f"vision_model.{_renamed(inner, BLIP_VISION)}"] = tensor
        elif name.startswith(text) and not name.endswith("position_ids"):
            found[f"text_model.{name.removeprefix(text)}"] = tensor
    patch_CCHW, positions = weights[f"{vision}patch_embed.proj.weight"], weights[f"{vision}pos_embed"]
    words = weights[f"{text}embeddings.word_embeddings.weight"]
    width, patch_size = patch_CCHW.shape[0], patch_CCHW.shape[2]
    vision_config = {
        "hidden_size": width,
        "intermediate_size": weights[f"{vision}blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _layers(weights, f"{vision}blocks."),
        "num_attention_heads": max(1, width // 64),
        "image_size": patch_size * round((positions.shape[1] - 1) ** 0.5),
        "patch_size": patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    text_config = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "encoder_hidden_size": width,
        "intermediate_size": weights[f"{text}encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _layers(weights, f"{text}encoder.layer."),
        "num_attention_heads": max(1, words.shape[1] // 64),
        "max_position_embeddings": weights[f"{text}embeddings.position_embeddings.weight"].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "is_decoder": True,
    }
    return found, {"vision_config": vision_config, "text_config": text_config}


def _vgg(weights: "Weights") -> "tuple[Weights, None]":
    """Keep the convolutions of torchvision's VGG, and leave its classifier out."""
    found = {name: tensor for name, tensor in weights.items() if name.startswith("features.")}
    if not found:
        raise KeyError("features.0.weight")
    return found, None


def _copy(weights: "Weights") -> "tuple[Weights, None]":
    return dict(weights), None


CONVERSIONS: "dict[str, Callable[[Weights], tuple[Weights, JsonObject | None]]]" = {
    "copy": _copy,
    "open_clip": _open_clip,
    "imagereward": _imagereward,
    "affine": _affine,
    "csd": _csd,
    "vgg": _vgg,
}
