"""MaPO's claim in miniature: is its lead over DPO the larger, the further the preferred images lie from the base?

    python -m benchmarks.alignment [--small] [--out FOLDER]

At each of three levels of mismatch, every method has its learning rate, then its beta, chosen on validation prompts
(most style x content), and is then trained with three seeds and scored on test prompts. Prints tables; writes
`results/alignment.json` and `results/alignment.jpg`. 20 minutes of one free core; `--small` takes seconds, means
nothing, and writes only where `--out` says.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.alignment_data import LEVELS, SOURCE, Data, make_data
from benchmarks.alignment_report import closest, figure, question, render, table, write
from benchmarks.alignment_runs import METRICS, Draws, Judge, Scores, Setting, denoising_errors, train
from orchestration.demo.scenes import RESOLUTION
from pipelines.dataset.pair import TEST, VALIDATION
from pipelines.encode.encoders import quiet_diffusers
from pipelines.samples.drawing import Sampling
from training.methods import METHODS
from training.model import Base, load_base

RESULTS = Path(__file__).parent / "results"
COMPARED = ("sft", "dpo", "mapo", "mapo_paper")
BASE = "base"
CRITERION = "both"
GRID_SEED = 100  # of no final run
VALIDATION_NOISE, TEST_NOISE = 10_000, 20_000  # first seeds of the samples' noise


@dataclass(frozen=True)
class Size:
    """How much is done."""

    learning_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    beta_factors: tuple[float, ...] = (0.04, 0.2, 5.0, 25.0)
    """Times the method's default beta, which has the first pass."""
    seeds: tuple[int, ...] = (0, 1, 2)
    crops_per_scene: int = 8
    steps: int = 48  # one epoch
    batch_size: int = 8
    validation_samples: int = 2
    """Of each of 16 prompts."""
    test_samples: int = 3
    num_inference_steps: int = 10
    guidance_scale: float = 3.0


FULL = Size()
SMALL = Size(
    learning_rates=(1e-3,), beta_factors=(), seeds=(0, 1), crops_per_scene=1, steps=2, batch_size=2,
    validation_samples=1, test_samples=1, num_inference_steps=2,
)  # fmt: skip


class Bench:
    """Everything that runs at one level share."""

    def __init__(self, size: Size) -> None:
        quiet_diffusers()
        self.size = size
        self.base: Base = load_base(SOURCE)
        self.data: Data = make_data(LEVELS, size.crops_per_scene)
        self.judges = {level: Judge(self.data, level) for level in LEVELS}
        self.sampling = Sampling(size.num_inference_steps, size.guidance_scale, RESOLUTION, RESOLUTION)
        some = next(iter(LEVELS))  # the prompts are the same at every level
        self.draws = {
            VALIDATION: Draws.of(
                self.data.pairs[some, VALIDATION], size.validation_samples, first_seed=VALIDATION_NOISE
            ),
            TEST: Draws.of(self.data.pairs[some, TEST], size.test_samples, first_seed=TEST_NOISE),
        }

    def trained(self, level: str, setting: Setting, seed: int) -> Any:
        """A UNet aligned with one level's training pairs."""
        config = setting.train_config(self.size.steps, self.size.batch_size)
        return train(self.base, self.data, level, config, seed=seed)

    def samples(self, unet: Any, split: str) -> list[Image.Image]:
        """What a UNet draws for the prompts of a split."""
        return self.draws[split].images(unet, self.sampling)

    def scores(self, level: str, images: Sequence[Image.Image], split: str) -> Scores:
        """What the level's judge says of them."""
        return self.judges[level].score(images, self.draws[split].prompts)

    def errors(self, level: str, unet: Any) -> dict[str, float]:
        """Denoising errors on the level's test pairs."""
        return denoising_errors(self.base, unet, self.data.pairs[level, TEST])


def candidates(method: str, size: Size) -> tuple[list[Setting], Callable[[Setting], list[Setting]]]:
    """The settings of the first pass, and those of the second, given the best of the first."""
    parameters = METHODS[method].defaults

    def around(best: Setting) -> list[Setting]:
        factors = size.beta_factors if "beta" in parameters else ()
        return [Setting(method, best.learning_rate, {"beta": parameters["beta"] * factor}) for factor in factors]

    return [Setting(method, rate) for rate in size.learning_rates], around


def choose(method: str, size: Size, measure: Callable[[Setting], dict[str, float]]) -> tuple[Setting, list[Any]]:
    """The setting of the greatest CRITERION, and everything that was tried; the first of equals."""
    tried: list[tuple[Setting, dict[str, float]]] = []

    def best() -> Setting:
        return max(tried, key=lambda each: each[1][CRITERION])[0]

    first, second = candidates(method, size)
    for setting in first:
        tried.append((setting, measure(setting)))
    for setting in second(best()):
        tried.append((setting, measure(setting)))
    return best(), tried


def at_edge(setting: Setting, size: Size) -> list[str]:
    """Which of a chosen setting's numbers are the first or last of their grid, so that a wider one may find better."""
    edges = []
    if setting.learning_rate in (min(size.learning_rates), max(size.learning_rates)):
        edges.append("learning_rate")
    default = METHODS[setting.method].defaults.get("beta")
    factors = (1.0, *size.beta_factors)
    if default and setting.loss.get("beta", default) / default in (min(factors), max(factors)):
        edges.append("beta")
    return edges


def run(bench: Bench, say: Callable[[str], None] = print) -> tuple[dict[str, Any], Image.Image]:
    """The whole benchmark: its report, and the figure of samples."""
    started, cpu_started, size = time.monotonic(), time.process_time(), bench.size
    report: dict[str, Any] = {"mismatch": {}, "grid": [], "chosen": {}, "runs": []}
    values: dict[tuple[str, str], list[Scores]] = {}
    pictures: dict[tuple[str, str], list[Image.Image]] = {}
    base_images = {split: bench.samples(bench.base.unet, split) for split in bench.draws}
    for level, strength in LEVELS.items():
        errors = bench.errors(level, bench.base.unet)
        ratio = errors["mse_chosen"] / errors["mse_rejected"]
        report["mismatch"][level] = {"strength": strength, **rounded(errors), "error_ratio": round(ratio, 3)}
        values[level, BASE] = [bench.scores(level, base_images[TEST], TEST)]
        pictures[level, BASE] = base_images[TEST]
        for method in COMPARED:
            setting = grid_of(bench, level, method, report, say)
            for seed in size.seeds:
                unet = bench.trained(level, setting, seed)
                images = bench.samples(unet, TEST)
                scores = bench.scores(level, images, TEST)
                values.setdefault((level, method), []).append(scores)
                pictures.setdefault((level, method), images)
                row = {"level": level, "method": method, "seed": seed, **means(scores)}
                report["runs"].append(row | rounded(bench.errors(level, unet)))
                say(f"{time.monotonic() - started:6.0f} s  {level:<7} {method:<11} seed {seed}  {phrase(scores)}")
    stacked = {key: stack(found, size.test_samples) for key, found in values.items()}
    report["table"] = table(stacked, (BASE, *COMPARED))
    report["closest"] = closest(report["grid"])
    report["mapo_minus_dpo"] = question(stacked, ("mapo", "mapo_paper"), against="dpo")
    report["wall_s"] = round(time.monotonic() - started, 1)
    report["cpu_s"] = round(time.process_time() - cpu_started, 1)
    return report, figure(pictures, bench.data, bench.draws[TEST].prompts, (BASE, *COMPARED))


def grid_of(bench: Bench, level: str, method: str, report: dict[str, Any], say: Callable[[str], None]) -> Setting:
    """The method's setting at a level, by its samples of the validation prompts."""

    def measure(setting: Setting) -> dict[str, float]:
        images = bench.samples(bench.trained(level, setting, GRID_SEED), VALIDATION)
        return means(bench.scores(level, images, VALIDATION))

    setting, tried = choose(method, bench.size, measure)
    report["grid"] += [{"level": level, **named(each), **scores} for each, scores in tried]
    edges = at_edge(setting, bench.size)
    report["chosen"].setdefault(level, {})[method] = named(setting) | {"at_edge": edges}
    edge = f", {' and '.join(edges)} at the grid's edge" if edges else ""
    say(f"{level} {method}: rate {setting.learning_rate:g}, beta {named(setting).get('beta')} of {len(tried)}{edge}")
    return setting


def named(setting: Setting) -> dict[str, Any]:
    """A setting with the default of what it leaves out, in six digits."""
    numbers = {"learning_rate": setting.learning_rate, **METHODS[setting.method].defaults, **setting.loss}
    return {"method": setting.method} | {name: float(f"{value:.6g}") for name, value in numbers.items()}


def means(scores: Scores) -> dict[str, float]:
    """The mean of each metric over the samples."""
    return {metric: round(float(scores[metric].mean()), 4) for metric in METRICS}


def rounded(values: dict[str, float]) -> dict[str, float]:
    """With four decimals."""
    return {name: round(value, 4) for name, value in values.items()}


def phrase(scores: Scores) -> str:
    """The means in one line."""
    return "  ".join(f"{metric} {value:.3f}" for metric, value in means(scores).items())


def stack(seeds: list[Scores], per_prompt: int) -> Scores:
    """Each metric as an array of seeds by prompts: the samples of a prompt are one observation."""
    return {
        metric: np.stack([scores[metric].reshape(-1, per_prompt).mean(axis=1) for scores in seeds])
        for metric in METRICS
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a rehearsal of seconds, whose numbers mean nothing")
    parser.add_argument("--out", type=Path, help="folder for alignment.json and alignment.jpg")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = SMALL if options.small else FULL
    report, picture = run(Bench(size))
    print(render(report))
    if folder := options.out or (None if options.small else RESULTS):
        write(folder, report, picture, size)


if __name__ == "__main__":
    main()
