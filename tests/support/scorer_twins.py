"""Tiny twins of the scorers' models, whose weights and images follow from formulas: nothing of them is stored."""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.scores.scorers import Score

CLIP_TOKENIZER = Path(__file__).parents[3] / "shared" / "sdxl" / "tokenizer"
if not CLIP_TOKENIZER.is_dir():
    CLIP_TOKENIZER = Path("/work/shared/sdxl/tokenizer")
WORDS = "a an the of in on cat dog house red blue photo painting style and with , . - ' !"
BERT_VOCAB = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *WORDS.split(),
    *(chr(97 + place) for place in range(1, 26)),
    *(f"##{chr(97 + place)}" for place in range(26)),
]
PROMPTS = [
    "a red cat",
    "the painting of a house, in the style of a photo",
    " ".join(["a dog and"] * 20),
    "",
]
"""For ImageReward: the third is longer than 35 tokens."""
MIXED_PROMPTS = ["a cat", "a dog in a house", "a cat", "dog " * 100, "", "a red house", "a photo"]
"""One for each of SIZES: a repeated one, one that is cut, and an empty one."""
HPS_PROMPTS = [
    "A Red Cat",
    "\u201ccurly quotes\u201d and \u2018others\u2019\uff0cfull-width &amp; entities &amp;lt; \ufb01ne",
    "caf\u00c3\u00a9 \t with   white\n space",
    " ".join(["cat"] * 90),
    "",
]
SIZES = [(224, 224), (320, 200), (199, 331), (64, 48), (225, 227), (231, 224), (512, 512)]
"""Width and height: square, both orientations, small, and sizes whose crop is an odd number of pixels."""


def formula_tensor(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor that follows from its name and shape; the stream of RandomState is frozen by NumPy."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if len(shape) > 1:
        values = values / math.sqrt(max(1, math.prod(shape[1:])))
    elif name.endswith("weight"):
        values = 1 + 0.1 * values
    else:
        values = 0.1 * values
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def formula_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return the weights of a model by name."""
    return {name: formula_tensor(name, shape) for name, shape in shapes.items()}


def fill(model: torch.nn.Module) -> dict[str, list[int]]:
    """Give a model the weights that follow from their names; return the shapes."""
    state = model.state_dict()
    floats = {name: list(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    model.load_state_dict(state | formula_weights(floats))
    return floats


def formula_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of coarse and fine blocks over a gradient; integers alone, equal everywhere."""
    random = np.random.RandomState(1000 + seed)
    coarse = random.randint(0, 256, (height // 23 + 1, width // 23 + 1, 3)).repeat(23, 0).repeat(23, 1)
    fine = random.randint(0, 256, (height // 2 + 1, width // 2 + 1, 3)).repeat(2, 0).repeat(2, 1)
    slope = (np.arange(width)[None, :, None] * 255 // width + np.arange(height)[:, None, None] * 255 // height) // 2
    values = (2 * coarse[:height, :width] + fine[:height, :width] + slope) // 4
    return Image.fromarray(values.astype(np.uint8))


def write_part(folder: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """Write one part of a scorer's weights as `fetch` leaves it, without a record."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def clip_config(hidden_act: str = "gelu", *, vocab_size: int = 49408) -> Any:
    """Return the configuration of a tiny CLIP whose heads are 64 wide."""
    from transformers import CLIPConfig

    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    return CLIPConfig(
        projection_dim=32,
        text_config={**tower, "vocab_size": vocab_size, "hidden_act": hidden_act, "eos_token_id": vocab_size - 1},
        vision_config={**tower, "patch_size": 32, "image_size": 224, "hidden_act": hidden_act},
    )


def clip_model(hidden_act: str = "gelu") -> Any:
    """Return a tiny CLIP whose weights follow from their names."""
    from transformers import CLIPModel

    model = CLIPModel(clip_config(hidden_act)).eval()
    fill(model)
    model.logit_scale.data.fill_(math.log(100))
    return model


def write_clip_tokenizer(folder: Path) -> Path:
    """Write CLIP's tokenizer as the part `clip-tokenizer`."""
    target = folder / "clip-tokenizer"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (target / name).write_bytes((CLIP_TOKENIZER / name).read_bytes())
    return target


def write_bert_tokenizer(folder: Path) -> Path:
    """Write a tiny vocabulary as the part `bert-tokenizer`."""
    target = folder / "bert-tokenizer"
    target.mkdir(parents=True, exist_ok=True)
    (target / "vocab.txt").write_text("\n".join(BERT_VOCAB) + "\n")
    return target


def thin(pixels_CHW: torch.Tensor) -> torch.Tensor:
    """Return every seventh row and column of a prepared image: enough to tell two preparations apart."""
    return pixels_CHW[:, ::7, ::7].contiguous().clone()


def hf_dino_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return DINO's weights under the names of the published files for transformers."""
    top = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    layer = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            stem, _, end = name.rpartition(".")
            found[f"{top[stem]}.{end}" if stem in top else top[name]] = tensor
            continue
        _, place, inner = name.split(".", 2)
        stem, _, end = inner.rpartition(".")
        if stem == "attn.qkv":
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"encoder.layer.{place}.attention.attention.{part}.{end}"] = piece
        else:
            found[f"encoder.layer.{place}.{layer[stem]}.{end}"] = tensor
    return found


def value_of(result: Any) -> float:
    """Return the number of a result; a failure has none."""
    return float(result.value if isinstance(result, Score) else result)
