"""Encode beside what people write by hand, in one run: `python -m benchmarks.encode [--pairs 256]`.

The same Pick-a-Pic parquet of JPEGs goes through these hands, each checked for the exact number of images:

- ours: `mapo encode` of the latents as a whole, actor start and commits included;
- a bare loop: the pixels lie decoded in memory, and the VAE runs over them with the same batch and threads, in a
  process of its own; and the same with our environment, which keeps freed memory;
- the usual Ray chain, `read_parquet -> flat_map(decode) -> map_batches(VAE) -> write_parquet`, which passes decoded
  pixels between its stages; as Ray starts it (one thread for an actor of one CPU), and with our threads.

Prints images a second and ratios, the share of the time in which our device was busy, and where the work went;
writes results/encode.json.
"""

import argparse
import io
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for all hands, in this process and in Ray's workers; before torch

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.ingest import base_images, unique
from pipelines.config import EncodeConfig, IngestConfig, SourceConfig
from pipelines.dataset.layout import latents_table
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import Status
from pipelines.dataset.processes import TORCH_ENVIRONMENT
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder
from pipelines.encode.execution import encode
from pipelines.encode.fingerprint import latents_fingerprint
from pipelines.encode.geometry import open_image, place
from pipelines.ingest.execution import ingest

RESULTS = Path(__file__).parent / "results" / "encode.json"
SIDE, BATCH_SIZE, NUM_CPUS, PAIRS_A_PROMPT = 512, 8, 2, 16
NUM_SHARDS = 4
CHANNELS = (
    8,
    16,
    16,
    16,
)  # of the VAE: SDXL's depth, factor 8, narrow enough for two cores


def write_source(file: Path, num_pairs: int) -> int:
    """Pick-a-Pic parquet of JPEGs of SIDE x SIDE, each a file of its own; its bytes of images."""
    images = [_smaller(image) for image in base_images()]
    sides = [[unique(images[(2 * n + s) % len(images)], 2 * n + s) for n in range(num_pairs)] for s in (0, 1)]
    table = pa.table(
        {
            "caption": [f"prompt {n // PAIRS_A_PROMPT}" for n in range(num_pairs)],
            "has_label": [True] * num_pairs, "jpg_0": sides[0], "jpg_1": sides[1],
            "label_0": [float(n % 2) for n in range(num_pairs)], "label_1": [1.0 - n % 2 for n in range(num_pairs)],
        }
    )  # fmt: skip
    pq.write_table(table, file, row_group_size=max(1, num_pairs // NUM_SHARDS), compression="none")
    return sum(len(image) for side in sides for image in side)


def _smaller(jpeg: bytes) -> bytes:
    image = Image.open(io.BytesIO(jpeg)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.save(buffer := io.BytesIO(), "JPEG", quality=90)
    return buffer.getvalue()


def write_model(folder: Path) -> ModelSource:
    """A pipeline of random weights in SDXL's architecture; small text encoders and tokenizers of its own."""
    from diffusers import AutoencoderKL
    from factories import new_pipeline

    pipeline = new_pipeline()
    torch.manual_seed(0)
    pipeline.register_modules(
        vae=AutoencoderKL(
            latent_channels=4, block_out_channels=CHANNELS, layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return ModelSource(str(folder))


def ours(config: EncodeConfig, storage: Storage) -> tuple[int, dict[str, Any]]:
    """`mapo encode` of the latents; text is done before."""
    speed = encode(config, storage)["latents"]
    assert speed is not None
    rows = latents_table(storage, latents_fingerprint(config)).read(["status"])
    return 2 * pc.sum(pc.equal(rows["status"], str(Status.KEPT))).as_py(), speed.to_json()


def preloaded(source: Path) -> list[np.ndarray]:
    """All pixels in batches, decoded as ours are; not timed."""
    columns = pq.read_table(source, columns=["jpg_0", "jpg_1"])
    files = [image for pair in zip(*(column.to_pylist() for column in columns.columns), strict=True) for image in pair]
    pixels = [place(open_image(file), (SIDE, SIDE)).pixels for file in files]
    return [np.stack(pixels[start : start + BATCH_SIZE]) for start in range(0, len(pixels), BATCH_SIZE)]


def bare_loop(source: Path, model: ModelSource, environment: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Nothing but the VAE, in a process of its own; what it loads and decodes before is not counted."""
    command = [sys.executable, "-m", "benchmarks.encode", "--bare", str(source), "--model", model.model]
    done = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True)
    count, seconds = json.loads(done.stdout.splitlines()[-1])
    return count, {"seconds": seconds}


def bare_process(source: Path, model: ModelSource) -> None:
    """What that process does."""
    torch.set_num_threads(NUM_CPUS)
    batches, encoder = preloaded(source), LatentEncoder(model)
    for batch in batches[:2]:
        encoder(batch)
    started = time.monotonic()
    count = sum(len(encoder(batch).to(torch.float16)) for batch in batches)
    print(json.dumps([count, time.monotonic() - started]))


def ray_chain(source: Path, out: Path, model: ModelSource, num_threads: int | None) -> int:
    """What the documentation of Ray Data leads to."""
    import ray.data

    def decoded(row: dict[str, Any]) -> list[dict[str, Any]]:
        pair = []
        for side in ("jpg_0", "jpg_1"):
            pixels = np.asarray(Image.open(io.BytesIO(row[side])).convert("RGB"), np.float32)
            pair.append({"key": row[side][6:18].decode(), "pixels": (pixels / 127.5 - 1).transpose(2, 0, 1)})
        return pair

    class Vae:
        def __init__(self) -> None:
            from diffusers import AutoencoderKL

            if num_threads is not None:
                torch.set_num_threads(num_threads)
            self.vae = AutoencoderKL.from_pretrained(model.vae_folder()).eval()

        @torch.no_grad()
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            latents = self.vae.encode(torch.from_numpy(np.ascontiguousarray(batch["pixels"]))).latent_dist.mean
            return {"key": batch["key"], "latents": latents.half().numpy()}

    images = ray.data.read_parquet(str(source)).select_columns(["jpg_0", "jpg_1"]).flat_map(decoded)
    images.map_batches(Vae, batch_size=BATCH_SIZE, concurrency=1, num_cpus=1).write_parquet(str(out))
    return int(pq.read_table(out, columns=["key"]).num_rows)


def hands(work: Path, num_pairs: int) -> Iterator[tuple[str, Callable[[], tuple[int, dict[str, Any]]]]]:
    """Each hand by name; gives the images it has done and what more it knows."""
    source = work / "pairs.parquet"
    num_bytes = write_source(source, num_pairs)
    storage, model = Storage(str(work / "storage")), write_model(work / "model")
    max_shard_bytes = max(65_536, num_bytes // NUM_SHARDS)
    sources = (SourceConfig(format="pickapic", path=str(source)),)
    ingest(IngestConfig(sources=sources, max_shard_bytes=max_shard_bytes), storage)
    config = EncodeConfig(model=model.model, resolution=SIDE, buckets=False, batch_size=BATCH_SIZE)
    warm = Storage(str(work / "warm"))
    small = work / "small.parquet"
    write_source(small, 16)
    ingest(IngestConfig(sources=(SourceConfig(format="pickapic", path=str(small)),)), warm)
    encode(config, warm)  # modules are in the page cache before anything is timed
    ray_chain(small, work / "warm-chain", model, None)
    yield "ours", lambda: ours(config, storage)
    yield "bare loop", lambda: bare_loop(source, model, {})
    yield "bare loop, our memory", lambda: bare_loop(source, model, TORCH_ENVIRONMENT)
    yield "Ray chain", lambda: (ray_chain(source, work / "chain", model, None), {})
    yield "Ray chain, 2 threads", lambda: (ray_chain(source, work / "chain-2", model, NUM_CPUS), {})


def main() -> None:
    """Run every hand over the same images, round after round; the best round of each counts."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pairs", type=int, default=256)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--model", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.bare:
        bare_process(options.bare, ModelSource(options.model))
        return
    import ray

    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    ray.init(
        address="local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    results: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="mapo-bench-", dir=Path.cwd()) as name:
            for hand, run in hands(Path(name), options.pairs):
                started = time.monotonic()
                count, more = run()
                seconds = more.pop("seconds", 0.0) or time.monotonic() - started
                assert count == 2 * options.pairs, f"{hand}: {count} of {2 * options.pairs} images"
                result = {**more, "images_per_s": round(count / seconds, 2), "seconds": round(seconds, 1)}
                print(f"{hand:<22} {result}", flush=True)
                if seconds < results.get(hand, {}).get("seconds", math.inf):
                    results[hand] = result
    ray.shutdown()
    rate = {hand: result["images_per_s"] for hand, result in results.items()}
    ratios = {f"ours / {hand}": round(rate["ours"] / rate[hand], 2) for hand in rate if hand != "ours"}
    print(json.dumps(ratios, indent=1))
    conditions = {
        "pairs": options.pairs, "side": SIDE, "batch_size": BATCH_SIZE, "cpus": NUM_CPUS, "vae_channels": CHANNELS,
        "shards": NUM_SHARDS, "torch": torch.__version__,
    }  # fmt: skip
    RESULTS.write_text(json.dumps({"conditions": conditions, "results": results, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
