"""The samples that every hand of `benchmarks.loader` writes and reads, and what is measured of a hand, in its process.

Runs under two interpreters, ours and the peers': `python -m benchmarks.loader_samples write|read|save HAND PLACE`.
"""

import argparse
import functools
import importlib
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

PAIRS_A_PROMPT = 15  # Pick-a-Pic v2: 851,293 pairs of 58,960 prompts
BATCH_SIZE, NUM_WORKERS = 8, 2
SHARD_BYTES = 1 << 26  # MosaicML streaming's and litdata's default; the others' too, here
STEP = 10_000  # of a resume
NUM_NOISES = 32
TIME_IDS = [1024, 1024, 0, 0, 1024, 1024]

Batches = Iterator[tuple[list[int], torch.Tensor]]
"""The number of each sample, and its chosen latents."""


class Hand(Protocol):
    """One way to keep and load the samples."""

    modules: tuple[str, ...]
    """What is imported before the clock starts."""
    s3_modules: tuple[str, ...]
    """What is imported too if the samples are on S3."""

    def write(self, folder: Path, num_pairs: int) -> None:
        """Keep the samples as users do."""

    def batches(self, url: str, cache: Path, state: dict[str, Any]) -> Batches:
        """One epoch, shuffled, or the rest of it after a saved state."""

    def save(self, url: str, num_pairs: int) -> dict[str, Any]:
        """The state after STEP steps, as a checkpoint would hold it."""


@functools.cache
def _noise() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((2, 4, 128, 128), (77, 2048), (1280,))  # SDXL at 1024 x 1024
    latents, embeds, pooled = (rng.standard_normal((NUM_NOISES, *shape)).astype(np.float16) for shape in shapes)
    return latents, embeds, pooled


def sample(number: int) -> dict[str, Any]:
    """A pair with its prompt; the first value of its chosen latents tells which one it is."""
    latents, embeds, pooled = _noise()
    chosen, rejected = latents[number % NUM_NOISES].copy()
    chosen[0, 0, 0] = number % 1000
    prompt = number // PAIRS_A_PROMPT % NUM_NOISES
    return {
        "number": number, "chosen": chosen, "rejected": rejected, "time_ids": np.float32([TIME_IDS] * 2),
        "prompt_embeds": embeds[prompt], "pooled": pooled[prompt],
    }  # fmt: skip


def epoch_and_rest(num_pairs: int) -> tuple[int, int]:
    """Whole epochs before step STEP, and steps of the next one."""
    return divmod(STEP, num_pairs // BATCH_SIZE)


def measure(hand: Hand, url: str, num_pairs: int, state: dict[str, Any]) -> dict[str, float]:
    """An epoch, checked sample by sample; or the time to the first batch after a resume."""
    for name in hand.modules + (hand.s3_modules if url.startswith("s3://") else ()):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mapo-bench-cache-") as cache:
        cpu_s, started = _cpu_s(), time.monotonic()
        batches = hand.batches(url, Path(cache), state)
        numbers, latents = next(batches)
        first_s = time.monotonic() - started
        if state:
            return {"first_s": round(first_s, 3)}
        seen = list(numbers)
        _check(numbers, latents)
        for numbers, latents in batches:
            seen += numbers
            _check(numbers, latents)
        seconds = time.monotonic() - started
        assert sorted(seen) == list(range(num_pairs)), f"{len(seen)} samples, {len(set(seen))} of {num_pairs}"
        return {
            "samples_per_s": round(num_pairs / seconds, 1),
            "first_s": round(first_s, 3),
            "cpu_us": round((_cpu_s() - cpu_s) / num_pairs * 1e6, 1),
        }


def _check(numbers: list[int], chosen_BCHW: torch.Tensor) -> None:
    assert chosen_BCHW[:, 0, 0, 0].tolist() == [number % 1000 for number in numbers]


def _cpu_s() -> float:
    """Of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    """One hand does one thing; what it measured is the last line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("what", choices=("write", "read", "save"))
    arguments.add_argument("hand")
    arguments.add_argument("place")
    arguments.add_argument("--pairs", type=int, required=True)
    arguments.add_argument("--state", type=json.loads, default={})
    options = arguments.parse_args()
    module, _, name = options.hand.partition(":")
    hand: Hand = getattr(importlib.import_module(module), name)()
    if options.what == "write":
        hand.write(Path(options.place), options.pairs)
    elif options.what == "save":
        print(json.dumps(hand.save(options.place, options.pairs)))
    else:
        print(json.dumps(measure(hand, options.place, options.pairs, options.state)))


if __name__ == "__main__":
    main()
