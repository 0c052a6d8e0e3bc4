"""CLIP in the names of OpenAI and open_clip: HPSv2 and CSD."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipelines.dataset.values import JsonObject
from pipelines.scores.conversions.names import num_layers, renamed

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

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
        else:
            found[layer + renamed(inner, CLIP_LAYER)] = tensor
    return found


def _clip_vision_config(weights: "Weights", prefix: str, hidden_act: str) -> JsonObject:
    patch_CCHW, positions = weights[f"{prefix}conv1.weight"], weights[f"{prefix}positional_embedding"]
    width, _, patch_size, _ = patch_CCHW.shape
    return {
        "hidden_size": width,
        "intermediate_size": weights[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": num_layers(weights, f"{prefix}transformer.resblocks."),
        "num_attention_heads": width // HEAD_WIDTHS.get(width, 64),
        "image_size": patch_size * round((positions.shape[0] - 1) ** 0.5),
        "patch_size": patch_size,
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
    }


def open_clip(weights: "Weights") -> "tuple[Weights, JsonObject]":
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
        "num_hidden_layers": num_layers(weights, "transformer.resblocks."),
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


def csd(weights: "Weights") -> "tuple[Weights, JsonObject]":
    """Convert CSD: OpenAI's ViT-L/14 (QuickGELU) without its projection, and the projection to style."""
    found = _clip_tower(weights, "backbone.", CLIP_VISION, "")
    found["style_projection"] = weights["last_layer_style"]
    return found, {"model_type": "clip_vision_model", **_clip_vision_config(weights, "backbone.", "quick_gelu")}
