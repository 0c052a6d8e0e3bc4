"""How much of a 16-bit training the forward pass sees: `python -m benchmarks.precision` (`make bench-precision`).

A UNet of SDXL's depth and an eighth of its width trains 100 steps at a learning rate of 1e-6, the whole move of the
default 2000 steps at 1e-7, on the product's engine (one rank, pairs made up). Three times: in float32; in bf16 with
masters that DeepSpeed takes from the cast weights, as versions before December 2026 did; and in bf16 with masters from
the base's float32 file. `train_gpu --only precision` does the same at full size on a GPU.

Prints and writes to results/precision.json, for each:
    projection      the move of the weights that the forward pass computes with, projected on the move of the masters
    gain            the change of the chosen error on batches that no step sees, in the forward pass
    gain / float32  that of the first row
    off             how far the masters are from the base before the first step (root mean square); an export of a
                    training carries it
Goals: a projection of at least 0.95, a gain within a tenth of float32's.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import train_gpu_trial as trial
from benchmarks.gpu_peak import Row
from benchmarks.table import show
from pipelines.dataset.model_files import ModelSource
from training.config import TrainConfig
from training.state.masters import StoredWeights, start_from_base
from training.state.zero import WEIGHT, ZeroState

RESULTS = Path(__file__).parent / "results" / "precision.json"
STEPS, RATE = 100, 1e-6
PAIRS = 2  # of each of two micro-batches in a step
GOAL_PROJECTION, GOAL_GAIN = 0.95, 0.1
WAYS = (("fp32", True), ("bf16", False), ("bf16", True))
"""Precision, and whether the masters start at the base's float32 weights."""


def measure(
    unet_config: Mapping[str, Any], folder: Path, *, side: int, device: torch.device, steps: int = STEPS
) -> Iterator[Row]:
    """Yield a row for each of WAYS, then the goals.

    Args:
        unet_config: Of diffusers' UNet2DConditionModel.
        folder: For the base's float32 file.
        side: Of the latents.
        device: Where.
        steps: As many at a rate that makes up for fewer.
    """
    base = trial.new_base(unet_config, device)
    base.unet.float().save_pretrained(folder / "unet", max_shard_size="100GB")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    del base
    found = []
    for precision, from_float32 in WAYS:
        config = TrainConfig.model_validate({
            "micro_batch_size": PAIRS, "global_batch_size": 2 * PAIRS, "precision": precision,
            "learning_rate": RATE * STEPS / steps, "gradient_checkpointing": False, "channels_last": False,
        })  # fmt: skip
        made = trial.Trainee(unet_config, config, accumulation_steps=2, device=device, side=side)
        made.use(trial.Way(PAIRS, checkpointing=False, channels_last=False))
        row = _moved(made, ModelSource(str(folder)), steps, from_float32=from_float32)
        made.close()
        found.append(row)
        start = "the base's float32" if from_float32 else "the cast weights"
        yield {"precision": precision, "masters from": start, **row, "gain / float32": row["gain"] / found[0]["gain"]}
    now = found[-1]
    is_met = now["projection"] >= GOAL_PROJECTION and abs(now["gain"] / found[0]["gain"] - 1) <= GOAL_GAIN
    yield {"goal": f"projection {now['projection']:.3f}, at least {GOAL_PROJECTION}: {'met' if is_met else 'MISSED'}"}


def _moved(made: trial.Trainee, source: ModelSource, steps: int, *, from_float32: bool) -> Row:
    state = ZeroState(made.engine.unet)
    if from_float32:
        start_from_base(source, state, None)
    stored = StoredWeights.of(source.folder() / "unet", None)
    squares = numel = 0.0
    for fragment, view in state.views(WEIGHT):
        squares += float((view.double().cpu() - stored.read(fragment).double()).square().sum())
        numel += fragment.numel
    masters = [view.clone() for _, view in state.views(WEIGHT)]
    seen = [view.clone() for _, view in state.model_views()]
    before = _held_out(made)
    for _ in range(steps):
        made.step("mapo_paper")
    along = length = 0.0
    moves = zip(state.views(WEIGHT), masters, state.model_views(), seen, strict=True)
    for (_, master), old, (_, copy), old_copy in moves:
        moved = (master - old).double()
        along += float(moved @ (copy.double() - old_copy.double()))
        length += float(moved @ moved)
    return {"projection": along / length, "gain": _held_out(made) - before, "off": (squares / numel) ** 0.5}


def _held_out(made: trial.Trainee) -> float:
    """The mean chosen error of the forward pass over eight batches that no step sees."""
    total = 0.0
    made.engine.unet.eval()
    with torch.no_grad():
        for number in range(8):
            draw = torch.Generator().manual_seed(10_000 + number)
            batch = trial.made_up(made.unet_config, PAIRS, made.side, 100 + number)
            noise = torch.randn(batch.chosen_BCHW.shape, generator=draw)
            errors = made.errors(batch, noise, torch.randint(0, 1000, (PAIRS,), generator=draw))
            total += float(errors.chosen.double().mean()) / 8
    made.engine.unet.train()
    return total


def main() -> None:
    """Measure on the CPU."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--small", action="store_true", help="a tiny UNet and fewer, longer steps")
    arguments.add_argument("--results", type=Path, help="where to write, also of a rehearsal")
    options = arguments.parse_args()
    unet_config = trial.SMALL_UNET_CONFIG if options.small else trial.NARROW_UNET_CONFIG
    steps = 20 if options.small else STEPS
    with tempfile.TemporaryDirectory(prefix="mapo-bench-") as work:
        rows = list(measure(unet_config, Path(work), side=8, device=torch.device("cpu"), steps=steps))
    torch.distributed.destroy_process_group()
    show(rows)
    conditions = {"device": "cpu", "torch": torch.__version__, "small": options.small, "weights": "random, seed 0"}
    conditions |= {
        "steps": steps,
        "learning rate": RATE * STEPS / steps,
        "pairs a step": 2 * PAIRS,
        "unet": unet_config,
    }
    if (file := options.results or (None if options.small else RESULTS)) is not None:
        file.write_text(json.dumps({"conditions": conditions, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
