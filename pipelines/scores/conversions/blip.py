"""BLIP in its own names, and the head of ImageReward."""

from typing import TYPE_CHECKING

from pipelines.dataset.values import JsonObject
from pipelines.scores.conversions.affine import collapse_affine
from pipelines.scores.conversions.names import num_layers, renamed

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

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


def imagereward(weights: "Weights") -> "tuple[Weights, JsonObject]":
    """Convert ImageReward: BLIP's vision tower, its text tower with cross attention, and the head as one affine map."""
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    found = {f"head.{name}": tensor for name, tensor in collapse_affine(weights, "mlp.").items()}
    for name, tensor in weights.items():
        inner = name.removeprefix(vision)
        if inner.startswith("blocks."):
            _, place, inside = inner.split(".", 2)
            found[f"vision_model.encoder.layers.{place}.{renamed(inside, BLIP_LAYER)}"] = tensor
        elif name.startswith(vision):
            found[f"vision_model.{renamed(inner, BLIP_VISION)}"] = tensor
        elif name.startswith(text) and not name.endswith("position_ids"):
            found[f"text_model.{name.removeprefix(text)}"] = tensor
    patch_CCHW, positions = weights[f"{vision}patch_embed.proj.weight"], weights[f"{vision}pos_embed"]
    words = weights[f"{text}embeddings.word_embeddings.weight"]
    width, patch_size = patch_CCHW.shape[0], patch_CCHW.shape[2]
    vision_config = {
        "hidden_size": width,
        "intermediate_size": weights[f"{vision}blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": num_layers(weights, f"{vision}blocks."),
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
        "num_hidden_layers": num_layers(weights, f"{text}encoder.layer."),
        "num_attention_heads": max(1, words.shape[1] // 64),
        "max_position_embeddings": weights[f"{text}embeddings.position_embeddings.weight"].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "is_decoder": True,
    }
    return found, {"vision_config": vision_config, "text_config": text_config}
