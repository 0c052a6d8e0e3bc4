"""BLIP in its own names: the answers to questions about an image, and ImageReward with its head."""

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
    found |= blip_vision(weights, vision)
    found |= blip_text(weights, text, "text_model.")
    vision_config = blip_vision_config(weights, vision)
    text_config = blip_text_config(weights, text, vision_config["hidden_size"])
    return found, {"vision_config": vision_config, "text_config": text_config}


def blip_vqa(weights: "Weights") -> "tuple[Weights, JsonObject]":
    """Convert BLIP for questions: the vision tower, the question's encoder, and the answer's decoder with its words."""
    vision, text, answer = "visual_encoder.", "text_encoder.", "text_decoder."
    found = blip_vision(weights, vision)
    found |= blip_text(weights, text, text)
    found |= blip_text(weights, answer, answer)
    vision_config = blip_vision_config(weights, vision)
    width = vision_config["hidden_size"]
    text_config = blip_text_config(weights, text, width) | {"tie_word_embeddings": False}
    if text_config["hidden_size"] != width:  # the decoder of transformers has the width of images for questions too
        raise ValueError(f"images are {width} wide and texts {text_config['hidden_size']}")
    return found, {"model_type": "blip", "vision_config": vision_config, "text_config": text_config}


def blip_vision(weights: "Weights", prefix: str) -> "Weights":
    """Return the vision tower below a prefix under the names of transformers."""
    found = {}
    for name, tensor in weights.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix):
            continue
        if inner.startswith("blocks."):
            _, place, inside = inner.split(".", 2)
            found[f"vision_model.encoder.layers.{place}.{renamed(inside, BLIP_LAYER)}"] = tensor
        else:
            found[f"vision_model.{renamed(inner, BLIP_VISION)}"] = tensor
    return found


def blip_vision_config(weights: "Weights", prefix: str) -> JsonObject:
    """Return the configuration of the vision tower below a prefix."""
    patch_CCHW, positions = weights[f"{prefix}patch_embed.proj.weight"], weights[f"{prefix}pos_embed"]
    width, patch_size = patch_CCHW.shape[0], patch_CCHW.shape[2]
    return {
        "hidden_size": width,
        "intermediate_size": weights[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": num_layers(weights, f"{prefix}blocks."),
        "num_attention_heads": max(1, width // 64),
        "image_size": patch_size * round((positions.shape[1] - 1) ** 0.5),
        "patch_size": patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }


def blip_text(weights: "Weights", prefix: str, new_prefix: str) -> "Weights":
    """Return the text tower below a prefix, whose names are those of transformers already, under a new prefix."""
    return {
        f"{new_prefix}{name.removeprefix(prefix)}": tensor
        for name, tensor in weights.items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }


def blip_text_config(weights: "Weights", prefix: str, encoder_width: int) -> JsonObject:
    """Return the configuration of the text tower below a prefix, which looks at states of a width."""
    words = weights[f"{prefix}embeddings.word_embeddings.weight"]
    return {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "encoder_hidden_size": encoder_width,
        "intermediate_size": weights[f"{prefix}encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": num_layers(weights, f"{prefix}encoder.layer."),
        "num_attention_heads": max(1, words.shape[1] // 64),
        "max_position_embeddings": weights[f"{prefix}embeddings.position_embeddings.weight"].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "is_decoder": True,
    }
