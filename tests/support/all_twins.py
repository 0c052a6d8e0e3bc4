"""Tiny twins of all scorers' weights, under the names of their parts."""

import json
from pathlib import Path

import torch
from geneval_twins import write_mask2former
from qwen_twins import write_qwen_twins
from scorer_twins import (
    clip_model,
    formula_tensor,
    formula_weights,
    hf_dino_names,
    write_bert_tokenizer,
    write_clip_tokenizer,
    write_part,
)

from pipelines.scores.conversions.convert import convert

DATA = Path(__file__).parents[1] / "data"


def write_twins(root: Path) -> None:
    """Write every part into a folder of its own below `root`; their weights follow from their names."""
    recorded = json.loads((DATA / "scorers" / "recorded.json").read_text())
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
    vqa = json.loads((DATA / "compbench" / "recorded.json").read_text())["vqa"]["shapes"]
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
