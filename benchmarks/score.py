"""Scoring beside what people write by hand, in one run: `PYTHONPATH=tests/support python -m benchmarks.score`.

The same PNGs are scored by these hands, with random weights in CLIP's architecture, float32, one batch size:

- ours: `score` as a whole, with its rate from the first commit on (without the start of the actor) beside it;
- a bare loop per scorer: prepared tensors lie in memory, and the towers run over them, in this process; once before
  and once after ours, and the mean counts;
- one process per scorer for the family of CLIP-L/14 (aesthetic, clipscore), as scripts are run: each reads, decodes and
  prepares every image, and runs the tower by itself.

Prints images a second and ratios, also by the CPU time of the processes that score, which other work on the machine
disturbs less; writes results/score.json.
"""

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for all hands, in this process and in Ray's workers; before torch

import psutil
import pyarrow as pa
import torch
from scored_images import png, write_images
from scorer_twins import formula_image, formula_tensor, write_clip_tokenizer, write_part

from pipelines.config import ScorerEntry
from pipelines.dataset.storage import Storage
from pipelines.scores import execution, plan
from pipelines.scores.execution import score
from pipelines.scores.judges import prepare_judges
from pipelines.scores.plan import read_scores
from pipelines.scores.scorers import new_scorer
from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.images import Picture
from pipelines.units.workers import Workers

RESULTS = Path(__file__).parent / "results" / "score.json"
SIDE, BATCH_SIZE, NUM_CPUS, NUM_PROMPTS = 256, 16, 2, 16
IMAGES_A_UNIT = 32  # so that the first commit comes soon
FAMILY = ("aesthetic", "clipscore")
WIDTH, LAYERS, PATCH = 768, 12, 16  # ViT-B/16: enough work that decoding is a small part of it, as of ViT-L and ViT-H
SINGLE = ("clipscore", "pickscore", "aesthetic")


def write_weights(root: Path) -> None:
    """Random weights in CLIP's architecture, with the image tower of ViT-B/16, under the names of the parts."""
    from transformers import CLIPConfig, CLIPModel

    write_clip_tokenizer(root)
    for hidden_act, part in (("gelu", "pickscore-v1"), ("quick_gelu", "clip-l14-openai")):
        torch.manual_seed(0)
        tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
                 "num_attention_heads": WIDTH // 64, "hidden_act": hidden_act}  # fmt: skip
        text = {**tower, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = CLIPConfig(
            projection_dim=WIDTH, text_config=text, vision_config={**tower, "patch_size": PATCH, "image_size": 224}
        )
        write_part(root / part, CLIPModel(config).state_dict(), config.to_dict())
    head = {"weight": formula_tensor("twin.head", (1, WIDTH)), "bias": torch.tensor([5.0])}
    write_part(root / "aesthetic-sac-logos-ava1", head)


def prompts_of(count: int) -> list[str]:
    """The prompts of so many images."""
    return [f"a photo of a red cat, number {number % NUM_PROMPTS}" for number in range(count)]


def ours(names: Sequence[str], weights: Path, storage: Storage, images: pa.Table) -> dict[str, Any]:
    """`score` on one actor with both cores; the rate as a whole, and from the first commit on."""
    judges = prepare_judges(entries(names, weights), storage)
    times: list[tuple[float, float, int]] = []
    add = execution.Commits.add

    def timed(self: execution.Commits, rows: pa.Table) -> None:
        add(self, rows)
        times.append((time.monotonic(), cpu_of_actors(), rows.num_rows))

    execution.Commits.add = timed  # type: ignore[method-assign]
    started = time.monotonic()
    try:
        figures = score(storage, judges, images, Workers("score", num_workers=1, device="cpu"))
    finally:
        execution.Commits.add = add  # type: ignore[method-assign]
    seconds = time.monotonic() - started
    assert set(figures.num_scored.values()) == {images.num_rows}
    assert all(read_scores(storage, judge, images)["value"].null_count == 0 for judge in judges)
    steady = sum(count for *_, count in times[1:]) / len(names)
    return {
        "images_per_s": round(steady / (times[-1][0] - times[0][0]), 2),
        "images_per_cpu_s": round(steady / (times[-1][1] - times[0][1]), 2),
        "images_per_s_with_start": round(images.num_rows / seconds, 2),
        "busy_ratio": figures.speed.busy_ratio if figures.speed else 0.0,
    }


def cpu_of_actors() -> float:
    """CPU seconds of the scoring actors so far."""
    seconds = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "MapWorker" in " ".join(process.cmdline()):
                seconds += process.cpu_times().user + process.cpu_times().system
    return seconds


def entries(names: Sequence[str], weights: Path) -> list[ScorerEntry]:
    """Scorers with these weights."""
    return [ScorerEntry(name=name, weights=str(weights), batch_size=BATCH_SIZE) for name in names]


def bare_loop(name: str, weights: Path, files: Sequence[bytes]) -> tuple[float, float]:
    """Nothing but the towers, over prepared tensors; seconds, and CPU seconds."""
    import io

    from PIL import Image

    torch.set_num_threads(NUM_CPUS)
    scorer = new_scorer(name)
    scorer.load(weights, "cpu")
    pictures = [Picture(Image.open(io.BytesIO(file))) for file in files]
    for picture in pictures:
        picture.prepared(scorer.preprocessing)
    prompts = prompts_of(len(files))
    batches = [slice(start, start + BATCH_SIZE) for start in range(0, len(files), BATCH_SIZE)]
    scorer.score_batch(Batch(pictures[batches[0]], prompts[batches[0]], {}))
    started, used = time.monotonic(), time.process_time()
    for each in batches:
        scorer.score_batch(Batch(pictures[each], prompts[each], {}))
    return time.monotonic() - started, time.process_time() - used


def one_process(name: str, weights: Path, folder: Path) -> None:
    """A script for one scorer: reads, decodes and scores every file of a folder; prints the seconds after its start."""
    from PIL import Image

    torch.set_num_threads(NUM_CPUS)
    scorer = new_scorer(name)
    scorer.load(weights, "cpu")
    files = sorted(folder.glob("*.png"))
    prompts = prompts_of(len(files))
    started, used = time.monotonic(), time.process_time()
    for start in range(0, len(files), BATCH_SIZE):
        opened = [Image.open(file) for file in files[start : start + BATCH_SIZE]]
        scorer.score(opened, prompts[start : start + BATCH_SIZE])
    print(json.dumps([time.monotonic() - started, time.process_time() - used]))


def processes(names: Sequence[str], weights: Path, folder: Path, count: int) -> dict[str, Any]:
    """One process for each scorer, one after the other; their starts are not counted."""
    found = []
    for name in names:
        command = [sys.executable, "-m", "benchmarks.score", "--one", name, "--weights", str(weights)]
        done = subprocess.run([*command, "--folder", str(folder)], check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return rates(count, [(sum(each[0] for each in found), sum(each[1] for each in found))])


def rates(count: int, found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Images a second, by the mean of several measurements of seconds and CPU seconds."""
    seconds, used = (sum(each[place] for each in found) / len(found) for place in (0, 1))
    return {"images_per_s": round(count / seconds, 2), "images_per_cpu_s": round(count / used, 2)}


def measure(work: Path, count: int) -> dict[str, dict[str, Any]]:
    """Every hand over the same images, once."""
    write_weights(work / "weights")
    files = [png(formula_image(SIDE, SIDE, seed)) for seed in range(count)]
    (work / "files").mkdir()
    for number, file in enumerate(files):
        (work / "files" / f"{number:05d}.png").write_bytes(file)
    results: dict[str, dict[str, Any]] = {}

    def run(hand: str, result: dict[str, Any]) -> None:
        results[hand] = result
        print(f"{hand:<28} {result}", flush=True)

    for name in SINGLE:
        storage = Storage(str(work / name))
        images = write_images(storage, "a", files, prompts_of(count))
        before = bare_loop(name, work / "weights", files)
        run(f"ours, {name}", ours([name], work / "weights", storage, images))
        after = bare_loop(name, work / "weights", files)
        run(f"bare loop, {name}", rates(count, [before, after]))
    storage = Storage(str(work / "family"))
    images = write_images(storage, "a", files, prompts_of(count))
    run("ours, family", ours(FAMILY, work / "weights", storage, images))
    run("one process per scorer", processes(FAMILY, work / "weights", work / "files", count))
    return results


def ratios_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours by the others, by time and by CPU time."""
    found = {}
    for per in ("images_per_s", "images_per_cpu_s"):
        rate = {hand: result[per] for hand, result in results.items()}
        for name in SINGLE:
            found[f"ours / bare loop, {name}, {per}"] = rate[f"ours, {name}"] / rate[f"bare loop, {name}"]
        found[f"ours / one process per scorer, {per}"] = rate["ours, family"] / rate["one process per scorer"]
    return {name: round(each, 3) for name, each in found.items()}


def main() -> None:
    """Run every hand over the same images."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--images", type=int, default=160)
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    arguments.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.one:
        one_process(options.one, options.weights, options.folder)
        return
    import ray

    plan.IMAGES_A_UNIT = IMAGES_A_UNIT
    ray.init(
        address="local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    with tempfile.TemporaryDirectory(prefix="mapo-bench-", dir=Path.cwd()) as name:
        results = measure(Path(name), options.images)
    ray.shutdown()
    ratios = ratios_of(results)
    print(json.dumps(ratios, indent=1))
    conditions = {
        "images": options.images, "side": SIDE, "batch_size": BATCH_SIZE,
        "images_a_unit": IMAGES_A_UNIT, "cpus": NUM_CPUS, "width": WIDTH,
        "layers": LAYERS, "patch": PATCH, "torch": torch.__version__,
    }  # fmt: skip
    RESULTS.write_text(json.dumps({"conditions": conditions, "results": results, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
