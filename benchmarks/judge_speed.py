"""Speed and memory of a judge's work on one device; imports torch and the scorers' precision alone."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.scores.scorers.trunks.trunk import full_precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("float32", "tf32", "bfloat16", "float16")
"""Types of a bare loop. Scores are defined in float32 alone; the others show what they would bring."""


@dataclass(frozen=True)
class Speed:
    """Speed of one way to do some work.

    Args:
        images_per_s: Of the best round.
        peak_gib: Most memory of the GPU in use meanwhile, weights included; None on a CPU.
    """

    images_per_s: float
    peak_gib: float | None


def settle() -> None:
    """Wait for the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], num_rounds: int) -> float:
    """Return the seconds of the best round, after one that is not counted."""
    work()
    best = float("inf")
    for _ in range(num_rounds):
        settle()
        started = time.perf_counter()
        work()
        settle()
        best = min(best, time.perf_counter() - started)
    return best


def speed(work: Callable[[], Any], num_images: int, num_rounds: int) -> Speed | None:
    """Measure work on some images; None if the GPU's memory does not hold it."""
    if DEVICE == "cpu":
        return Speed(num_images / timed(work, num_rounds), None)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        seconds = timed(work, num_rounds)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return Speed(num_images / seconds, torch.cuda.max_memory_allocated() / 2**30)


@contextlib.contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Compute without gradients in one of DTYPES: as scorers do, with tf32 products, or under autocast."""
    device = torch.device(DEVICE)
    with full_precision(device):
        if dtype == "float32":
            yield
        elif dtype == "tf32":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
            yield
        else:
            with torch.autocast(DEVICE, dtype=getattr(torch, dtype)):
                yield
