"""Drawing beside a bare diffusers loop, in one run: `python -m benchmarks.draw [--samples 128]`.

The same prompts and seeds go through these hands with the same model, batch and threads:

- ours: units on Ray Data, from the prompts to committed rows and uploaded PNG shards; once as a whole, with the start
  of the actor and the loading of the model, and once from the first committed unit to the last;
- a bare loop in a process of its own: the loaded pipeline is called with batch after batch, to PIL images that nobody
  keeps; in the environment of our actors, which keeps freed memory.

Prints images a second and the median of the rounds' ratios, since a machine that slows down slows the hands of one
round alike; writes results/draw.json. With `--alternate` both hands run in one process in turn,
without Ray, for a machine that is busy with something else.
"""

import argparse
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for all hands, in this process and in Ray's workers; before torch

import torch

import pipelines.samples.execution as execution
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import prompt_id
from pipelines.dataset.processes import TORCH_ENVIRONMENT
from pipelines.dataset.storage import Storage
from pipelines.samples.drawing import Drawing, DrawnModel, Sampling
from pipelines.samples.fingerprint import samples_fingerprint
from pipelines.samples.plan import pending_samples, wanted_samples
from pipelines.samples.prompts import Prompt
from pipelines.units.workers import Workers

RESULTS = Path(__file__).parent / "results" / "draw.json"
SIDE, STEPS, BATCH_SIZE, NUM_CPUS, IMAGES_A_PROMPT = 128, 30, 8, 2, 2
SAMPLING = Sampling(num_inference_steps=STEPS, guidance_scale=5.0, height=SIDE, width=SIDE)


def texts(num_samples: int) -> list[str]:
    """Distinct prompts."""
    return [f"a photo of a cat on hill {number} at night" for number in range(num_samples // IMAGES_A_PROMPT)]


def ours(storage: Storage, drawing: Drawing) -> tuple[float, float, dict[str, Any]]:
    """Seconds of the whole execution; images a second from the first committed unit to the last; and what it says."""
    moments: list[tuple[float, int]] = []
    append = execution.SampleCommitter.append

    def noted(self: Any, unit: str, rows: Any) -> Any:
        done = append(self, unit, rows)
        moments.append((time.monotonic(), rows.num_rows))
        return done

    execution.SampleCommitter.append = noted  # type: ignore[method-assign]
    started = time.monotonic()
    try:
        (drawn,) = execution.draw(storage, [drawing], Workers("evaluate", batch_size=BATCH_SIZE))
    finally:
        execution.SampleCommitter.append = append  # type: ignore[method-assign]
    seconds = time.monotonic() - started
    assert drawn.num_drawn == drawing.wanted.num_rows
    assert drawn.speed is not None
    steady = sum(count for _, count in moments[1:]) / (moments[-1][0] - moments[0][0])
    return seconds, steady, drawn.speed.to_json()


def bare_loop(model: Path, num_samples: int) -> tuple[int, float]:
    """Images and seconds of the loop, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.draw", "--bare", str(model), "--samples", str(num_samples)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **TORCH_ENVIRONMENT}, check=False)
    assert done.returncode == 0, done.stderr
    count, seconds = json.loads(done.stdout.splitlines()[-1])
    return count, seconds


def new_loop(model: Path) -> Callable[[list[tuple[str, int]]], int]:
    """The loop over texts and seeds with a loaded pipeline, once warm; gives the number of images."""
    from diffusers import StableDiffusionXLPipeline

    torch.set_num_threads(NUM_CPUS)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "height": SIDE, "width": SIDE}

    def call(part: list[tuple[str, int]]) -> int:
        generators = [torch.Generator().manual_seed(seed) for _, seed in part]
        return len(pipeline([text for text, _ in part], generator=generators, **options).images)

    def loop(wanted: list[tuple[str, int]]) -> int:
        return sum(call(wanted[start : start + BATCH_SIZE]) for start in range(0, len(wanted), BATCH_SIZE))

    loop([(text, 0) for text in texts(2 * BATCH_SIZE)])
    return loop


def bare_process(model: Path, num_samples: int) -> None:
    """What that process does."""
    loop = new_loop(model)
    wanted = [(text, index) for text in texts(num_samples) for index in range(IMAGES_A_PROMPT)]
    started = time.monotonic()
    count = loop(wanted)
    print(json.dumps([count, time.monotonic() - started]))


def alternate(model: Path, num_samples: int) -> dict[str, float]:
    """Both hands in this process, unit after unit in turn, without Ray: whatever else runs here slows both alike.

    Nothing of ours overlaps here: a unit is drawn, compressed and stored before the next begins.
    """
    from pipelines.samples.actor import DrawSettings, SampleWriter

    loop, drawn = new_loop(model), DrawnModel("base", ModelSource(str(model)))
    name = samples_fingerprint(drawn, SAMPLING)
    prompts = [Prompt(prompt_id(text), text) for text in texts(num_samples)]
    wanted = wanted_samples(prompts, name, seed=0, images_per_prompt=IMAGES_A_PROMPT)
    seconds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mapo-bench-", dir=Path.cwd()) as work:
        storage = Storage(work)
        writer = SampleWriter({name: (drawn, SAMPLING)}, storage, DrawSettings("evaluate", BATCH_SIZE, NUM_CPUS))
        units = pending_samples(storage, Drawing(drawn, SAMPLING, name, wanted), BATCH_SIZE)
        writer.write(units[0].id, units[0].rows)  # loads the model
        for number, unit in enumerate(units[1:]):
            rows = list(zip(unit.rows["text"].to_pylist(), unit.rows["seed"].to_pylist(), strict=True))
            hands: dict[str, Callable[[], object]] = {
                "ours": functools.partial(writer.write, unit.id, unit.rows), "bare": functools.partial(loop, rows)
            }  # fmt: skip
            for hand in list(hands)[:: 1 if number % 2 else -1]:
                started, busy = time.monotonic(), time.process_time()
                hands[hand]()
                seconds[hand] += time.monotonic() - started  # type: ignore[assignment]
                seconds[f"{hand}, CPU"] += time.process_time() - busy  # type: ignore[assignment]
    count = sum(unit.rows.num_rows for unit in units[1:])
    return {hand: round(count / spent, 2) for hand, spent in seconds.items()}


def rounds(work: Path, num_samples: int, num_rounds: int) -> Iterator[dict[str, Any]]:
    """Both hands, round after round; which one is first changes."""
    from factories import new_pipeline

    model = work / "model"
    new_pipeline().save_pretrained(model)
    drawn = DrawnModel("base", ModelSource(str(model)))
    name = samples_fingerprint(drawn, SAMPLING)
    prompts = [Prompt(prompt_id(text), text) for text in texts(num_samples)]
    wanted = wanted_samples(prompts, name, seed=0, images_per_prompt=IMAGES_A_PROMPT)
    ours(Storage(str(work / "warm")), Drawing(drawn, SAMPLING, name, wanted.slice(0, 64)))  # modules in the page cache
    for number in range(num_rounds):
        result: dict[str, Any] = {}
        for hand in ("ours", "bare")[:: 1 if number % 2 else -1]:
            if hand == "bare":
                count, seconds = bare_loop(model, num_samples)
                result["bare"] = round(count / seconds, 2)
                continue
            drawing = Drawing(drawn, SAMPLING, name, wanted)
            whole_s, steady, said = ours(Storage(str(work / f"storage-{number}")), drawing)
            result |= {"ours": round(steady, 2), "ours, whole": round(num_samples / whole_s, 2), "speed": said}
        yield result


def main() -> None:
    """Run both hands over the same samples, round after round."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--samples", type=int, default=128)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--alternate", action="store_true", help="both in one process, in turn, without Ray")
    arguments.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.bare:
        bare_process(options.bare, options.samples)
        return
    if options.alternate:
        from factories import new_pipeline

        with tempfile.TemporaryDirectory() as model:
            new_pipeline().save_pretrained(model)
            rates = alternate(Path(model), options.samples)
        ratio = {kind: round(rates[f"ours{kind}"] / rates[f"bare{kind}"], 3) for kind in ("", ", CPU")}
        print(json.dumps({"images_per_s": rates, "ours / bare": ratio[""], "of CPU time": ratio[", CPU"]}))
        return
    import ray

    ray.init(
        address="local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mapo-bench-", dir=Path.cwd()) as work:
        for result in rounds(Path(work), options.samples, options.rounds):
            print({hand: rate for hand, rate in result.items() if hand != "speed"}, flush=True)
            found.append(result)
    ray.shutdown()
    ratios = {
        f"{hand} / bare": round(statistics.median(result[hand] / result["bare"] for result in found), 3)
        for hand in ("ours", "ours, whole")
    }
    print(json.dumps(ratios, indent=1))
    conditions = {
        "samples": options.samples, "side": SIDE, "steps": STEPS, "batch_size": BATCH_SIZE, "cpus": NUM_CPUS,
        "rounds": options.rounds, "torch": torch.__version__,
    }  # fmt: skip
    written = {"conditions": conditions, "rounds": found, "ratios": ratios}
    RESULTS.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
