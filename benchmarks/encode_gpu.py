"""SDXL's encoders at full size on one GPU: check them, measure them, print tables; random weights, real JPEGs.

Made for the host that `device` lends: Python 3.12 with its own torch and transformers, no network. Here, first:

    EXTRA="annotated-types typing-extensions" ../shared/tools/offline-gpu-bundle     # 3 minutes; 40 MB in .gpu/b

The tool by itself leaves out `annotated-types`, without which pydantic, and so `pipelines.config`, cannot be imported;
`typing-extensions` is for a host whose own is too old. Nothing here imports Ray, so that part a stays here; what needs
it brings `carry=[".gpu/a"]` and `. .gpu/a/activate` in a call before: both parts pass the 64 MiB of one. Then, each
within 30 s of the one before, or the machine starts anew:

    run(carry=[".gpu/b"], timeout_s=600, command='. .gpu/b/activate && export PYTHONPATH=tests/support:$PYTHONPATH &&
        python3 -m benchmarks.encode_gpu --only environment peak check ours text --results $OUT/encode_gpu.json')
    cp <files_at>/encode_gpu.json benchmarks/results/     # here; the next call adds to it
    run(carry=[".gpu/b"], timeout_s=600, command='. .gpu/b/activate && export PYTHONPATH=tests/support:$PYTHONPATH &&
        python3 -m benchmarks.encode_gpu --only environment peak steps profile;
        cp benchmarks/results/encode_gpu.json $OUT')

`--small` is the rehearsal, on a CPU too (PYTHONPATH=tests/support, under a minute): narrow models, 64 pixels, nothing
written.
Goals: ours at 0.9 of the bare loop of the same settings or more; that loop's best way at 40 % of the bf16 peak.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from benchmarks import gpu_peak
from benchmarks.gpu_peak import Row, at_most, settle
from pipelines.config import EncodeConfig
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import NULL_PROMPT_ID, Status
from pipelines.dataset.shard import write_shard
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, TextEncoder, quiet_diffusers
from pipelines.encode.geometry import open_image
from pipelines.encode.latents import LatentWriter
from pipelines.encode.texts import TextWriter
from pipelines.units.stats import Effort

RESULTS = Path(__file__).parent / "results" / "encode_gpu.json"
UNITS_AT_ONCE, NUM_UNITS = 3, 4  # as `pipelines.encode.execution` calls an actor


@dataclass
class Bench(gpu_peak.Course):
    """What all sections share, and what one leaves for another."""

    work: Path
    small: bool
    batch_size: int
    deadline: float
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    failed: list[str] = field(default_factory=list)
    peak: float = 0.0  # TFLOP/s of bfloat16 products
    best: tuple[gpu_peak.Way, float, gpu_peak.BareLoop] | None = None

    def __post_init__(self) -> None:
        self.side, self.on_gpu = (64 if self.small else 1024), self.device.type == "cuda"
        self.vae_config = gpu_peak.SMALL_VAE_CONFIG if self.small else gpu_peak.VAE_CONFIG
        self.photos, self.storage = photos(self.side, 4 if self.small else 24), Storage(str(self.work / "storage"))
        self.pixels = np.stack([np.asarray(open_image(photo)) for photo in self.photos])
        self.source = write_model(self.work / "model", self.vae_config, None)
        self.flop = gpu_peak.flop_an_image(self.vae_config, self.side)
        self.seconds = 0.2 if self.small else 2.0  # of timing, for each way

    def bare(self, way: Any, batch_size: int) -> gpu_peak.BareLoop:
        """A bare loop over the photos."""
        return gpu_peak.BareLoop(str(self.source.vae_folder()), way, self.device, self.pixels, batch_size)

    def config(self, **settings: Any) -> EncodeConfig:
        """The product's configuration: squares of this side."""
        chosen = {"batch_size": self.batch_size, "resolution": self.side, "buckets": False, **settings}
        return EncodeConfig(model=self.source.model, **chosen)


def photos(side: int, count: int) -> list[bytes]:
    """Photo-like JPEGs, at 1024 pixels of about 170 KB (Pick-a-Pic's mean is 168 KB): smooth shapes under grain."""
    from factories import encoded, picture

    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        grain = rng.normal(0, 3.5, (side, side, 1))
        pixels = np.clip(np.asarray(picture(rng, side, side), np.int16) + grain, 0, 255)
        found.append(encoded(Image.fromarray(pixels.astype(np.uint8)), quality=85))
    return found


def write_model(folder: Path, vae_config: Row, text_device: torch.device | None) -> ModelSource:
    """A pipeline of random weights: this VAE; SDXL's text encoders if a device is given, else tiny ones."""
    quiet_diffusers()
    from diffusers import AutoencoderKL
    from factories import new_pipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    pipeline = new_pipeline()
    torch.manual_seed(0)
    pipeline.register_modules(vae=AutoencoderKL(**vae_config))
    if text_device is not None:
        for end, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
            tokenizer, sizes = getattr(pipeline, f"tokenizer{end}"), gpu_peak.TEXT_ENCODERS[f"text_encoder{end}"]
            marks = {each: getattr(tokenizer, each) for each in ("bos_token_id", "eos_token_id", "pad_token_id")}
            with text_device:
                encoder = kind(CLIPTextConfig(vocab_size=49_408, **sizes, **marks))
            pipeline.register_modules(**{f"text_encoder{end}": encoder})
    pipeline.save_pretrained(folder)
    return ModelSource(str(folder))


def write_unit(bench: Bench, name: str, num_pairs: int) -> pa.Table:
    """A shard of pairs of distinct JPEGs, as ingest would have written it; its rows, as encode plans them."""
    members = []
    for index in range(2 * num_pairs):
        photo, comment = bench.photos[index % len(bench.photos)], f"{name} {index}".encode()
        data = photo[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + photo[2:]
        members.append((f"{name}-{index // 2:06d}.{index % 2}.jpg", data))
    file = Path(bench.storage.path(f"pairs/{name}.tar"))
    file.parent.mkdir(parents=True, exist_ok=True)
    written, _, _ = write_shard(file, members)
    rows = []
    for index in range(num_pairs):
        row: Row = {"pair_key": f"{name}-{index:06d}", "shard": f"pairs/{name}.tar"}
        for side, member in enumerate(written[2 * index : 2 * index + 2]):
            row |= {f"image_{side}_sha256": member.sha256, f"offset_{side}": member.offset}
            row |= {f"length_{side}": member.length, f"orientation_{side}": 1}
            row |= {f"height_{side}": bench.side, f"width_{side}": bench.side}
        rows.append(row)
    return pa.Table.from_pylist(rows)


def kept(rows: pa.Table) -> int:
    """Rows that were kept."""
    return sum(status == str(Status.KEPT) for status in rows["status"].to_pylist())


def environment(bench: Bench) -> list[Row]:
    """Where this runs."""
    found: Row = {"torch": torch.__version__, "cuDNN": torch.backends.cudnn.version(), "device": "cpu"}
    if bench.on_gpu:
        free, total = torch.cuda.mem_get_info()
        found |= {"device": torch.cuda.get_device_name(), "free GB": round(free / 1e9, 1), "GB": round(total / 1e9, 1)}
        asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        if command := shutil.which("nvidia-smi"):
            query = [command, f"--query-gpu={asked}", "--format=csv,noheader"]
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
            found |= dict(zip(asked.split(","), answer.strip().split(", "), strict=False))
    return [{"what": what, "found": value} for what, value in found.items()]


def peak(bench: Bench) -> list[Row]:
    """The ceilings: products by type and a copy; and what an image costs."""
    rows = gpu_peak.matrix_peak(256 if bench.small else 8192, bench.device)
    bench.peak = next(row["TFLOP/s"] for row in rows if row["what"].startswith("bfloat16"))
    for of, tera in bench.flop.items():
        rows.append({"what": f"one image of {bench.side}: {of}", "TFLOP": round(tera, 6)})
    return rows


def check(bench: Bench) -> list[Row]:
    """Numbers against the CPU's, repeatable bytes, and a batch that does not fit."""
    one, rows = bench.pixels[:1], []
    expected = LatentEncoder(bench.source, "float32", torch.device("cpu"))(one)
    unit = write_unit(bench, "check", 6)
    for dtype in ("float32", "tf32", "bfloat16", "float16"):
        found = LatentEncoder(bench.source, dtype)(one)
        worst, bad = float((found - expected).abs().max()), int((~torch.isfinite(found)).sum())
        noise = float((found - expected).square().mean().sqrt())
        ratio = 20 * np.log10(float(expected.max() - expected.min()) / noise) if noise else np.inf
        row = {"vae_dtype": dtype, "max error": f"{worst:.2e}", "PSNR dB": f"{ratio:.1f}", "non-finite": bad}
        if dtype == "float32":
            row["to 1e-4"] = bench.verify("float32 to 1e-4 of the CPU's", worst <= 1e-4)
        if dtype != "float16":  # the configuration refuses it for this VAE
            digests = set()
            for _ in range(2):
                encoder = LatentEncoder(bench.source, dtype)
                writer = LatentWriter(bench.config(vae_dtype=dtype, batch_size=4), bench.storage, "check", encoder)
                written, _ = writer.write(f"check-{dtype}", unit)
                digests.add(tuple(written["shard_sha256"].to_pylist()))
            row["same bytes"] = bench.verify(f"{dtype}: the same bytes twice", len(digests) == 1 and kept(written) == 6)
        rows.append(row)
    return [*rows, halving(bench)]


def halving(bench: Bench) -> Row:
    """Leave the GPU as much memory as batches of 4 take and a quarter more, and ask for batches of 32."""
    if not bench.on_gpu:
        return {"vae_dtype": "halving", "note": "needs a GPU"}
    encoder = LatentEncoder(bench.source, "float32")
    settle(bench.device)
    encoder(np.repeat(bench.pixels[:1], 4, 0))
    cap = 1.25 * torch.cuda.max_memory_reserved()
    settle(bench.device)
    unit = write_unit(bench, "halving", 32)
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    try:
        config = bench.config(batch_size=32)
        rows, effort = LatentWriter(config, bench.storage, "check", encoder).write("halving", unit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    passed = kept(rows) == 32 and effort.num_images == 64 and effort.batch_size < 32
    said = f"{cap / 1e9:.1f} GB: batches of 32 became {effort.batch_size}, {kept(rows)} of 32 pairs kept"
    return {"vae_dtype": "halving", "note": f"{said}: {bench.verify('halving', passed)}"}


def ours(bench: Bench) -> list[Row]:
    """`LatentWriter` over units of JPEGs on the local disk beside bare loops of the same settings, by `vae_dtype`."""
    rows = []
    for dtype, way in gpu_peak.PRODUCT_WAYS.items():
        bare = bench.bare(way, bench.batch_size).measure(bench.seconds)["images/s"]
        encoder = LatentEncoder(bench.source, dtype)
        fed = through_encoder(bench, encoder)
        effort, seconds = written_units(bench, encoder, dtype)
        count, rate = effort.num_images, effort.num_images / seconds
        row: Row = {"vae_dtype": dtype, "batch": effort.batch_size, "images": count, "ours/s": round(rate, 2)}
        row |= {"bare/s": bare, "ours / bare": round(rate / bare, 3), "encoder, fed/s": fed}
        row["busy"] = round(effort.busy_ratio, 3)
        row |= {f"{part} ms": round(1000 * spent / count, 2) for part, spent in effort.seconds.items()}
        if bench.peak:
            row["of bf16 peak"] = round(rate * bench.flop["all"] / bench.peak, 3)
        rows.append(row)
    return rows


def written_units(bench: Bench, encoder: LatentEncoder, dtype: str) -> tuple[Effort, float]:
    """Several units at once, as an actor is called, after a small one that does not count; their cost, and seconds."""
    num_pairs = 4 if bench.small else {"float32": 32, "tf32": 64}.get(dtype, 128)
    units = {f"{dtype}-{n}": write_unit(bench, f"{dtype}-{n}", num_pairs) for n in range(NUM_UNITS)}
    config, effort = bench.config(vae_dtype=dtype), Effort()
    warm = write_unit(bench, f"{dtype}-warm", bench.batch_size)
    LatentWriter(config, bench.storage, "warm", encoder).write(f"{dtype}-warm", warm)
    writer = LatentWriter(config, bench.storage, "ours", encoder)
    started = time.perf_counter()
    with ThreadPoolExecutor(UNITS_AT_ONCE) as calls:
        done = list(calls.map(writer.write, units.keys(), units.values()))
    seconds = time.perf_counter() - started
    for _, cost in done:
        effort.add(cost)
    num_kept = sum(kept(rows) for rows, _ in done)
    bench.verify(f"ours, {dtype}: every pair kept", num_kept == NUM_UNITS * num_pairs)
    return effort, seconds


def through_encoder(bench: Bench, encoder: LatentEncoder) -> float:
    """Images a second of `LatentEncoder` over pixels in memory, one pass ahead as the writer runs it."""
    batch = bench.pixels[np.arange(bench.batch_size) % len(bench.pixels)]
    encoder(batch)
    running, count, started = encoder.launch(batch), bench.batch_size, time.perf_counter()
    while time.perf_counter() - started < bench.seconds:
        following = encoder.launch(batch)
        running.wait()
        running, count = following, count + bench.batch_size
    running.wait()
    return round(count / (time.perf_counter() - started), 2)


def text(bench: Bench) -> list[Row]:
    """`TextWriter` by batch size, in float32 as the product runs it."""
    settle(bench.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # the process's, of sections before
    source = write_model(bench.work / "text", gpu_peak.SMALL_VAE_CONFIG, None if bench.small else bench.device)
    encoder, num_prompts = TextEncoder(source), 64 if bench.small else 1024
    prompts = [f"a photo of red dog {number} on the hill at night" for number in range(num_prompts)]
    identities = [hashlib.sha256(prompt.encode()).hexdigest()[:32] for prompt in prompts]
    table = pa.table({"prompt_id": [*identities, NULL_PROMPT_ID], "prompt": [*prompts, ""]})
    rows = []
    for batch_size in (8, 32, 128):
        config = bench.config(batch_size=batch_size)
        TextWriter(config, bench.storage, "warm", encoder).write(f"text-{batch_size}", table.slice(0, batch_size))
        started = time.perf_counter()
        written, effort = TextWriter(config, bench.storage, "ours", encoder).write(f"text-{batch_size}", table)
        seconds = time.perf_counter() - started
        bench.verify(f"text in batches of {batch_size}: every prompt kept", kept(written) == num_prompts + 1)
        row = {"batch": effort.batch_size, "prompts/s": round((num_prompts + 1) / seconds, 1)}
        rows.append(row | {f"{part} s": round(spent, 3) for part, spent in effort.seconds.items()})
    return rows


def steps(bench: Bench) -> list[Row]:
    """What each step brings the bare loop; its batch sizes; and the attention by itself."""
    if not bench.peak:
        peak(bench)
    found = gpu_peak.Steps(bench.bare, bench.flop["all"], bench.peak, bench.seconds, lambda: bench.left() - 30)
    tokens, size = (bench.side // 8) ** 2, bench.vae_config["block_out_channels"][-1]
    rows = gpu_peak.attention_rows(min(bench.batch_size, 4), tokens, size, bench.device)
    for row in found.ladder(bench.batch_size):
        rows.append(row)
        print(f"  {row}", flush=True)  # a call that is cut short has shown this much
    rows += found.batches(gpu_peak.PRODUCT_WAYS["bfloat16"], (1, 2, 4, 8, 16))
    assert found.best is not None, "no way ran"
    bench.best = found.best
    rows += found.batches(found.best[0], (16, 4, 2, 1))
    bench.best = found.best
    return rows


def profile(bench: Bench) -> list[Row]:
    """The kernels of the product's fastest way, and of the best bare loop."""
    way = gpu_peak.PRODUCT_WAYS["bfloat16"]
    loops = {f"the product's {way.text}": bench.bare(way, bench.batch_size)}
    if bench.best is not None:
        loops[f"the best, {bench.best[0].text}"] = bench.best[2]
    rows = []
    for name, loop in loops.items():
        found = gpu_peak.profile(loop, bench.flop, bench.peak or 1.0)
        rows += [{"limit": f"{name}, batches of {loop.batch_size}: {found['limit']}"}, *found["top"]]
    return rows


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    section.__name__: section for section in (environment, peak, check, ours, text, steps, profile)
}


def show(rows: list[Row]) -> None:
    """Tables: one for each run of rows with the same columns; a text alone is a line."""
    columns: list[str] = []
    for row in rows:
        if len(row) == 1:
            print(*row.values())
            columns = []
            continue
        wanted = list(row)
        if not set(wanted) & set(columns[:1]):
            columns = list(dict.fromkeys(name for other in rows if wanted[0] in other for name in other))
            widths = {c: max(len(c), *(len(str(r.get(c, ""))) for r in rows if wanted[0] in r)) for c in columns}
            print("  ".join(f"{name:<{widths[name]}}" for name in columns))
        print("  ".join(f"{row.get(name, '')!s:<{widths[name]}}" for name in columns).rstrip())


def save(file: Path, bench: Bench, section: str, rows: list[Row]) -> None:
    """Put a section into the file; those of another device are dropped."""
    conditions = {
        "device": torch.cuda.get_device_name() if bench.on_gpu else "cpu", "torch": torch.__version__,
        "side": bench.side, "batch": bench.batch_size, "weights": "random, seed 0", "vae": bench.vae_config,
        "text_encoders": gpu_peak.TEXT_ENCODERS, "TFLOP an image": bench.flop,
    }  # fmt: skip
    before = json.loads(file.read_text()) if file.is_file() else {}
    same = before.get("conditions", {}).get("device") == conditions["device"]
    results = (before["results"] if same else {}) | {section: rows}
    file.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


def main() -> None:
    """Run the sections in turn, each within what is left of the time."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    arguments.add_argument("--small", action="store_true", help="a rehearsal: narrow models, 64 pixels")
    arguments.add_argument("--batch", type=int, default=8, help="images a pass, where sizes are not compared")
    arguments.add_argument("--budget-s", type=float, default=520.0, help="stop after so many seconds")
    arguments.add_argument("--results", type=Path, default=RESULTS)
    options = arguments.parse_args()
    deadline = time.monotonic() + options.budget_s
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # a rehearsal: two threads on busy cores wait for each other
    with tempfile.TemporaryDirectory(prefix="mapo-bench-") as work:
        bench = Bench(Path(work), options.small, options.batch, deadline)
        for section in (each for each in SECTIONS if each in options.only):
            started = time.monotonic()
            print(f"\n== {section} ({bench.left():.0f} s left)", flush=True)
            try:
                with at_most(bench.left()):
                    rows = SECTIONS[section](bench)
            except Exception as error:  # one section must not take the others' results with it
                traceback.print_exc(file=sys.stdout)
                bench.failed.append(f"{section}: {error}")
                continue
            show(rows)
            print(f"-- {section}: {time.monotonic() - started:.1f} s", flush=True)
            if bench.on_gpu and not bench.small:
                save(options.results, bench, section, rows)
    print("\nFAILED: " + "; ".join(bench.failed) if bench.failed else "\nall checks passed")
    raise SystemExit(bool(bench.failed))


if __name__ == "__main__":
    main()
