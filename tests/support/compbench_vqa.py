"""T2I-CompBench's own BLIP of questions at a tiny size, run over images and questions as its scripts do."""

import importlib
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from scorer_twins import BERT_VOCAB, fill, formula_image, write_bert_tokenizer

VOCABULARY = 30524
VQA_SIZES = [(480, 480), (320, 200), (199, 331), (64, 48)]
VQA_QUESTIONS = [
    ["a red cat?", "the house?"],
    ["A Dog; in the house?", "a painting of a cat, in the style of a photo?", "a cat?"],
    ["dog " * 40 + "?"],
    ["a blue house?", "a cat?"],
]
"""Of each image. The third is longer than 35 tokens; lengths differ, so that the official batch is padded."""
STRIDE = 24
SHOWN = 1
"""The image whose prepared pixels are recorded, every STRIDE-th row and column."""


class _Tokenizer:
    """BERT's tokenizer with a tiny vocabulary, and the ids of the marks that the official code adds to the real one."""

    bos_token_id, enc_token_id = 30522, 30523

    def __init__(self, vocabulary: Path) -> None:
        from transformers import BertTokenizer

        self._tokenizer = BertTokenizer(str(vocabulary))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._tokenizer(*arguments, **options)


def record_vqa(root: Path) -> dict[str, Any]:
    """Run the official data set, model and printing of probabilities."""
    from record_scorers import _get_head_mask, _invert_attention_mask, stand_ins

    stand_ins()
    for name in ("cv2", "utils", "timm.models.registry", "timm.models.helpers"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.registry"].register_model = None  # type: ignore[attr-defined]
    for name in ("named_apply", "adapt_input_conv"):
        setattr(sys.modules["timm.models.helpers"], name, None)
    sys.path.insert(0, str(root))
    med, blip, vqa = (importlib.import_module(f"models.{name}") for name in ("med", "blip", "blip_vqa"))
    for method, function in (("get_head_mask", _get_head_mask), ("invert_attention_mask", _invert_attention_mask)):
        if not hasattr(med.BertModel, method):
            setattr(med.BertModel, method, function)
    for each in (med.BertModel, med.BertLMHeadModel):
        each.all_tied_weights_keys = {}
    tower = blip.VisionTransformer(480, 96, embed_dim=64, depth=2, num_heads=1)
    vqa.create_vit = lambda *_, **__: (tower, 64)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        vqa.init_tokenizer = lambda: _Tokenizer(write_bert_tokenizer(scratch) / "vocab.txt")
        (scratch / "med.json").write_text(json.dumps({
            "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
            "intermediate_size": 128, "max_position_embeddings": 64, "add_cross_attention": True, "encoder_width": 64,
            "layer_norm_eps": 1e-12, "pad_token_id": 0, "type_vocab_size": 2, "hidden_act": "gelu",
        }))  # fmt: skip
        model = vqa.BLIP_VQA(med_config=str(scratch / "med.json")).eval()
        head = model.text_decoder.cls.predictions.decoder
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # a name of its own, a formula of its own
        shapes = fill(model)
        images, questions = _official_items(scratch)
    found: list[torch.Tensor] = []
    inner = model.vqa_prob
    model.vqa_prob = lambda *each: found.append(inner(*each)) or found[-1]
    with torch.no_grad():
        printed = model(torch.stack(images), questions, train=False, inference="vqa_prob")
    assert len(BERT_VOCAB) < 100
    return {
        "shapes": shapes,
        "questions": questions,
        "shares": found[0].tolist(),
        "printed": printed,
        "pixels": images[sum(map(len, VQA_QUESTIONS[:SHOWN]))][:, ::STRIDE, ::STRIDE].tolist(),
    }


def _official_items(scratch: Path) -> tuple[list[torch.Tensor], list[str]]:
    """Return the images and questions as the official data set prepares them."""
    data = importlib.import_module("data")
    notes = []
    for place, (size, asked) in enumerate(zip(VQA_SIZES, VQA_QUESTIONS, strict=True)):
        image = scratch / f"{place}.png"
        formula_image(*size, place).save(image)
        notes += [{"image": str(image), "question_id": 0, "question": each, "dataset": "color"} for each in asked]
    (scratch / "vqa_test.json").write_text(json.dumps(notes))
    dataset, _ = data.create_dataset(
        "vqa", {"image_size": 480, "ann_root": str(scratch), "vqa_root": "", "vg_root": ""}
    )
    items = [dataset[place] for place in range(len(notes))]
    return [image for image, _, _ in items], [question for _, question, _ in items]
