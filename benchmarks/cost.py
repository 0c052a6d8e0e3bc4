"""What MaPO saves against DPO, everything else the same: `python -m benchmarks.cost` (`make bench-cost`, ten minutes).

Two processes hold the product's engine (one rank of ZeRO-2, float32, a UNet of SDXL's depth and an eighth of its
width): one as MaPO needs it, one with DPO's frozen reference beside it. They take steps in turn, one at a time, every
other round backwards, so that what else the machine does meets all alike. The losses are the product's; methods without
a reference share the first process, those with one the second. The other methods take part in every third round.

Prints and writes to results/cost.json, with gradient checkpointing and without: medians of an optimizer step in seconds
and in seconds of CPU (which others on the machine do not lengthen), the median of its ratios to DPO's steps of the same
rounds with the quartiles, and the ratio of operations that `training.flops` counts. Before, the most memory that is
resident in such a step, with glibc told to give every tensor back at once: what is measured is what lives. Goals:
MaPO's CPU time at most 0.82 of DPO's, its memory less by at least the reference's weights.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.table import Row, show
from pipelines.dataset.processes import TORCH_ENVIRONMENT

os.environ |= TORCH_ENVIRONMENT  # as the product's workers have it; read when the two processes start

RESULTS = Path(__file__).parent / "results" / "cost.json"
MAPO, BASELINE = "mapo_paper", "dpo"
WITHOUT, WITH = "without reference", "with reference"
METHODS = {
    MAPO: WITHOUT, "mapo": WITHOUT, "sft": WITHOUT, "simpo": WITHOUT, "orpo": WITHOUT,
    BASELINE: WITH, "ipo": WITH,
}  # fmt: skip
EVERY_ROUND = (MAPO, BASELINE)
NUM_MEMORY_STEPS = 2  # one of them measured
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of mallopt
GOAL_TIME_RATIO = 0.82


@dataclass(frozen=True)
class Settings:
    """What both processes do."""

    small: bool
    num_threads: int
    side: int
    pairs: int
    accumulation_steps: int


def work(pipe: Connection, settings: Settings, has_reference: bool) -> None:
    """What one process does: it answers commands until the other end is closed."""
    import torch

    from benchmarks import train_gpu_trial as trial
    from training.config import TrainConfig

    torch.set_num_threads(settings.num_threads)
    map_tensors()
    config = TrainConfig(
        micro_batch_size=settings.pairs, global_batch_size=settings.pairs * settings.accumulation_steps,
        precision="fp32", gradient_checkpointing=False, channels_last=False,
    )  # fmt: skip
    trainee = trial.Trainee(
        trial.SMALL_UNET_CONFIG if settings.small else trial.NARROW_UNET_CONFIG, config,
        accumulation_steps=settings.accumulation_steps, device=torch.device("cpu"), side=settings.side,
        has_reference=has_reference,
    )  # fmt: skip
    reference_bytes = trainee.bring_reference("cpu")
    frozen = trainee.reference_digest()

    def use(checkpointing: bool) -> None:
        trainee.use(trial.Way(settings.pairs, checkpointing, channels_last=False))

    def step(method: str) -> tuple[float, float]:
        before = time.process_time()
        wall_s = sum(trainee.step(method))
        return wall_s, time.process_time() - before

    def peak(method: str) -> int:
        trainee.step(method)
        forget_peak()
        trainee.step(method)
        return peak_bytes()

    def report() -> Row:
        unchanged = trainee.reference_digest() == frozen
        return {
            "steps": int(trainee.engine.unet.global_steps), "reference unchanged": unchanged,
            "reference bytes": reference_bytes, "weights": sum(w.numel() for w in trainee.base.unet.parameters()),
            "torch": torch.__version__, "stage": int(trainee.engine.unet.zero_optimization_stage()),
        }  # fmt: skip

    def flops(method: str, checkpointing: bool) -> float:
        return trainee.flops(method, checkpointing).hardware

    commands = {
        "use": use, "step": step, "flops": flops, "report": report, "peak": peak, "keep freed": keep_freed,
    }  # fmt: skip
    try:
        while True:
            name, *arguments = pipe.recv()
            pipe.send(commands[name](*arguments))
    except EOFError:
        torch.distributed.destroy_process_group()


def set_thresholds(mmap: int, trim: int) -> None:
    """Of glibc's malloc, over those of the environment."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_MMAP_THRESHOLD, mmap), "mallopt"
    assert libc.mallopt(M_TRIM_THRESHOLD, trim), "mallopt"


def map_tensors() -> None:
    """Map each tensor by itself, so that freed ones are not resident; slow."""
    set_thresholds(1 << 16, 1 << 17)


def keep_freed() -> None:
    """Reuse freed memory, as the product's workers do: nothing here is as large as these."""
    set_thresholds(2**31 - 1, 2**31 - 1)


def forget_peak() -> None:
    """Give freed memory back to the kernel, and let the peak be what is resident now (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most that was resident since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Hand:
    """One of the two processes; idle unless asked."""

    def __init__(self, settings: Settings, has_reference: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, settings, has_reference), daemon=True)
        self._process.start()
        theirs.close()  # so that its death is an EOFError here

    def ask(self, *command: Any) -> Any:
        """What it answers."""
        self._pipe.send(command)
        return self._pipe.recv()

    def close(self) -> None:
        """Let it end."""
        self._pipe.close()
        self._process.join(60)
        assert self._process.exitcode == 0, f"a process ended with {self._process.exitcode}"


def rounds(hands: Mapping[str, Hand], num_rounds: int) -> dict[str, dict[int, tuple[float, float]]]:
    """Seconds and CPU seconds of each method's step by round; a warm-up round is not among them."""
    spent: dict[str, dict[int, tuple[float, float]]] = {method: {} for method in METHODS}
    for number in range(num_rounds + 1):
        for method in list(METHODS)[:: 1 if number % 2 else -1]:
            if method in EVERY_ROUND or number % 3 == 1:
                took = hands[METHODS[method]].ask("step", method)
                if number:
                    spent[method][number] = took
    return spent


def compare(hands: Mapping[str, Hand], checkpointing: bool, num_rounds: int) -> list[Row]:
    """A row for each method."""
    for hand in hands.values():
        hand.ask("use", checkpointing)
    spent = rounds(hands, num_rounds)
    operations = {method: hands[kind].ask("flops", method, checkpointing) for method, kind in METHODS.items()}
    rows = []
    for method in METHODS:
        row: Row = {"checkpointing": named(checkpointing), "method": method}
        for part, name in enumerate(("s", "CPU s")):
            ratios = [took[part] / spent[BASELINE][number][part] for number, took in spent[method].items()]
            row[f"step {name}"] = round(statistics.median(took[part] for took in spent[method].values()), 4)
            row[f"{name} / {BASELINE}"] = round(statistics.median(ratios), 3)
        lower, _, upper = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(row | {
            "quartiles": f"{lower:.3f}-{upper:.3f}", "rounds": len(ratios),
            f"operations / {BASELINE}": round(operations[method] / operations[BASELINE], 3),
        })  # fmt: skip
    return rows


def memory(hands: Mapping[str, Hand], checkpointing: bool) -> Row:
    """The peaks of MaPO and of the baseline, in processes that have done nothing else before."""
    for hand in hands.values():
        hand.ask("use", checkpointing)
    peaks = {method: hands[METHODS[method]].ask("peak", method) for method in EVERY_ROUND}
    least = hands[WITH].ask("report")["reference bytes"]
    return {
        "checkpointing": named(checkpointing), f"{MAPO} MB": megabytes(peaks[MAPO]),
        f"{BASELINE} MB": megabytes(peaks[BASELINE]), "MB less": megabytes(peaks[BASELINE] - peaks[MAPO]),
        "at least": megabytes(least),
    }  # fmt: skip


def judge(row: Row, rows: list[Row]) -> Row:
    """The row of memory with the ratio of times, and whether the product's MaPO keeps what is asked of it."""
    same = [each for each in rows if (each["checkpointing"], each["method"]) == (row["checkpointing"], MAPO)]
    ratio = same[0][f"CPU s / {BASELINE}"]
    is_met = ratio <= GOAL_TIME_RATIO and row["MB less"] >= row["at least"]
    return row | {"CPU s ratio": ratio, "at most": GOAL_TIME_RATIO, "goal": "met" if is_met else "MISSED"}


def named(checkpointing: bool) -> str:
    """For people."""
    return "all" if checkpointing else "none"


def megabytes(num_bytes: int) -> float:
    """For people."""
    return round(num_bytes / 1e6, 1)


def check(reports: Mapping[str, Row], num_rounds: int) -> None:
    """Every step was done by the real engine, and DPO's reference has stayed as it was."""
    for kind, report in reports.items():
        extra = sum(number % 3 == 1 for number in range(num_rounds + 1))
        methods = [method for method in METHODS if METHODS[method] == kind]
        wanted = 2 * sum(num_rounds + 1 if method in EVERY_ROUND else extra for method in methods)
        wanted += 2 * NUM_MEMORY_STEPS
        assert report["steps"] == wanted, f"{kind}: {report['steps']} steps, not {wanted}"
        assert report["reference unchanged"], "the reference has changed"
        assert report["stage"] == 2, f"ZeRO-{report['stage']}"
    assert reports[WITH]["reference bytes"] == 4 * reports[WITH]["weights"], "no reference"


def main() -> None:
    """Run both settings of gradient checkpointing, check that all was done, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--small", action="store_true", help="a rehearsal: tiny sizes, three rounds, nothing written"
    )
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--threads", type=int, default=1, help="of torch; 1 where others use the machine too")
    arguments.add_argument("--results", type=Path, help="where to write, also of a rehearsal")
    options = arguments.parse_args()
    num_rounds = 3 if options.small else options.rounds
    side, pairs, accumulation_steps = (8, 1, 2) if options.small else (32, 2, 2)
    settings = Settings(options.small, options.threads, side, pairs, accumulation_steps)
    hands = {WITHOUT: Hand(settings, False), WITH: Hand(settings, True)}
    found = [memory(hands, checkpointing) for checkpointing in (True, False)]
    for hand in hands.values():
        hand.ask("keep freed")
    rows = [row for checkpointing in (True, False) for row in compare(hands, checkpointing, num_rounds)]
    found = [judge(row, rows) for row in found]
    reports = {kind: hand.ask("report") for kind, hand in hands.items()}
    check(reports, num_rounds)
    show(rows)
    show(found)
    conditions = {
        "small": settings.small, "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": settings.num_threads, "python": sys.version.split()[0], "torch": reports[WITH]["torch"],
        "engine": "DeepSpeed ZeRO-2, one rank, float32, AdamW", "weights": reports[WITH]["weights"],
        "reference bytes": reports[WITH]["reference bytes"], "latents": [4, side, side], "pairs": pairs,
        "accumulation_steps": accumulation_steps, "rounds": num_rounds,
    }  # fmt: skip
    file = options.results or (None if settings.small else RESULTS)
    if file is not None:
        results = {"methods": rows, "goals": found}
        file.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
    for hand in hands.values():
        hand.close()


if __name__ == "__main__":
    main()
