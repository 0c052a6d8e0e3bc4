"""What `benchmarks.alignment` says: intervals, the table, the answer, the figure and the conditions."""

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.alignment_data import LEVELS, Data
from benchmarks.alignment_runs import LOWER_IS_BETTER, METRICS, Scores
from orchestration.demo.base import BASE_MODEL
from orchestration.demo.scenes import RESOLUTION, subject_of
from pipelines.dataset.pair import TEST

RESAMPLES = 2000
MIN_CONTENT = 0.9
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow", "scikit-image")
Interval = dict[str, float]
Stacked = Mapping[tuple[str, str], Scores]
"""(level, method) -> metric -> seeds by prompts."""


def resampled(values_SP: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bootstrap means of an array of seeds by prompts; both are drawn anew, and arrays of one shape alike.

    Alike, so that differences of methods and levels are paired: they share prompts, noises, seeds and order of pairs.
    Three seeds are few: the share of the seeds in the intervals is rather too narrow.
    """
    rng = np.random.default_rng(0)
    num_seeds, num_prompts = values_SP.shape
    seeds = rng.integers(0, num_seeds, (RESAMPLES, num_seeds))
    prompts = rng.integers(0, num_prompts, (RESAMPLES, num_prompts))
    means: NDArray[np.float64] = values_SP[seeds[:, :, None], prompts[:, None, :]].mean(axis=(1, 2))
    return means


def interval(values_SP: NDArray[np.float64]) -> Interval:
    """The mean with its 95 % interval."""
    low, high = np.percentile(resampled(values_SP), [2.5, 97.5])
    return {"mean": round(float(values_SP.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def table(stacked: Stacked, methods: Sequence[str]) -> dict[str, Any]:
    """level -> method -> metric -> interval."""
    return {
        level: {method: {metric: interval(stacked[level, method][metric]) for metric in METRICS} for method in methods}
        for level in LEVELS
    }


def question(stacked: Stacked, methods: Sequence[str], *, against: str) -> dict[str, Any]:
    """metric -> method -> its lead over `against` at each level, and how much the lead grows from first to last.

    A lead is positive where the method is better, whichever way the metric points.
    """
    first, *_, last = LEVELS

    def leads(method: str, metric: str) -> dict[str, Any]:
        sign = -1 if metric in LOWER_IS_BETTER else 1
        lead = {level: sign * (stacked[level, method][metric] - stacked[level, against][metric]) for level in LEVELS}
        growth = interval(lead[last] - lead[first])
        return {level: interval(values) for level, values in lead.items()} | {"growth": growth | verdict(growth)}

    return {metric: {method: leads(method, metric) for method in methods} for metric in METRICS}


def closest(grid: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """level -> method -> of its grid, the run nearest to the preferred colours that has kept the content.

    What each method can do for whoever does not want too much of the style: one seed, validation prompts.
    """
    found: dict[str, Any] = {level: {} for level in LEVELS}
    for row in sorted(grid, key=lambda row: -row["distance"]):
        if row["content"] >= MIN_CONTENT:
            found[row["level"]][row["method"]] = row
    return found


def verdict(growth: Interval) -> dict[str, str]:
    """What an interval says of the direction."""
    if growth["low"] > 0:
        return {"verdict": "grows"}
    return {"verdict": "shrinks" if growth["high"] < 0 else "undecided"}


def render(report: Mapping[str, Any]) -> str:
    """The tables of a report."""
    lines = [
        f"\n{'level':<8}{'method':<12}" + "".join(f"{metric:<22}" for metric in METRICS) + "error of chosen, rejected"
    ]
    for level, methods in report["table"].items():
        for method, metrics in methods.items():
            cells = "".join(f"{_cell(metrics[metric]):<22}" for metric in METRICS)
            lines.append(f"{level:<8}{method:<12}{cells}{_errors(report, level, method)}")
    for metric in ("both", "distance"):
        lines.append(f"\nlead over dpo in {metric}")
        for method, leads in report["mapo_minus_dpo"][metric].items():
            cells = "".join(f"{name} {_cell(lead, '+')}   " for name, lead in leads.items())
            lines.append(f"{method:<12}{cells}{leads['growth']['verdict']}")
    lines.append(f"\nclosest of the grid with content of {MIN_CONTENT} (validation, one seed)")
    for level, rows in report["closest"].items():
        found = (f"{name} {row['distance']:.3f} style {row['style']:.2f}" for name, row in sorted(rows.items()))
        lines.append(f"{level:<8}{'   '.join(found)}")
    lines.append(f"\n{report['wall_s']:.0f} s, {report['cpu_s']:.0f} s of one core")
    return "\n".join(lines)


def _cell(found: Interval, sign: str = "") -> str:
    return f"{found['mean']:{sign}.3f} [{found['low']:{sign}.2f}, {found['high']:{sign}.2f}]"


def _errors(report: Mapping[str, Any], level: str, method: str) -> str:
    runs = [run for run in report["runs"] if (run["level"], run["method"]) == (level, method)]
    runs = runs or [report["mismatch"][level]]  # the base
    return ", ".join(f"{np.mean([run[name] for run in runs]):.3f}" for name in ("mse_chosen", "mse_rejected"))


def figure(
    pictures: Mapping[tuple[str, str], Sequence[Image.Image]], data: Data, prompts: Sequence[str], rows: Sequence[str]
) -> Image.Image:
    """Levels side by side; a column for one prompt of each photo, a row for the preferred image and each method."""
    subjects = [subject_of(prompt) for prompt in prompts]
    columns = [subjects.index(subject) for subject in dict.fromkeys(subjects)]
    left, top, gap = 84, 18, 14
    width = len(columns) * RESOLUTION + gap
    canvas = Image.new("RGB", (left + len(LEVELS) * width, top + (len(rows) + 1) * RESOLUTION), "white")
    draw = ImageDraw.Draw(canvas)
    for number, level in enumerate(LEVELS):
        pairs = data.pairs[level, TEST]
        preferred = dict(zip(pairs.prompts, pairs.chosen, strict=True))
        draw.text((left + number * width, 3), f"{level}: {LEVELS[level]:.0%} of the style", fill="black")
        for line, row in enumerate(("preferred", *rows)):
            y = top + line * RESOLUTION
            draw.text((4, y + RESOLUTION // 2 - 6), row, fill="black")
            for place, column in enumerate(columns):
                image = pictures[level, row][column] if row in rows else preferred[prompts[column]]
                canvas.paste(image, (left + number * width + place * RESOLUTION, y))
    return canvas


def conditions(size: Any) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    weights = BASE_MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "base_unet_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "criterion": "greatest mean of style x content over samples of the validation prompts; the rate at the "
        "default beta first, then beta at that rate",
        "intervals": "95 % percentile bootstrap over seeds and prompts, both drawn anew, the same draws for all",
        "size": dataclasses.asdict(size),
    }


def write(folder: Path, report: Mapping[str, Any], picture: Image.Image, size: Any) -> None:
    """`alignment.json` and `alignment.jpg`."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = {"conditions": conditions(size), **report}
    lists = {name: everything.pop(name) for name in ("grid", "runs")}
    text = json.dumps(everything, indent=1)
    rows = [f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, found)) + "\n ]" for name, found in lists.items()]
    (folder / "alignment.json").write_text(text.removesuffix("\n}") + ",\n" + ",\n".join(rows) + "\n}\n")
    picture.save(folder / "alignment.jpg", quality=85)
