"""What `benchmarks.train_gpu` measures once the fastest way is known; each section yields rows."""

import gc
import importlib.util
import io
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from PIL import Image

from benchmarks import gpu_peak
from benchmarks.gpu_peak import Row, first_line, settle
from benchmarks.precision import STEPS, measure
from benchmarks.train_gpu_released import Released
from benchmarks.train_gpu_trial import Bench, Trainee, Way, made_up
from pipelines.dataset.layout import LATENTS_SCHEMA, TEXT_SCHEMA, latents_table, pairs_table, text_table
from pipelines.dataset.pair import NULL_PROMPT_ID, PAIRS_SCHEMA
from pipelines.dataset.shard import write_shard
from pipelines.dataset.storage import Storage
from training.config import LoraConfig, TrainConfig
from training.data.index import load_index, load_texts
from training.data.loader import PairLoader, PairReader
from training.data.order import Plan
from training.spec import Snapshot

MAPO, DPO = "mapo_paper", "dpo"
GOAL_TIME_RATIO, GOAL_SPEED_UP, GOAL_WAIT_RATIO = 0.82, 2.5, 0.01
PAIRS_A_PROMPT = 15  # Pick-a-Pic v2: 851,293 pairs of 58,960 prompts
FINGERPRINTS = {"latents": "1" * 32, "text": "2" * 32}
ROUNDS = 5
CONVOLUTIONS_TFLOP = {False: 4.87, True: 5.96, "resnets": 5.96, "transformers": 4.87}  # of an image, see TFLOP_A_PAIR
IMAGE_TFLOP = {False: 20.23, True: 25.44, "resnets": 21.32, "transformers": 24.36}


def ways(bench: Bench) -> list[Way]:
    """The configuration's defaults, and the fastest way if it is another."""
    default = Way(2 if bench.small else 8)
    return [default] if bench.best in (None, default) else [default, bench.best]


def goal(is_met: bool) -> str:
    """For people; a missed goal is a result, not a failure."""
    return "met" if is_met else "MISSED"


def cost(bench: Bench) -> Iterator[Row]:
    """MaPO against DPO on one engine: memory with and without the reference on the GPU, then steps in turn."""
    bench.needs_reference = True
    for way in ways(bench):
        note, rows = "", []
        try:
            rows = compared(bench, bench.trainee(), way)
        except RuntimeError as error:  # the fastest way may have no room for the reference
            note = first_line(error)
        if note:
            bench.drop_trainee()
            rows = [{"way": way.text, "note": note}]
        else:
            bench.trainee().bring_reference("cpu")
        yield from rows


def compared(bench: Bench, made: Trainee, way: Way) -> list[Row]:
    """One way: both methods, and what lies between them."""
    made.bring_reference("cpu")
    mine = made.measure(way, bench.seconds / 2, MAPO)
    reference_gb = made.bring_reference(bench.device) / 1e9
    theirs = made.measure(way, bench.seconds / 2, DPO)
    spent: dict[str, list[float]] = {MAPO: [], DPO: []}
    for number in range(ROUNDS):
        for method in (MAPO, DPO) if number % 2 else (DPO, MAPO):
            spent[method].append(sum(made.step(method)))
    ratios = [a / b for a, b in zip(spent[MAPO], spent[DPO], strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4)
    saved = theirs.get("memory GB", 0.0) - mine.get("memory GB", 0.0)
    row: Row = {"way": way.text, "time / dpo": middle, "quartiles": f"{lower:.3f}-{upper:.3f}"}
    row |= {"at most": GOAL_TIME_RATIO, "GB less": saved, "at least": reference_gb}
    row["goal"] = goal(middle <= GOAL_TIME_RATIO and (saved >= reference_gb or not bench.on_gpu))
    return [bench.shares(mine, way), bench.shares(theirs, way, DPO), row]


def precision(bench: Bench) -> Iterator[Row]:
    """How much of a bf16 training the forward pass sees, with masters from the base's float32 file and without."""
    bench.drop_trainee()  # three engines take its place, one of them in float32
    side, steps = (8, 20) if bench.small else (32, STEPS)
    yield from measure(bench.unet_config, bench.work / "base", side=side, device=bench.device, steps=steps)


def data(bench: Bench) -> Iterator[Row]:
    """Steps on pairs that the product's loader reads from the local disk: how long they wait for it."""
    num_pairs = 16 if bench.small else 256
    storage = Storage(str(bench.work / "data"))
    snapshot = write_data(storage, bench, num_pairs)
    index = load_index(storage, snapshot, "train")
    assert len(index) == num_pairs, f"{len(index)} of {num_pairs} pairs"
    for way in ways(bench):
        made = bench.trainee()
        made.use(way)
        made.step(MAPO)  # compiles
        plan = Plan(index.bucket_sizes, way.pairs, way.pairs, seed=0)
        reader = PairReader(storage, load_texts(storage, snapshot))
        groups = (plan.group(number, 0) for number in range(2 * (num_pairs // way.pairs // 2)))
        turns = (((), [index.pair(group.bucket, int(each)) for each in group.elements]) for group in groups)
        loader, keys = PairLoader(reader, turns), set()
        started, first_s = time.monotonic(), 0.0
        for number, (_, batch) in enumerate(loader):
            if number == 0:
                first_s = loader.waited_s  # what a start costs is not a step's
            keys |= {record.pair_key for record in batch.records}
            made.micro_step(MAPO, batch)
        settle(bench.device)
        seconds = time.monotonic() - started
        ratio = (loader.waited_s - first_s) / (seconds - first_s)
        whole = bench.verify(f"data, {way.text}: every pair once", len(keys) == num_pairs // way.pairs * way.pairs)
        row = {"way": way.text, "pairs": len(keys), "pairs/s": len(keys) / (seconds - first_s), "first wait s": first_s}
        row |= {"data wait": ratio, "at most": GOAL_WAIT_RATIO, "each once": whole}
        yield row | {"goal": goal(ratio <= GOAL_WAIT_RATIO)}


def write_data(storage: Storage, bench: Bench, num_pairs: int) -> Snapshot:
    """Tables and shards as encode leaves them, out of the page cache; 256 KiB of latents a pair at 1024 x 1024."""
    made = made_up(bench.unet_config, num_pairs, bench.side, seed=0)
    sizes = json.dumps([8 * bench.side, 8 * bench.side, 0, 0, 8 * bench.side, 8 * bench.side])
    members: dict[str, list[tuple[str, bytes]]] = {"latents": [], "text": []}
    pairs = []
    for number in range(num_pairs):
        key, prompt = f"{number:032x}", f"{number // PAIRS_A_PROMPT + 1:032x}"
        tensors = {"latents_0": made.chosen_BCHW[number].clone(), "latents_1": made.rejected_BCHW[number].clone()}
        data = safetensors.torch.save(tensors, {"time_ids_0": sizes, "time_ids_1": sizes})
        members["latents"].append((f"{key}.safetensors", data))
        row = dict.fromkeys(PAIRS_SCHEMA.names) | {"pair_key": key, "prompt_id": prompt, "label_0": 1.0}
        row |= {"status": "kept", "split": "train", "unit": "unit", "source_uri": "memory", "source_row": number}
        pairs.append(row)
    assert made.pooled_BP is not None
    for number, prompt in enumerate([NULL_PROMPT_ID, *dict.fromkeys(row["prompt_id"] for row in pairs)]):
        at = number % num_pairs
        text = {"prompt_embeds": made.prompt_embeds_BSD[at], "pooled_prompt_embeds": made.pooled_BP[at]}
        data = safetensors.torch.save({name: tensor.clone() for name, tensor in text.items()})
        members["text"].append((f"{prompt}.safetensors", data))
    pairs_table(storage).append("unit", pa.Table.from_pylist(pairs, PAIRS_SCHEMA))
    for kind, name, schema, table in (
        ("latents", "pair_key", LATENTS_SCHEMA, latents_table), ("text", "prompt_id", TEXT_SCHEMA, text_table)
    ):  # fmt: skip
        shard = f"dataset/{kind}/{FINGERPRINTS[kind]}/unit.tar"
        with storage.unfinished(shard) as file:
            written, num_bytes, sha256 = write_shard(file, members[kind])
            forget(str(file))
            storage.upload(shard, file)
        rows = []
        for member in written:
            row = dict.fromkeys(schema.names) | {name: member.name.split(".")[0], "status": "kept", "unit": "unit"}
            row |= {"shard": shard, "shard_bytes": num_bytes, "shard_sha256": sha256, "sha256": member.sha256}
            row |= {"offset": member.offset, "length": member.length, "crc32": member.crc32}
            size = {"bucket_height": 8 * bench.side, "bucket_width": 8 * bench.side} if kind == "latents" else {}
            rows.append(row | size)
        table(storage, FINGERPRINTS[kind]).append("unit", pa.Table.from_pylist(rows, schema))
    return Snapshot(0, FINGERPRINTS["latents"], 0, FINGERPRINTS["text"], 0)


def forget(file: str) -> None:
    """Have it read from the disk again."""
    opened = os.open(file, os.O_RDONLY)
    os.fsync(opened)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(opened)


class Passes:
    """Optimizer steps as `gpu_peak.profile` wants to see them."""

    def __init__(self, made: Trainee) -> None:
        self._made, self.device = made, made.device
        self.batch_size = 2 * made.way.pairs * made.engine.accumulation_steps  # images

    def switch(self) -> None:
        """Nothing is left to set."""

    def run(self, _: int) -> None:
        """One optimizer step."""
        for _ in range(self._made.engine.accumulation_steps):
            self._made.micro_step(MAPO)


def profile(bench: Bench) -> Iterator[Row]:
    """The kernels of the defaults and of the fastest way."""
    for way in ways(bench):
        made = bench.trainee()
        made.use(way)
        made.step(MAPO)
        flop = {"all": IMAGE_TFLOP[way.checkpointing], "convolutions": CONVOLUTIONS_TFLOP[way.checkpointing]}
        found = gpu_peak.profile(Passes(made), flop, bench.peak or 1.0, num_passes=1)
        yield {"limit": f"{way.text}: {found['limit']}"}
        for kernel in found["top"]:
            yield {"way": way.text, **kernel}


def released(bench: Bench) -> Iterator[Row]:
    """The released script's step beside ours, on images in memory and on JPEGs that it decodes."""
    ours: dict[str, float] = {}
    for way in ways(bench):
        row = bench.trainee().measure(way, bench.seconds)
        ours[way.text] = row["pairs/s"]
        yield bench.shares({"step": "ours", **row}, way)
    bench.drop_trainee()
    pairs, side = (2, 64) if bench.small else (8, 1024)
    theirs = partial(Released, bench.unet_config, bench.device, side=side, small=bench.small)
    while pairs:
        try:
            script = theirs(pairs=pairs)
            script.step()
            break
        except torch.cuda.OutOfMemoryError as error:
            note = first_line(error)
        script = None
        settle(bench.device)
        yield {"step": f"released, {pairs} pairs", "note": note}
        pairs //= 2
    assert script is not None, "the released step does not fit"
    for name, jpegs in (("images in memory", None), ("JPEGs decoded in the step", photos(side, 2 * pairs))):
        script.jpegs = jpegs
        settle(bench.device)
        seconds, started = [], time.monotonic()
        while time.monotonic() - started < bench.seconds or len(seconds) < 2:
            begun = time.perf_counter()
            script.step()
            settle_step(bench.device)
            seconds.append(time.perf_counter() - begun)
        rate = script.pairs_a_step / statistics.median(seconds)
        row: Row = {"step": f"released, {name}", "way": f"{pairs} pairs, {script.optimizer_name}", "pairs/s": rate}
        if bench.on_gpu:
            row["memory GB"] = torch.cuda.max_memory_allocated() / 1e9
        yield row
        for text, mine in ours.items():
            met = goal(mine / rate >= GOAL_SPEED_UP)
            yield {"step": f"ours / released, {name}", "way": text, "speed-up": mine / rate, "goal": met}
    del script
    gc.collect()


def settle_step(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def photos(side: int, count: int) -> list[bytes]:
    """Photo-like JPEGs: smooth shapes under grain."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((side, side))
        grain = np.asarray(coarse, np.int16) + rng.integers(-6, 7, (side, side, 1))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(out := io.BytesIO(), "JPEG", quality=85)
        found.append(out.getvalue())
    return found


def engines(bench: Bench) -> Iterator[Row]:
    """Other engines at the configuration's defaults; each starts and steps, and says what it takes."""
    bench.drop_trainee()
    wanted: dict[str, tuple[dict[str, Any], int]] = {
        "8-bit AdamW": ({"optimizer": "adamw_8bit"}, 2),
        "no accumulation: 16-bit gradients": ({}, 1),
        "LoRA, rank 64": ({"lora": LoraConfig(rank=64).model_dump()}, 2),
        "fp16": ({"precision": "fp16"}, 2),
        "ZeRO-3": ({"zero_stage": 3}, 2),
        "ZeRO-2, offload cpu": ({"offload": "cpu"}, 2),
    }
    way = ways(bench)[0]
    for name, (changes, accumulation_steps) in wanted.items():
        if bench.small and not changes.keys() <= {"lora"}:
            continue
        if changes.get("optimizer") == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
            yield {"engine": name, "note": "no bitsandbytes here"}
            continue
        if bench.left() < 60 and not bench.small:
            yield {"engine": name, "note": "no time left"}
            continue
        values = TrainConfig(micro_batch_size=8, global_batch_size=16, gradient_checkpointing=False).model_dump()
        config, made, note = TrainConfig.model_validate(values | changes), None, ""
        try:
            made = Trainee(
                bench.unet_config, config, accumulation_steps=accumulation_steps, device=bench.device, side=bench.side
            )
            row = made.measure(replace(way, pairs=way.pairs), bench.seconds)
        except RuntimeError as error:
            note = first_line(error)
        if made is not None:
            made.close()
        yield {"engine": name, "note": note} if note else {"engine": name, **row}
