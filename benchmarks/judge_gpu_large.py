"""Two large judges at full size on one GPU: Mask2Former of GenEval, and BLIP for questions of T2I-CompBench.

Weights are random and configurations are in this file, so that nothing is fetched. It imports neither Ray, diffusers
nor DeepSpeed: a host with torch, transformers, safetensors, Pillow, fsspec, filelock and scipy (which transformers
wants of Mask2Former) is enough. There, in the root of the repository:

    PYTHONPATH=tests/support:. python3 -m benchmarks.judge_gpu_large --results $OUT/judge_gpu_large.json

`--small` is the rehearsal, on a CPU too, in less than a minute: narrow models, images of the same sizes. `judge_gpu`
has both as its sections `detector` and `vqa`.

- detector: Mask2Former Swin-S on images of 1024 pixels, which it sees at 800. Ours is the scorer's own `score`, one
  image at a time; its random weights find nothing, or, made sure, so many objects that masks cost as much as they can.
  A real image lies in between. The bare loop is the model alone over prepared tensors. No colours are asked for.
- vqa: BLIP at 480 pixels with three questions an image, all of one length. Ours is the scorer's `score` on images of
  1024 pixels; the bare loop has prepared pixels and tokens.

`of_bare` is ours over the bare loop in float32: for the detector of one image, for questions of the same batch. What is
missing from 1 is the preparation of images, which one core does here, and for the detector the masks. Types other than
float32 are of the bare loop alone: scores are defined in float32, and scorers refuse others.
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from PIL import Image
from scorer_twins import clip_model, formula_image, write_bert_tokenizer, write_part
from torch import Tensor

from benchmarks.judge_speed import DEVICE, DTYPES, Speed, computing_in, speed
from pipelines.scores.scorers import new_scorer
from pipelines.scores.scorers.images import prepare

Row = dict[str, Any]
SIDE = 1024
DETECTOR = "mask2former-swin-s-coco"
SWIN_S = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}
SMALL_SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL_MASK2FORMER = {
    "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32,
    "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 10,
}  # fmt: skip
SURE = 100.0
"""Factor of the class weights with which random ones are sure of their classes."""
METADATA = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
WIDTHS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SMALL_WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
QUESTIONS = ("a red cat in the house?", "a blue dog on the house?", "the photo of a red dog?")
"""Of eight words and marks each, with the tiny vocabulary of the twins."""


def new_detector(*, small: bool) -> Any:
    """Return a Mask2Former as `facebook/mask2former-swin-small-coco-instance` is configured, with random weights."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SMALL_SWIN if small else SWIN_S
    backbone = SwinConfig(**swin, window_size=7, image_size=224, drop_path_rate=0.3, out_features=STAGES)
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=80, **(SMALL_MASK2FORMER if small else {}))
    torch.manual_seed(0)
    return Mask2FormerForUniversalSegmentation(config).eval()


def write_detector(root: Path, model: Any) -> None:
    """Write the parts of GenEval's scorer; its CLIP is a tiny one, since no colour is asked for."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(root / DETECTOR)
    clip = clip_model("quick_gelu")
    state = {name: each for name, each in clip.state_dict().items() if "position_ids" not in name}
    write_part(root / "clip-l14-openai", state, clip.config.to_dict())
    tokenizer = root / "clip-tokenizer"
    tokenizer.mkdir(exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>"]
    (tokenizer / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")


def detector(work: Path, *, small: bool, batch_sizes: Sequence[int], num_rounds: int) -> list[Row]:
    """Measure GenEval's scorer, and its Mask2Former alone."""
    from transformers import Mask2FormerForUniversalSegmentation

    from pipelines.scores.scorers.geneval.detector import Sizes, prepared

    images, rows = pictures(max(batch_sizes)), []
    model = new_detector(small=small)
    for sureness in (1.0, SURE):
        model.class_predictor.weight.data *= sureness
        write_detector(work / "detector", model)
        rows += _geneval(work / "detector", images, batch_sizes, num_rounds)
    del model
    _release()
    bare = Mask2FormerForUniversalSegmentation.from_pretrained(work / "detector" / DETECTOR).eval().to(DEVICE)
    sizes = Sizes.of(SIDE, SIDE)
    pixels_BCHW = torch.stack([prepared(each, sizes) for each in images]).to(DEVICE)
    rows += _bare(lambda size: lambda: bare(pixel_values=pixels_BCHW[:size]), (1, *batch_sizes), num_rounds)
    return _with_ratios(rows, lambda row: 1)


def _geneval(root: Path, images: list[Image.Image], batch_sizes: Sequence[int], num_rounds: int) -> list[Row]:
    scorer = new_scorer("geneval")
    scorer.load(root, DEVICE)

    def score(size: int) -> list[Any]:
        return list(scorer.score(images[:size], ["a cat"] * size, metadata=[METADATA] * size))

    objects = round(score(1)[0].components["num_objects"])
    return [
        _row("ours", "float32", size, speed(lambda size=size: score(size), size, num_rounds), num_objects=objects)
        for size in batch_sizes
    ]


def new_vqa(*, small: bool) -> dict[str, Any]:
    """Return the three parts of BLIP for questions, base size, by the prefix of their weights; random."""
    from transformers import BlipTextConfig, BlipTextLMHeadModel, BlipTextModel, BlipVisionConfig, BlipVisionModel

    widths = SMALL_WIDTHS if small else WIDTHS
    vision = BlipVisionConfig(**widths, image_size=480, patch_size=16, hidden_act="gelu", layer_norm_eps=1e-6)
    text = BlipTextConfig(
        **widths, encoder_hidden_size=widths["hidden_size"], vocab_size=30_524, max_position_embeddings=512,
        hidden_act="gelu", layer_norm_eps=1e-12, is_decoder=True, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    models = {
        "vision_model": BlipVisionModel(vision),
        "text_encoder": BlipTextModel(text, add_pooling_layer=False),
        "text_decoder": BlipTextLMHeadModel(text),
    }
    return {name: model.eval() for name, model in models.items()}


def write_vqa(root: Path, models: dict[str, Any]) -> None:
    """Write the parts of the scorer `blip-vqa`."""
    state = {f"{name}.{key}": each for name, model in models.items() for key, each in model.state_dict().items()}
    config = {
        "model_type": "blip",
        "vision_config": models["vision_model"].config.to_dict(),
        "text_config": models["text_encoder"].config.to_dict(),
    }
    write_part(root / "blip-vqa-capfilt-large", state, config)
    write_bert_tokenizer(root)


def answers(models: dict[str, Any], pixels_BCHW: Tensor, ids_QS: Tensor) -> Tensor:
    """Return p(yes) / (p(yes) + p(no)) of the same questions about each image, from prepared tensors: B, Q."""
    from pipelines.scores.scorers.trunks.blip_vqa import DECODE, NO, YES

    states = models["vision_model"](pixel_values=pixels_BCHW).last_hidden_state.repeat_interleave(len(ids_QS), 0)
    ids = ids_QS.repeat(len(pixels_BCHW), 1)
    asked = models["text_encoder"](
        input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=states, is_decoder=False
    ).last_hidden_state
    start = torch.full((len(ids), 1), DECODE, device=ids.device)
    logits = models["text_decoder"](input_ids=start, encoder_hidden_states=asked, use_cache=False).logits[:, 0]
    return (logits[:, YES] - logits[:, NO]).float().sigmoid().view(len(pixels_BCHW), len(ids_QS))


def vqa(work: Path, *, small: bool, batch_sizes: Sequence[int], num_rounds: int) -> list[Row]:
    """Measure the scorer `blip-vqa`, and its model alone."""
    images, models = pictures(max(batch_sizes)), new_vqa(small=small)
    write_vqa(work / "vqa", models)
    rows, shares = _asked(work / "vqa", images, batch_sizes, num_rounds)
    _release()
    models = {name: model.to(DEVICE) for name, model in models.items()}
    pixels_BCHW, ids_QS = prepare(images, "blip-480").to(DEVICE), _ids(work / "vqa").to(DEVICE)
    with computing_in("float32"):
        known = answers(models, pixels_BCHW[: len(shares)], ids_QS).cpu()
    torch.testing.assert_close(shares, known, rtol=0, atol=1e-3)  # both do the same work
    rows += _bare(lambda size: lambda: answers(models, pixels_BCHW[:size], ids_QS), batch_sizes, num_rounds)
    return _with_ratios(rows, lambda row: int(row["batch_size"]))


def _asked(
    root: Path, images: list[Image.Image], batch_sizes: Sequence[int], num_rounds: int
) -> tuple[list[Row], Tensor]:
    """Measure the scorer; return also its answers about the smallest batch: B, Q."""
    scorer = new_scorer("blip-vqa")
    scorer.load(root, DEVICE)

    def score(size: int) -> list[Any]:
        return list(scorer.score(images[:size], ["a cat"] * size, questions=[list(QUESTIONS)] * size))

    rows = [
        _row("ours", "float32", size, speed(lambda size=size: score(size), size, num_rounds)) for size in batch_sizes
    ]
    return rows, torch.tensor([list(each.components.values()) for each in score(min(batch_sizes))])


def _ids(root: Path) -> Tensor:
    """Return the tokens of the questions, which are all of one length: Q, S."""
    from pipelines.scores.scorers.blip_vqa import clean_question
    from pipelines.scores.scorers.text import BertTokens
    from pipelines.scores.scorers.trunks.blip_vqa import ENCODE

    ids_QS, mask_QS, _ = BertTokens(root / "bert-tokenizer")([clean_question(each) for each in QUESTIONS])
    (length,) = set(mask_QS.sum(dim=1).tolist())
    ids_QS[:, 0] = ENCODE
    return ids_QS[:, :length]


def pictures(count: int) -> list[Image.Image]:
    """Return images of SIDE pixels in memory, eight different ones in turn."""
    distinct = [formula_image(SIDE, SIDE, seed=number) for number in range(min(8, count))]
    return [distinct[number % len(distinct)] for number in range(count)]


def _bare(work_of: Callable[[int], Callable[[], Any]], batch_sizes: Sequence[int], num_rounds: int) -> list[Row]:
    """Measure a bare loop in every type that the device has, one pass a batch."""
    rows = []
    for dtype in DTYPES if DEVICE == "cuda" else ("float32", "bfloat16"):
        for size in dict.fromkeys(batch_sizes):
            with computing_in(dtype):
                rows.append(_row("bare", dtype, size, speed(work_of(size), size, num_rounds)))
    return rows


def _row(hand: str, dtype: str, batch_size: int, found: Speed | None, **more: Any) -> Row:
    row = {"hand": hand, "dtype": dtype, "batch_size": batch_size, **more}
    return row | (asdict(found) if found is not None else {"images_per_s": None, "peak_gib": None})


def _with_ratios(rows: list[Row], batch_of: Callable[[Row], int]) -> list[Row]:
    """Return the rows, those of ours with their share of the bare loop's speed in float32."""
    bare = {
        row["batch_size"]: row["images_per_s"] for row in rows if (row["hand"], row["dtype"]) == ("bare", "float32")
    }
    for row in rows:
        if row["hand"] == "ours" and row["images_per_s"] and bare.get(batch_of(row)):
            row["of_bare"] = row["images_per_s"] / bare[batch_of(row)]
    return [{name: round(each, 3) if isinstance(each, float) else each for name, each in row.items()} for row in rows]


def _release() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


SECTIONS = {"detector": (detector, (8, 32), (1,)), "vqa": (vqa, (8, 32, 128), (1, 2))}
"""What is measured, and the numbers of images in one call: at full size, and in a rehearsal."""


def measured(name: str, work: Path, *, small: bool, num_rounds: int) -> list[Row]:
    """Measure one of SECTIONS."""
    section, sizes, small_sizes = SECTIONS[name]
    return section(work, small=small, batch_sizes=small_sizes if small else sizes, num_rounds=num_rounds)


def main() -> None:
    """Measure, print a line for each way, and write the figures with their conditions."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--small", action="store_true")
    arguments.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--results", type=Path)
    options = arguments.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    found: Row = {"device": device, "torch": torch.__version__, "is_small": options.small}
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="mapo-judge-") as work:
            found[name] = measured(name, Path(work), small=options.small, num_rounds=options.rounds)
        for row in found[name]:
            print(json.dumps({"section": name, **row}), flush=True)
        if options.results:
            options.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
