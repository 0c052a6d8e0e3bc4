"""What MaPO saves against DPO, everything else the same: `python -m benchmarks.cost` (eight minutes; `make bench-cost`).

Two processes hold the product's engine (one rank of ZeRO-2, float32, a UNet of SDXL's depth and an eighth of its
width): one as MaPO needs it, one with DPO's frozen reference beside it. They take steps in turn, one at a time, each
method once a round and every other round backwards, so that what else the machine does meets all alike. The losses are
the product's; methods without a reference share the first process, those with one the second.

Prints and writes to results/cost.json, with gradient checkpointing and without: median seconds of an optimizer step,
the median of its ratio to DPO's step of the same round with the quartiles, the ratio of operations that
`training.flops` counts, and each process's peak memory in these steps. Goals: MaPO's time at most 0.82 of DPO's, its
memory less by at least the reference's weights.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.table import Row, show
from pipelines.dataset.processes import TORCH_ENVIRONMENT

os.environ |= TORCH_ENVIRONMENT  # as the product's workers have it; read when the two processes start

RESULTS = Path(__file__).parent / "results" / "cost.json"
BASELINE = "dpo"
WITHOUT, WITH = "without reference", "with reference"
METHODS = {
    "mapo_paper": WITHOUT, "mapo": WITHOUT, "sft": WITHOUT, "simpo": WITHOUT, "orpo": WITHOUT,
    BASELINE: WITH, "ipo": WITH,
}  # fmt: skip
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

    def step(method: str) -> float:
        return sum(trainee.step(method))

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
        "use": use, "step": step, "flops": flops, "report": report, "forget peak": forget_peak, "peak": peak_bytes,
    }  # fmt: skip
    try:
        while True:
            name, *arguments = pipe.recv()
            pipe.send(commands[name](*arguments))
    except EOFError:
        torch.distributed.destroy_process_group()


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


def rounds(hands: Mapping[str, Hand], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each method's step in each round; a warm-up round is not among them."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(num_rounds + 1):
        if number == 1:
            for hand in hands.values():
                hand.ask("forget peak")
        order = list(METHODS) if number % 2 else list(METHODS)[::-1]
        for method in order:
            spent = hands[METHODS[method]].ask("step", method)
            if number:
                seconds[method].append(spent)
    return seconds


def compare(hands: Mapping[str, Hand], checkpointing: bool, num_rounds: int) -> list[Row]:
    """A row for each method."""
    for hand in hands.values():
        hand.ask("use", checkpointing)
    seconds = rounds(hands, num_rounds)
    peaks = {kind: hand.ask("peak") for kind, hand in hands.items()}
    operations = {method: hands[kind].ask("flops", method, checkpointing) for method, kind in METHODS.items()}
    rows = []
    for method, kind in METHODS.items():
        ratios = [mine / other for mine, other in zip(seconds[method], seconds[BASELINE], strict=True)]
        lower, middle, upper = statistics.quantiles(ratios, n=4)
        rows.append({
            "checkpointing": "all" if checkpointing else "none", "method": method,
            "step s": round(statistics.median(seconds[method]), 4),
            f"time / {BASELINE}": round(middle, 3), "quartiles": f"{lower:.3f}-{upper:.3f}",
            f"operations / {BASELINE}": round(operations[method] / operations[BASELINE], 3),
            "peak MB": round(peaks[kind] / 1e6, 1),
            f"less than {BASELINE} MB": round((peaks[METHODS[BASELINE]] - peaks[kind]) / 1e6, 1),
        })  # fmt: skip
    return rows


def check(reports: Mapping[str, Row], num_rounds: int) -> None:
    """Every step was done by the real engine, and DPO's reference has stayed as it was."""
    for kind, report in reports.items():
        methods = sum(other == kind for other in METHODS.values())
        wanted = 2 * methods * (num_rounds + 1)
        assert report["steps"] == wanted, f"{kind}: {report['steps']} steps, not {wanted}"
        assert report["reference unchanged"], "the reference has changed"
        assert report["stage"] == 2, f"ZeRO-{report['stage']}"
    assert reports[WITH]["reference bytes"] == 4 * reports[WITH]["weights"], "no reference"


def goals(rows: list[Row], reference_bytes: int) -> list[Row]:
    """Whether the product's MaPO keeps what is asked of it."""
    found = []
    for row in rows:
        if row["method"] == "mapo_paper":
            ratio, saved = row[f"time / {BASELINE}"], row[f"less than {BASELINE} MB"]
            met = "met" if ratio <= GOAL_TIME_RATIO and saved >= reference_bytes / 1e6 else "MISSED"
            found.append({
                "checkpointing": row["checkpointing"], "time ratio": ratio, "at most": GOAL_TIME_RATIO,
                "MB less": saved, "at least": round(reference_bytes / 1e6, 1), "goal": met,
            })  # fmt: skip
    return found


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
    rows = [row for checkpointing in (True, False) for row in compare(hands, checkpointing, num_rounds)]
    reports = {kind: hand.ask("report") for kind, hand in hands.items()}
    check(reports, num_rounds)

    found = goals(rows, reports[WITH]["reference bytes"])
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
