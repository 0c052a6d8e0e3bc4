"""Training SDXL at full size on one GPU: check it, measure it, print tables; random weights, pairs made up.

Made for the host that `device` lends: Python 3.12 with its own torch, transformers, accelerate and peft, no network.
Here, first, in the project's root, with `.gpu` ignored by git (5 minutes; 29 and 38 MB, and 4 MB of bitsandbytes):

    EXTRA="annotated-types typing-extensions" ../shared/tools/offline-gpu-bundle
    python3 -m pip download -q --no-deps --only-binary=:all: --platform manylinux_2_24_x86_64 -d .gpu/b bitsandbytes
    zip -qd .gpu/b/bitsandbytes-*.whl '*cuda11*' '*cuda12*' '*cuda132*' '*rocm*' '*xpu*'     # leaves CUDA 13.0

`training.engine` imports Ray, so part a goes first: both parts pass the 64 MiB of one call. What calls install stays
while the machine is warm, so each must begin within 30 s of the end of the one before:

    run(carry=[".gpu/a"], timeout_s=120, command='. .gpu/a/activate && python3 -c "import torch"')
    run(carry=[".gpu/b"], timeout_s=600, command='. .gpu/b/activate && python3 -m zipfile -e .gpu/b/*.whl $site &&
        DS_ACCELERATOR=cuda python3 -m benchmarks.train_gpu --only environment peak check micro
        --budget-s 540 --results $OUT/train_gpu.json')
    cp <files_at>/train_gpu.json benchmarks/results/     # here; the next call adds to it, and knows the fastest way
    run(carry=[".gpu/b"], timeout_s=600, command='. .gpu/b/activate && python3 -m zipfile -e .gpu/b/*.whl $site &&
        cp benchmarks/results/train_gpu.json $OUT &&
        DS_ACCELERATOR=cuda python3 -m benchmarks.train_gpu --only environment peak precision cost data profile
        released engines --budget-s 540 --results $OUT/train_gpu.json')

A call that is cut short loses nothing: the file is written after each row, the most important rows come first.
`--small` is the rehearsal, on a CPU too (two minutes): small models, nothing written unless `--results` is given.
Goals: MFU of 45 % of the measured peak, MaPO at 0.82 of DPO's time and less memory by the reference's weights, 2.5
times the released script's step, a data wait below 1 %, a projection of 0.95 (see `benchmarks.precision`).
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import gpu_peak
from benchmarks.gpu_peak import Row, at_most, first_line, settle
from benchmarks.table import show
from benchmarks.train_gpu_checks import check
from benchmarks.train_gpu_sections import cost, data, engines, goal, precision, profile, released
from benchmarks.train_gpu_trial import PUBLISHED_ACCUMULATION, REFERENCE_TFLOP_A_PAIR, TFLOP_A_PAIR, Bench, Way

RESULTS = Path(__file__).parent / "results" / "train_gpu.json"
VERSIONS = ("accelerate", "bitsandbytes", "deepspeed", "diffusers", "peft", "transformers")
MAX_WAY_S = 120.0  # compilation included
SIZES = (8, 1, 2, 4, 16, 32)  # pairs of a micro-batch; the default first, the largest with full checkpointing alone
SMALL_SIZES = (2, 1, 4)
STEPS = (
    ("pinned memory", {"pinned": True}),
    ("compiled blocks", {"compiled": True}),
    ("cudnn.benchmark", {"benchmark": True}),
    ("channels first", {"channels_last": False}),
    ("attention cudnn", {"attention": "cudnn"}),
    ("attention flash", {"attention": "flash"}),
    ("attention efficient", {"attention": "efficient"}),
)
"""Each is tried upon the fastest way so far, and kept if it gains a hundredth."""
WORTH = 1.01
GOAL_MFU = 0.45  # of the measured peak


def environment(bench: Bench) -> Iterator[Row]:
    """Where this runs."""
    from benchmarks import encode_gpu

    yield from encode_gpu.environment(bench)
    for name in VERSIONS:
        try:
            yield {"what": name, "found": metadata.version(name)}
        except metadata.PackageNotFoundError:
            yield {"what": name, "found": "none"}


def peak(bench: Bench) -> Iterator[Row]:
    """The ceilings, and what a pair costs."""
    rows = gpu_peak.matrix_peak(256 if bench.small else 8192, bench.device)
    bench.peak = next(row["TFLOP/s"] for row in rows if row["what"].startswith("bfloat16"))
    yield from rows
    for checkpointing, tera in TFLOP_A_PAIR.items():
        yield {"what": f"a pair, checkpointing {checkpointing}", "TFLOP": tera}
    yield {"what": "a reference's part of a pair", "TFLOP": REFERENCE_TFLOP_A_PAIR}


def micro(bench: Bench) -> Iterator[Row]:
    """Pairs a second by checkpointing and micro-batch; then, upon the fastest, one setting after the other."""
    grid, sizes = Grid(bench), SMALL_SIZES if bench.small else SIZES
    for checkpointing in (True, False, "resnets", "transformers"):
        for pairs in sizes if checkpointing is True else sorted(sizes)[:-1]:
            yield grid.row(Way(pairs, checkpointing))
    for name, change in STEPS:
        assert bench.best is not None, "no way ran"
        if bench.best.compiled and "compiled" in change:
            continue
        yield {"step": name, **grid.row(replace(bench.best, **change))}
        if bench.best.compiled and "compiled" in change:  # with less memory for a block, other checkpointing may win
            for checkpointing in (False, "resnets", True):
                largest = grid.largest(checkpointing)
                for pairs in (largest, 2 * largest) if largest else ():
                    yield grid.row(replace(bench.best, checkpointing=checkpointing, pairs=pairs))
    if grid.mfu:
        yield {"best": f"{bench.best.text}: MFU {grid.mfu:.3f}, at least {GOAL_MFU}: {goal(grid.mfu >= GOAL_MFU)}"}


class Grid:
    """Ways tried one after the other; knows what memory a pair takes, so that few of them run out of it."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._rate = bench, 0.0
        self._gigabytes_a_pair: dict[tuple[bool | str, bool], float] = {}
        self._idle = 0.0
        self._fitted: dict[bool | str, int] = {}
        self.mfu = 0.0

    def largest(self, checkpointing: bool | str) -> int:
        """The most pairs that fitted so far."""
        return self._fitted.get(checkpointing, 0)

    def row(self, way: Way) -> Row:
        """What this way gives, or why it does not."""
        bench, note = self._bench, ""
        if bench.left() < 30 and not bench.small:
            return {"way": way.text, "note": "no time left"}
        if not bench.on_gpu and (way.compiled or way.pinned or way.benchmark):
            return {"way": way.text, "note": "needs a GPU"}
        if needed := self._too_large(way):
            return {"way": way.text, "note": f"does not fit: about {needed:.0f} GB"}
        try:
            with at_most(min(MAX_WAY_S, bench.left() - 15) if bench.on_gpu else MAX_WAY_S):
                row = bench.trainee().measure(way, bench.seconds)
        except (RuntimeError, TimeoutError) as error:  # out of memory is a RuntimeError
            note = first_line(error)
        if note:
            bench.drop_trainee()  # caught in the middle of a step, it is good for nothing more
            return {"way": way.text, "note": note}
        self._learn(way, row)
        row = bench.shares(row, way)
        self.mfu = max(self.mfu, row.get("MFU", 0.0))
        return row

    def _learn(self, way: Way, row: Row) -> None:
        self._fitted[way.checkpointing] = max(self._fitted.get(way.checkpointing, 0), way.pairs)
        if self._bench.on_gpu:
            self._idle = row["idle GB"]
            taken = (row["memory GB"] - row["idle GB"]) / way.pairs
            self._gigabytes_a_pair[way.checkpointing, way.compiled] = taken
        if row["pairs/s"] > WORTH * self._rate:
            self._bench.best, self._rate = way, row["pairs/s"]

    def _too_large(self, way: Way) -> float | None:
        """GB, if they are more than there is."""
        kind = way.checkpointing, way.compiled
        if not self._bench.on_gpu or kind not in self._gigabytes_a_pair:
            return None
        needed = self._idle + way.pairs * self._gigabytes_a_pair[kind]
        return needed if needed > 0.97 * torch.cuda.get_device_properties(0).total_memory / 1e9 else None


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    section.__name__: section
    for section in (environment, peak, check, micro, cost, data, precision, profile, released, engines)
}  # fmt: skip


class File:
    """The results, on disk after each row."""

    def __init__(self, path: Path | None, bench: Bench) -> None:
        self._path = path
        device = torch.cuda.get_device_name() if bench.on_gpu else "cpu"
        self._content: Row = {"conditions": {"device": device}, "results": {}}
        if path is not None and path.is_file():
            before = json.loads(path.read_text())
            if before["conditions"]["device"] == device:  # one card's numbers beside another's would be compared
                self._content = before
        self._content["conditions"] |= {
            "torch": torch.__version__, "small": bench.small, "weights": "random, seed 0", "latents": bench.side,
            "unet": bench.unet_config, "pairs/s": f"at {PUBLISHED_ACCUMULATION} micro-batches an optimizer step",
        }  # fmt: skip
        if best := self._content["results"].get("best"):
            bench.best = Way(**best)

    def begin(self, section: str) -> None:
        """Its rows of a run before go."""
        self._content["results"][section] = []

    def add(self, section: str, row: Row, bench: Bench) -> None:
        """One row more."""
        self._content["results"][section].append(row)
        if bench.best is not None:
            self._content["results"]["best"] = asdict(bench.best)
        if self._path is not None:
            self._path.write_text(json.dumps(self._content, indent=1) + "\n")


def run(section: str, bench: Bench, file: File) -> None:
    """One section within what is left of the time; an error in it must not take the others' results with it."""
    started, rows, failure = time.monotonic(), [], ""
    print(f"\n== {section} ({bench.left():.0f} s left)", flush=True)
    file.begin(section)
    try:
        with at_most(bench.left()):
            for row in SECTIONS[section](bench):
                rows.append(row)
                file.add(section, row, bench)
                print(f"  {row}", flush=True)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        failure = f"{section}: {first_line(error)}"
    if failure:
        bench.failed.append(failure)
        bench.drop_trainee()  # only now: the traceback held what lay on the GPU
    show(rows)
    print(f"-- {section}: {time.monotonic() - started:.1f} s", flush=True)


def main() -> None:
    """Run the sections in turn."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    arguments.add_argument("--small", action="store_true", help="a rehearsal: small models")
    arguments.add_argument("--budget-s", type=float, default=540.0, help="stop after so many seconds")
    arguments.add_argument("--results", type=Path, help="where to write, also of a rehearsal")
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # a rehearsal: two threads on busy cores wait for each other
        if not options.small:
            raise SystemExit("this needs a GPU\nhint: `--small` rehearses it on a CPU")
    with tempfile.TemporaryDirectory(prefix="mapo-bench-") as work:
        bench = Bench(Path(work), options.small, time.monotonic() + options.budget_s)
        bench.needs_reference = "cost" in options.only
        file = File(options.results or (None if options.small else RESULTS), bench)
        for section in (each for each in SECTIONS if each in options.only):
            run(section, bench, file)
            settle(bench.device)
        bench.drop_trainee()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    print("\nFAILED: " + "; ".join(bench.failed) if bench.failed else "\nall checks passed")
    raise SystemExit(bool(bench.failed))


if __name__ == "__main__":
    main()
