"""Drawing and scoring at full size on one GPU: SDXL at 1024 x 1024 in 30 steps, and the CLIP family; random weights.

Made for a host with one GPU, without Ray or a network; see `encode_gpu` for how the files get there:

    . .gpu/b/activate && export PYTHONPATH=tests/support:$PYTHONPATH &&
        python3 -m benchmarks.judge_gpu --results $OUT/judge_gpu.json

`--small` is the rehearsal, on a CPU too (PYTHONPATH=tests/support, about a minute): tiny models, 64 pixels, two steps.

- draw: the writer of our actors (embedding, drawing, PNG, shard) beside a bare diffusers loop of the same batch, in one
  process; then the bare loop with a compiled UNet, which shows what compiling would bring.
- score: PickScore (ViT-H), Aesthetic and CLIPScore (ViT-L, one trunk) over images in memory: images a second of each
  alone and of the two of ViT-L together.
- detector and vqa: see `judge_gpu_large`, which measures these two alone on a host without diffusers and DeepSpeed.

Goal: drawing at 0.95 of the bare loop or more. Conditions are written beside the figures.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from scorer_twins import formula_image, write_clip_tokenizer, write_part

from benchmarks.full_size import filled, write_full_size
from benchmarks.judge_gpu_large import SECTIONS, measured
from benchmarks.judge_speed import DEVICE, timed
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import prompt_id
from pipelines.dataset.storage import Storage
from pipelines.samples.actor import SampleWriter
from pipelines.samples.drawing import Drawing, DrawnModel, DrawSettings, Sampling
from pipelines.samples.plan import pending_samples, wanted_samples
from pipelines.samples.prompts import Prompt
from pipelines.scores.scorers import new_scorer, score_together

TOWERS = {
    "pickscore-v1": ("gelu", 1024, (1280, 5120, 32, 16), (1024, 4096, 24, 16)),
    "clip-l14-openai": ("quick_gelu", 768, (1024, 4096, 24, 16), (768, 3072, 12, 12)),
}
"""Activation, projection, and width, inner width, layers and heads of both towers: ViT-H/14 and ViT-L/14."""
NAMES = ("scores_per_s", "images_per_s", *SECTIONS)


def draw(work: Path, *, small: bool, batch_size: int, num_rounds: int) -> dict[str, float]:
    """Images a second of ours, of the bare loop, and of the bare loop with a compiled UNet."""
    from diffusers import StableDiffusionXLPipeline

    dtype = "float16" if DEVICE == "cuda" else "float32"
    write_full_size(work / "model", dtype=getattr(torch, dtype), device=DEVICE, small=small)
    side, steps = (64, 2) if small else (1024, 30)
    sampling = Sampling(steps, 5.0, side, side, dtype=dtype)
    model = DrawnModel("base", ModelSource(str(work / "model")), identity="random")
    texts = [f"a cat on hill {number}" for number in range(batch_size * (num_rounds + 1))]
    prompts = [Prompt(prompt_id(text), text) for text in texts]
    wanted = wanted_samples(prompts, "random", seed=0, images_per_prompt=1)
    storage = Storage(str(work / "storage"))
    writer = SampleWriter({"random": (model, sampling)}, storage, DrawSettings("evaluate", batch_size, 1))
    pipeline = StableDiffusionXLPipeline.from_pretrained(work / "model", dtype=getattr(torch, dtype)).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    parts = (wanted.slice(start, batch_size) for start in range(0, wanted.num_rows, batch_size))
    drawings = (Drawing(model, sampling, "random", part) for part in parts)
    units = (unit for drawing in drawings for unit in pending_samples(storage, drawing, batch_size))

    def bare() -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch_size)]
        pipeline(
            texts[:batch_size], height=side, width=side, num_inference_steps=steps,
            guidance_scale=5.0, generator=generators,
        )  # fmt: skip

    def ours() -> None:
        unit = next(units)
        writer.write(unit.id, unit.rows)

    found = {name: batch_size / timed(work, num_rounds) for name, work in (("ours", ours), ("bare", bare))}
    pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune-no-cudagraphs")
    return found | {"bare, compiled": batch_size / timed(bare, 1)}


def write_towers(root: Path, *, small: bool) -> None:
    """Write both CLIPs, in float32, and the head of Aesthetic."""
    from transformers import CLIPConfig, CLIPModel

    write_clip_tokenizer(root)
    for part, (activation, projection, vision, text) in TOWERS.items():
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = [dict(zip(names, (64, 256, 2, 1) if small else each, strict=True)) for each in (vision, text)]
        config = CLIPConfig(
            projection_dim=768 if small else projection,
            vision_config={**sizes[0], "patch_size": 32 if small else 14, "image_size": 224, "hidden_act": activation},
            text_config={**sizes[1], "vocab_size": 49_408, "eos_token_id": 49_407, "hidden_act": activation},
        )
        model = filled(lambda config=config: CLIPModel(config), torch.float32, DEVICE)
        state = {name: tensor.cpu() for name, tensor in model.state_dict().items() if "position_ids" not in name}
        write_part(root / part, state, config.to_dict())
    write_part(root / "aesthetic-sac-logos-ava1", {"weight": torch.randn(1, 768) / 28, "bias": torch.tensor([5.0])})


def scores(work: Path, *, small: bool, num_rounds: int) -> dict[str, float]:
    """Images a second of each scorer, and of the two that share a trunk."""
    write_towers(work / "weights", small=small)
    count, side = (8, 64) if small else (128, 1024)
    images = [formula_image(side, side, seed=number % 8) for number in range(count)]
    prompts = [f"a cat on hill {number}" for number in range(count)]
    loaded = {name: new_scorer(name) for name in ("pickscore", "aesthetic", "clipscore")}
    for scorer in loaded.values():
        scorer.load(work / "weights", DEVICE)
    hands = {name: [scorer] for name, scorer in loaded.items()}
    hands["aesthetic and clipscore"] = [loaded["aesthetic"], loaded["clipscore"]]
    return {
        name: count / timed(lambda each=each: score_together(each, images, prompts), num_rounds)
        for name, each in hands.items()
    }


def main() -> None:
    """Measure what is asked for, and write the figures with their conditions."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--small", action="store_true")
    arguments.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--results", type=Path)
    options = arguments.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "batch_size": options.batch_size}
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="mapo-judge-") as work:
            found[name] = section(name, Path(work), options)
        print(json.dumps({name: found[name]}), flush=True)
        if options.results:
            options.results.write_text(json.dumps(found, indent=1) + "\n")


def section(name: str, work: Path, options: argparse.Namespace) -> Any:
    """Measure one of NAMES."""
    if name in SECTIONS:
        return measured(name, work, small=options.small, num_rounds=options.rounds)
    if name == "images_per_s":
        found = draw(work, small=options.small, batch_size=options.batch_size, num_rounds=options.rounds)
    else:
        found = scores(work, small=options.small, num_rounds=options.rounds)
    return {hand: round(rate, 3) for hand, rate in found.items()}


if __name__ == "__main__":
    main()
