"""Ingest beside what people write by hand, in one run: `python -m benchmarks.ingest [--gb 8]`.

The same parquet of 1024 x 1024 JPEGs goes through four hands, each checked for the exact number of rows:

- ours, headers only, and ours with every image's stream read (the default);
- a bare loop in one process: pyarrow batches to `webdataset.TarWriter`, which validates and hashes nothing;
- the usual Ray chain, `read_parquet -> map -> write_webdataset(encoder=None)`, and the same with a full Pillow decode.

Prints MB of image bytes a second, ratios, and the peak memory of driver and workers; writes results/ingest.json.
"""

import argparse
import io
import json
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.storage import Storage
from pipelines.ingest.execution import ingest

RESULTS = Path(__file__).parent / "results" / "ingest.json"
SIDE, QUALITY, GRAIN = 1024, 85, 3.5  # about 170 KB each: Pick-a-Pic's mean is 168 KB
NUM_IMAGES = 24
ROWS_A_GROUP, ROWS_A_FILE = 100, 1600
MAX_SHARD_BYTES = 1 << 28
NUM_CPUS = 2


def base_images() -> list[bytes]:
    """Photo-like JPEGs of about 170 KB: smooth shapes under fine grain."""
    rng, found = np.random.default_rng(0), []
    for _ in range(NUM_IMAGES):
        coarse = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
        grain = rng.normal(0, GRAIN, (SIDE, SIDE, 1))
        image = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        image.save(buffer := io.BytesIO(), "JPEG", quality=QUALITY)
        found.append(buffer.getvalue())
    return found


def unique(jpeg: bytes, number: int) -> bytes:
    """The same picture as a file of its own: a comment after the start of the image."""
    comment = f"{number:012d}".encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


def write_source(folder: Path, num_bytes: int) -> tuple[int, int]:
    """Pick-a-Pic parquet of about so many bytes; its rows and its bytes of images."""
    images = base_images()
    pair_bytes = 2 * sum(map(len, images)) // len(images)
    num_rows = -(-num_bytes // pair_bytes // ROWS_A_GROUP) * ROWS_A_GROUP
    written = 0
    folder.mkdir(parents=True)
    for start in range(0, num_rows, ROWS_A_FILE):
        numbers = range(start, min(start + ROWS_A_FILE, num_rows))
        sides = [[unique(images[(2 * n + s) % NUM_IMAGES], 2 * n + s) for n in numbers] for s in (0, 1)]
        written += sum(len(image) for side in sides for image in side)
        table = pa.table(
            {
                "caption": [f"prompt {n // 16}" for n in numbers], "has_label": [True] * len(numbers),
                "jpg_0": sides[0], "jpg_1": sides[1],
                "label_0": [float(n % 2) for n in numbers], "label_1": [1.0 - n % 2 for n in numbers],
            }
        )  # fmt: skip
        pq.write_table(table, folder / f"part-{start:07d}.parquet", row_group_size=ROWS_A_GROUP, compression="none")
    return num_rows, written


def ours(source: Path, out: Path, check: str, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """`mapo ingest` itself."""
    config = IngestConfig(
        sources=(SourceConfig(format="pickapic", path=str(source)),),
        max_shard_bytes=max_shard_bytes, image_check=check,  # type: ignore[arg-type]
    )  # fmt: skip
    ingest(config, Storage(str(out)))
    table = pairs_table(Storage(str(out)))
    return table.read(["status"])["status"].to_pylist().count("kept")


def bare_loop(source: Path, out: Path) -> int:
    """One process: batches to tars, nothing looked at."""
    out.mkdir()
    number = 0
    for file in sorted(source.glob("*.parquet")):
        with webdataset.TarWriter(str(out / f"{file.stem}.tar")) as tar:
            for batch in pq.ParquetFile(file).iter_batches(64):
                for row in batch.to_pylist():
                    label = json.dumps({"caption": row["caption"], "label_0": row["label_0"]}).encode()
                    sample = {"__key__": f"{number:08d}", "0.jpg": row["jpg_0"], "1.jpg": row["jpg_1"], "json": label}
                    tar.write(sample)
                    number += 1
    return number


def ray_chain(source: Path, out: Path, *, decode: bool) -> int:
    """What the documentation of Ray Data leads to."""
    import ray.data

    def sample(row: dict[str, Any]) -> dict[str, Any]:
        if decode:
            for side in ("jpg_0", "jpg_1"):
                Image.open(io.BytesIO(row[side])).convert("RGB")
        label = json.dumps({"caption": row["caption"], "label_0": row["label_0"]}).encode()
        return {"__key__": row["jpg_0"][6:18].decode(), "0.jpg": row["jpg_0"], "1.jpg": row["jpg_1"], "json": label}

    columns = ["caption", "jpg_0", "jpg_1", "label_0"]
    ray.data.read_parquet(str(source)).select_columns(columns).map(sample).write_webdataset(str(out), encoder=None)
    return sum(1 for file in out.glob("*.tar") for _ in webdataset.WebDataset(str(file), shardshuffle=False))


class PeakMemory:
    """The most memory that this process, and any one Ray worker, had of its own while the block ran; bytes."""

    def __enter__(self) -> "PeakMemory":
        self.driver = self.worker = 0
        self._before = _own_bytes(psutil.Process())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        me, workers, number = psutil.Process(), [], 0
        while not self._stop.wait(0.25):
            self.driver = max(self.driver, _own_bytes(me) - self._before)
            if number % 8 == 0:  # to look for processes costs more than to look at them
                workers = me.children(recursive=True)
            number += 1
            for worker in workers:
                try:
                    if worker.name().startswith("ray::"):
                        self.worker = max(self.worker, _own_bytes(worker))
                except psutil.Error:
                    continue

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _own_bytes(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def main() -> None:
    """Run everything, round after round, in an order in which neighbours are compared."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--gb", type=float, default=8.0, help="gigabytes of images")
    arguments.add_argument("--ours-only", action="store_true", help="memory and speed of ours alone")
    arguments.add_argument("--rounds", type=int, default=2, help="the best of so many is told")
    options = arguments.parse_args()
    import ray

    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    ray.init(
        address="local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    with tempfile.TemporaryDirectory(prefix="mapo-bench-", dir=Path.cwd()) as name:
        work = Path(name)
        num_rows, num_bytes = write_source(work / "source", int(options.gb * 1e9))
        print(f"{num_rows:,} rows, {num_bytes / 1e9:.2f} GB of images, {NUM_CPUS} CPUs")
        hands: dict[str, Callable[[Path], int]] = {
            "ours, headers": lambda out: ours(work / "source", out, "header"),
            "bare loop": lambda out: bare_loop(work / "source", out),
            "Ray chain": lambda out: ray_chain(work / "source", out, decode=False),
            "ours, full": lambda out: ours(work / "source", out, "full"),
            "Ray chain, decode": lambda out: ray_chain(work / "source", out, decode=True),
        }
        write_source(work / "warm", 150_000_000)
        for warm in (
            lambda out: ours(work / "warm", out, "full", 1 << 20),
            lambda out: ray_chain(work / "warm", out, decode=True),
        ):
            warm(work / "out")  # workers are started and modules loaded before anything is timed
            shutil.rmtree(work / "out")
        results: dict[str, dict[str, float]] = {}
        for what, hand in list(hands.items()) * options.rounds:
            if options.ours_only and not what.startswith("ours"):
                continue
            out = work / "out"
            os.sync()  # nobody waits for the disk to take in what another wrote
            with PeakMemory() as memory:
                started = time.monotonic()
                count = hand(out)
                seconds = time.monotonic() - started
            assert count == num_rows, f"{what}: {count} of {num_rows} rows"
            shutil.rmtree(out)
            result = {
                "mb_per_s": round(num_bytes / seconds / 1e6, 1), "seconds": round(seconds, 1),
                "driver_mb": round(memory.driver / 1e6), "worker_mb": round(memory.worker / 1e6),
            }  # fmt: skip
            print(f"{what:<20} {result}", flush=True)
            if seconds < results.get(what, {}).get("seconds", math.inf):
                results[what] = result
    ray.shutdown()
    ratios = {}
    if not options.ours_only:
        for mine, other in (
            ("ours, headers", "Ray chain"),
            ("ours, headers", "bare loop"),
            ("ours, full", "Ray chain, decode"),
        ):
            ratios[f"{mine} / {other}"] = round(results[mine]["mb_per_s"] / results[other]["mb_per_s"], 2)
    print(json.dumps(ratios, indent=1))
    conditions = {"gb": round(num_bytes / 1e9, 2), "rows": num_rows, "cpus": NUM_CPUS, "load": os.getloadavg()[0]}
    report = {"conditions": conditions | {"max_shard_bytes": MAX_SHARD_BYTES}, "results": results, "ratios": ratios}
    if not options.ours_only:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
