"""Tiny twins of Qwen2-VL, Qwen3-VL and HPSv3: the real classes, their tokenizers and image processors, a few layers."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scorer_twins import fill
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.scores.scorers.hpsv3 import INSTRUCTION

MARKS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
BODY = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUM_HIDDEN = 32


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer that has read the instruction of HPSv3 alone; yes and no are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words = "Yes yes No no Please answer Does this figure show a cat dog red house photo"
    tokenizer.train_from_iterator([INSTRUCTION, *[words] * 40, *["Yes", "No", "yes", "no"] * 40], trainer)
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return tokenizer


def token_ids() -> dict[str, int]:
    """Return the ids of the marks by name."""
    tokenizer = tiny_tokenizer()
    return {mark: int(tokenizer.token_to_id(mark) or 0) for mark in MARKS}


def write_processor(folder: Path, *, patch_size: int, system: str = "") -> Path:
    """Write tokenizer, template and settings of the image processor, under the published names."""
    folder.mkdir(parents=True)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": system + BODY, "pad_token": MARKS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    images: dict[str, Any] = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": patch_size}
    images |= {"merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


def qwen2_vl(vocab_size: int) -> Any:
    """Return a tiny Qwen2-VL."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = token_ids()
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": vocab_size, "hidden_size": NUM_HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": NUM_HIDDEN, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    return filled(Qwen2VLForConditionalGeneration(config))


def qwen3_vl() -> Any:
    """Return a tiny Qwen3-VL."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = token_ids()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": tiny_tokenizer().get_vocab_size(), "hidden_size": NUM_HIDDEN, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
            "max_position_embeddings": 4096,
            "rope_scaling": {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": NUM_HIDDEN,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return filled(Qwen3VLForConditionalGeneration(config))


def filled(model: Any) -> Any:
    """Give a model its formula weights, with embeddings of the usual size."""
    fill(model)
    return model.eval()


def published_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict under the names of Qwen2-VL before transformers 5."""
    return {
        name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1): tensor
        for name, tensor in state.items()
    }


def reward_head() -> torch.nn.Sequential:
    """Return the head of HPSv3 with its dropout, as published."""
    layers = torch.nn.Sequential(
        torch.nn.Linear(NUM_HIDDEN, 24), torch.nn.ReLU(), torch.nn.Dropout(0.05), torch.nn.Linear(24, 16),
        torch.nn.ReLU(), torch.nn.Linear(16, 2),
    )  # fmt: skip
    fill(layers)
    return layers.eval()


def write_qwen_twins(root: Path) -> None:
    """Write every part of the scorers that stand on Qwen."""
    num_tokens = tiny_tokenizer().get_vocab_size()
    processor = write_processor(root / "qwen2-vl-processor", patch_size=14, system=SYSTEM)
    hps = qwen2_vl(num_tokens + 1)  # with the token of the reward
    (processor / "config.json").write_text(json.dumps(flat(hps.config.to_dict(), num_tokens + 40)))
    head = {f"rm_head.{name}": tensor for name, tensor in reward_head().state_dict().items()}
    (root / "hpsv3").mkdir()
    save_rounded(published_names(hps.state_dict()) | head, root / "hpsv3" / "model.safetensors")
    model = qwen2_vl(num_tokens)
    write_shards(root / "qwen2-vl-7b", published_names(model.state_dict()), model.config, 5)
    write_processor(root / "qwen3-vl-processor", patch_size=16)
    model = qwen3_vl()
    write_shards(root / "qwen3-vl-8b", model.state_dict(), model.config, 4)
    (root / "qwen3-vl-2b").mkdir()
    save_rounded(model.state_dict(), root / "qwen3-vl-2b" / "model.safetensors")
    (root / "qwen3-vl-2b" / "config.json").write_text(json.dumps(model.config.to_dict()))


def flat(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return a configuration as Qwen2-VL's is published: the text's part on top, and its own number of tokens."""
    text = config.pop("text_config")
    return {**text, **config, "vocab_size": vocab_size}


def save_rounded(state: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write weights in bfloat16, in which these models are published."""
    save_file({name: each.bfloat16().contiguous() for name, each in state.items()}, file, metadata={"format": "pt"})


def write_shards(folder: Path, state: Mapping[str, torch.Tensor], config: Any, count: int) -> None:
    """Write a model in several files with their index."""
    folder.mkdir()
    names, places = sorted(state), dict[str, str]()
    for place in range(count):
        file = f"model-{place + 1:05d}-of-{count:05d}.safetensors"
        save_rounded({name: state[name] for name in names[place::count]}, folder / file)
        places |= dict.fromkeys(names[place::count], file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
