"""How fast one process of each floor is, against a bare loop over the same bytes.

    python -m benchmarks.floors [NUM_ROWS]

Prints a table and writes `benchmarks/results/floors.json`. Machines are noisy: read the ratios.
"""

import hashlib
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from PIL import Image

from pipelines.config import SourceConfig
from pipelines.dataset.shard import write_shard
from pipelines.dataset.storage import Storage
from pipelines.ingest.execution import write_unit
from pipelines.sources.files import list_files
from pipelines.sources.reader import reader_of
from pipelines.sources.unit import UnitSettings
from training.data.index import Location, PairRecord
from training.data.loader import PairLoader, PairReader
from training.losses import mapo_paper_loss

RESULTS = Path(__file__).parent / "results" / "floors.json"
SIDE = 512
REPEATS = 3


def best_of(action: Callable[[], Any]) -> float:
    """Seconds of the quickest of REPEATS runs."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def write_source(file: Path, num_rows: int) -> int:
    """A Pick-a-Pic parquet file of photo-like JPEGs; returns its image bytes."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(2 * num_rows):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 12, (SIDE, SIDE, 1))
        out = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        images.append(out.getvalue())
    columns = {
        "caption": [f"prompt {i % 16}" for i in range(num_rows)],
        "jpg_0": pa.array(images[:num_rows], pa.binary()),
        "jpg_1": pa.array(images[num_rows:], pa.binary()),
        "label_0": [float(i % 2) for i in range(num_rows)],
        "label_1": [float(1 - i % 2) for i in range(num_rows)],
    }
    pq.write_table(pa.table(columns), file, row_group_size=64, compression="none")
    return sum(map(len, images))


def bare_ingest(source: Path, target: Path) -> None:
    """Read, hash and tar the same rows without looking at an image."""
    with tarfile.open(target, "w") as tar:
        for batch in pq.ParquetFile(source).iter_batches(64):
            for number, row in enumerate(batch.to_pylist()):
                for side in (0, 1):
                    data = row[f"jpg_{side}"]
                    hashlib.sha256(data).hexdigest()
                    info = tarfile.TarInfo(f"{number}.{side}.jpg")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def bench_ingest(work: Path, num_rows: int) -> dict[str, Any]:
    """`write_unit` (validate, hash, tar, upload) against read, hash and tar alone."""
    source = work / "source.parquet"
    num_bytes = write_source(source, num_rows)
    (file,) = list_files(str(source), (".parquet",))
    units = reader_of("pickapic").units(
        SourceConfig(format="pickapic", path=str(source)), file, UnitSettings(1 << 28, "full")
    )
    storage = Storage(str(work / "storage"))
    ours = best_of(lambda: [write_unit(unit, storage) for unit in units])
    bare = best_of(lambda: bare_ingest(source, work / "bare.tar"))
    return _row("ingest, one process", num_rows, "rows", num_bytes, ours, bare)


def bench_loader(work: Path, num_pairs: int) -> dict[str, Any]:
    """SDXL latents at 1024 x 1024 through PairLoader (ranges, digests, prompts) against one whole read."""
    latents = torch.randn(4, 128, 128).half()
    time_ids = {f"time_ids_{side}": "[1024, 1024, 0, 0, 1024, 1024]" for side in (0, 1)}
    data = safetensors.torch.save({"latents_0": latents, "latents_1": latents + 1}, time_ids)
    text = safetensors.torch.save(
        {"prompt_embeds": torch.zeros(77, 2048).half(), "pooled_prompt_embeds": torch.zeros(1280).half()}
    )
    shard = work / "latents.tar"
    members, num_bytes, _ = write_shard(shard, [(f"{i}.safetensors", data) for i in range(num_pairs)] + [("t", text)])
    storage = Storage(str(work))
    *pairs, prompt = [Location(shard.name, m.offset, m.length, m.sha256, m.crc32) for m in members]
    records = [PairRecord(str(i), "p", 1.0, where, "benchmark") for i, where in enumerate(pairs)]
    groups = [(i, records[i : i + 8]) for i in range(0, num_pairs, 8)]
    ours = best_of(lambda: list(PairLoader(PairReader(storage, {"p": prompt}), groups)))
    bare = best_of(lambda: hashlib.sha256(shard.read_bytes()).hexdigest())
    return _row("loader, 1024 x 1024", num_pairs, "pairs", num_bytes, ours, bare)


def bench_loss(batch: int) -> dict[str, Any]:
    """The loss with its gradient against the bare mean of the errors with its gradient."""
    chosen, rejected = torch.rand(batch, requires_grad=True), torch.rand(batch, requires_grad=True)
    ours = best_of(lambda: [mapo_paper_loss(chosen, rejected, beta=8.0).mean().backward() for _ in range(100)])
    bare = best_of(lambda: [(chosen - rejected).mean().backward() for _ in range(100)])
    return _row("loss and gradient", 100 * batch, "pairs", 0, ours, bare)


def _row(name: str, count: int, unit: str, num_bytes: int, ours_s: float, bare_s: float) -> dict[str, Any]:
    return {
        "what": name,
        "rate": round(count / ours_s, 1),
        "unit": f"{unit}/s",
        "mb_per_s": round(num_bytes / ours_s / 1e6, 1),
        "bare_rate": round(count / bare_s, 1),
        "ratio": round(bare_s / ours_s, 3),
    }


def main(num_rows: int) -> None:
    """Run all and write the results with their conditions."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mapo-bench-") as folder:
        rows = [bench_ingest(Path(folder), num_rows), bench_loader(Path(folder), num_rows), bench_loss(8)]
    conditions = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "num_rows": num_rows,
        "torch": torch.__version__,
    }
    RESULTS.write_text(json.dumps({"conditions": conditions, "results": rows}, indent=1) + "\n")
    for row in rows:
        sys.stdout.write(
            f"{row['what']:<22} {row['rate']:>10,.1f} {row['unit']:<8} {row['mb_per_s']:>8,.1f} MB/s   "
            f"bare {row['bare_rate']:>10,.1f}   ratio {row['ratio']:.3f}\n"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
