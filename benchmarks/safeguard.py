"""Diffusion-DPO's most reported failure, and what holds it: both errors grow while the margin widens.

    python -m benchmarks.safeguard [--small] [--out FOLDER]

Trains the demo's base with `dpo` at a rate that is too high for it, plainly and with each remedy, with three seeds, and
measures the errors on held-out pairs along the way, always with the same noise. Prints the curves as a table, and
writes them to `results/safeguard.json`. Four minutes of one free core; `--small` takes seconds and means nothing.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alignment_data import SOURCE, Data, make_data
from benchmarks.alignment_runs import Setting, denoising_errors, train
from pipelines.dataset.pair import VALIDATION
from pipelines.encode.encoders import quiet_diffusers
from training.model import Base, load_base

RESULTS = Path(__file__).parent / "results"
LEVEL = "near"
RATE = 3e-4
WAYS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "dpo, safeguard 0.6": {"safeguard": 0.6},
    "dpo, safeguard 0.9": {"safeguard": 0.9},
    "dpo, rejected_weight 0.5": {"rejected_weight": 0.5},
    "dpo, sft_weight 1000": {"sft_weight": 1000.0},
}
"""The keys of `train` beside method and rate. DPO's slope at the start is beta / 4 = 1250, the scale of sft_weight."""

Curve = dict[int, dict[str, float]]
"""Finished steps -> mean errors on held-out pairs."""


def curve(base: Base, data: Data, options: dict[str, Any], *, steps: int, every: int, seed: int) -> Curve:
    """Train once, and measure the held-out pairs before the first step and after every `every` steps."""
    found: Curve = {}

    def watch(step: int, unet: Any) -> None:
        if step % every == 0:
            found[step] = denoising_errors(base, unet, data.pairs[LEVEL, VALIDATION])

    config = Setting("dpo", RATE, options=options).train_config(steps, 8)
    train(base, data, LEVEL, config, seed=seed, watch=watch)
    return found


def table(found: dict[str, list[Curve]]) -> str:
    """The curves as text: the mean over the seeds of the chosen and the rejected error, and of the margin."""
    steps = sorted(next(iter(found.values()))[0])
    lines = [
        "| chosen / rejected error after steps | " + " | ".join(map(str, steps)) + " |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for name, curves in found.items():
        cells = []
        for step in steps:
            chosen, rejected = (
                np.mean([each[step][error] for each in curves]) for error in ("mse_chosen", "mse_rejected")
            )
            cells.append(f"{chosen:.3f} / {rejected:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


COLOURS = ("#b3261e", "#1a7f5a", "#0b57d0", "#9a6700", "#6f42c1")
WIDTH, HEIGHT, LEFT, TOP = 640, 360, 60, 20


def figure(found: dict[str, list[Curve]]) -> str:
    """The chosen errors as SVG, one line for each way and seed, on a logarithmic axis from 0.05 to 1."""
    steps = sorted(next(iter(found.values()))[0])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 200} {HEIGHT + 50}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]

    def place(step: int, error: float) -> str:
        down = (math.log(1) - math.log(error)) / (math.log(1) - math.log(0.05))
        return f"{LEFT + step / steps[-1] * (WIDTH - LEFT):.1f},{TOP + down * (HEIGHT - TOP):.1f}"

    for error in (0.05, 0.1, 0.2, 0.5, 1.0):
        (x, y), (end, _) = (place(step, error).split(",") for step in (0, steps[-1]))
        parts.append(f'<path d="M{x},{y}H{end}" stroke="#ddd"/><text x="8" y="{float(y) + 4:.0f}">{error:g}</text>')
    for number, (name, curves) in enumerate(found.items()):
        colour = COLOURS[number % len(COLOURS)]
        for curve_of_seed in curves:
            line = " ".join(place(step, curve_of_seed[step]["mse_chosen"]) for step in steps)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{WIDTH + 10}" y="{40 + 20 * number}" fill="{colour}">{name}</text>')
    parts.append(
        f'<text x="{LEFT}" y="{HEIGHT + 35}">chosen error on held-out pairs by step, 0 to {steps[-1]}</text></svg>'
    )
    return "".join(parts)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="benchmarks.safeguard")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    steps, every, seeds, crops = (4, 2, (0, 1), 1) if given.small else (120, 20, (0, 1, 2), 8)
    quiet_diffusers()
    base, data = load_base(SOURCE), make_data([LEVEL], crops)
    found = {
        name: [curve(base, data, options, steps=steps, every=every, seed=seed) for seed in seeds]
        for name, options in WAYS.items()
    }
    print(table(found))
    for name, curves in found.items():
        growth = [each[steps]["mse_chosen"] / each[0]["mse_chosen"] for each in curves]
        print(f"{name}: chosen error times {', '.join(f'{each:.3f}' for each in growth)} after {steps} steps")
    out = given.out or (None if given.small else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        settings = {"level": LEVEL, "learning_rate": RATE, "steps": steps, "seeds": seeds, "options": WAYS}
        (out / "safeguard.svg").write_text(figure(found) + "\n")
        (out / "safeguard.json").write_text(json.dumps({"settings": settings, "curves": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
