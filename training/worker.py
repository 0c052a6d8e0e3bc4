"""One worker, from the pinned snapshot to a loop that is ready to step; Ray Train runs it on every rank."""

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray.train
import torch

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.pair import TRAIN, VALIDATION
from training.data.index import PairIndex, PairRecord, load_index, load_texts
from training.data.loader import PairLoader, PairReader
from training.data.order import Plan, flips_of
from training.data.shard_cache import ShardCache
from training.engine import Engine, build_engine, check_machine, dtype_of, quiet_libraries, set_threads
from training.loop import Loop, Turn, run
from training.losses import pair_loss
from training.methods import NEEDS_REFERENCE
from training.model import Base, Denoiser, Reference, add_lora, load_base
from training.samples import SampleGrid
from training.spec import TrainSpec
from training.state.checkpoint import Checkpointer, restore
from training.state.ema import ShardedEma
from training.state.masters import start_from_base
from training.state.parent import load_parent, start_from_parent
from training.state.zero import ZeroState
from training.stop_request import StopRequest
from training.tracking.account import Consumed
from training.tracking.metrics import History
from training.tracking.progress import Progress, StartUp, gather_workers
from training.validation import Validation


def train_worker(work: Mapping[str, Any]) -> None:
    """Train on this rank from the last checkpoint to `max_steps`, or until the driver asks to stop.

    Args:
        work: `spec`, a TrainSpec, and `stop_flag`, from `training.stop_request.new_flag`.
    """
    spec: TrainSpec = work["spec"]
    start_up = StartUp()
    config, context = spec.config, ray.train.get_context()
    on_gpu = ray.train.torch.get_device().type == "cuda"
    set_threads(context.get_local_world_size())
    quiet_libraries()
    check_machine(config)
    with start_up.part("index"):
        index = load_index(spec.storage, spec.snapshot, TRAIN, labels=config.labels)
        held_out = load_index(spec.storage, spec.snapshot, VALIDATION, labels=config.labels)
        plan = make_plan(index, spec)
    with start_up.part("model"):
        # The engine casts a whole UNet anyway, and adapters are made before it does.
        dtype = torch.float32 if config.lora is not None else dtype_of(config)
        base = load_base(spec.unet_source, dtype=dtype, prediction_type=config.prediction_type)
    with start_up.part("engine"):
        engine, denoiser = build(
            base, spec, accumulation_steps=plan.accumulation_steps(context.get_world_size()), on_gpu=on_gpu
        )
    state = ZeroState(engine.unet)
    ema = ShardedEma(state, config.ema) if config.ema else None
    notes: list[str] = []
    with start_up.part("restore"):
        restored = restore(spec.storage, spec.checkpoints, state, ema, note=notes.append)
    if restored is None and spec.parent is not None:
        with start_up.part("parent"):
            start_from_parent(spec, engine.unet.module, state, ema)
    if restored is None and spec.starts_from_float32:
        with start_up.part("masters"):
            note = start_from_base(spec.unet_source, state, ema)
        notes += [note] if note else []
    attempt = agree_on_attempt(spec, engine)
    step, history, consumed = 0, History(), Consumed()
    if restored is not None:
        step, history = restored.state["step"], History.from_dict(restored.state["history"])
        consumed = Consumed.sum(restored.ranks[engine.rank :: engine.world_size])
    cache = make_cache(spec)
    texts = load_texts(spec.storage, spec.snapshot, include_empty_prompt=config.null_prompt == "empty")
    reader = PairReader(spec.storage, texts, cache=cache)
    samples = SampleGrid(held_out, reader, spec, engine, base, ema) if config.sample_every else None
    if samples is not None and samples.note:
        notes.append(samples.note)
    progress = Progress(spec, starts=attempt.number, workers=gather_workers(engine), start_up=start_up, notes=notes)
    loop = Loop(
        spec=spec,
        engine=engine,
        denoiser=denoiser,
        state=state,
        ema=ema,
        loss_of=pair_loss(config.method, config.loss, num_train_timesteps=base.num_train_timesteps),
        loader=PairLoader(reader, turns(plan, index, engine, first_step=step), read_ahead=config.read_ahead),
        reader=reader,
        validation=Validation(held_out, reader, spec, engine, denoiser, ema),
        checkpointer=Checkpointer(
            spec.storage,
            spec.checkpoints,
            rank=engine.rank,
            world_size=engine.world_size,
            zero_stage=config.zero_stage,
            attempt=attempt.name,
            keep=config.keep_checkpoints,
            keep_best=config.keep_best,
            timeout_s=config.collective_timeout_s,
        ),
        samples=samples,
        progress=progress,
        history=history,
        consumed=consumed,
        stop_request=StopRequest(work["stop_flag"], engine.rank),
    )
    try:
        stop = run(loop, first_step=step)
    finally:
        if cache is not None:
            cache.close()
    if stop is not None and engine.is_first:
        spec.storage.write(spec.stop_file, json.dumps([stop.message, stop.hint]).encode())


def build(base: Base, spec: TrainSpec, *, accumulation_steps: int, on_gpu: bool) -> tuple[Engine, Denoiser]:
    """The engine around the UNet, and what computes errors with it; collective."""
    config, reference = spec.config, None
    needs_reference = config.method in NEEDS_REFERENCE
    if config.lora is not None:
        add_lora(base.unet, config.lora, seed=spec.seed)
    frozen = None
    if needs_reference and config.lora is None:
        if spec.parent is not None:
            load_parent(spec, base.unet)
        device = ray.train.torch.get_device() if on_gpu else torch.device("cpu")
        frozen = Reference.copy_of(base.unet, device, dtype_of(config))
        if config.compile:
            frozen.unet.compile_repeated_blocks()
    engine = build_engine(base.unet, config, accumulation_steps=accumulation_steps, on_gpu=on_gpu)
    if needs_reference:
        reference = frozen or Reference.of_adapters(engine.unet)
    return engine, Denoiser(engine.unet, reference, base, config, device=engine.device, dtype=engine.dtype)


def make_plan(index: PairIndex, spec: TrainSpec) -> Plan:
    """The order of the pairs; an empty snapshot is an error with a way out."""
    if not len(index):
        raise SnapshotError(
            f"{spec.storage_url} has no pair to train on", "`mapo data show` says what was kept and what was not"
        )
    config = spec.config
    return Plan(index.bucket_sizes, config.micro_batch_size, config.global_batch_size, spec.seed)


def turns(plan: Plan, index: PairIndex, engine: Engine, *, first_step: int) -> Iterator[tuple[Turn, list[PairRecord]]]:
    """This rank's micro-batches from `first_step` to the end, in the order in which they are trained on."""
    shares = plan.slots_of(engine.rank, engine.world_size)
    for step in range(first_step, engine.config.max_steps):
        for slot, weight in shares:
            group = plan.group(step, slot)
            flips = flips_of(plan.seed, step, slot, len(group.elements), engine.config.flips)
            drawn = zip(group.elements, flips, strict=True)
            yield (step, slot, weight), [index.pair(group.bucket, int(element), sides) for element, sides in drawn]


def make_cache(spec: TrainSpec) -> ShardCache | None:
    """The node's shard cache, if there is to be one."""
    if spec.config.cache_dir is None:
        return None
    return ShardCache(spec.storage, spec.config.cache_dir, max_bytes=spec.config.max_cache_bytes)


@dataclass(frozen=True)
class Attempt:
    """One start of all workers: its number from 1, and a name that no other has and that sorts by number."""

    number: int
    name: str


def agree_on_attempt(spec: TrainSpec, engine: Engine) -> Attempt:
    """Count this start on the storage and name it; collective."""
    agreed: list[Any] = [None]
    if engine.is_first:
        file = f"{spec.checkpoints}/starts.json"
        before = json.loads(spec.storage.read(file))["starts"] if spec.storage.exists(file) else 0
        spec.storage.write(file, json.dumps({"starts": before + 1, "last": time.time()}).encode())
        agreed[0] = Attempt(before + 1, f"{before + 1:04d}-{uuid.uuid4().hex[:8]}")
    torch.distributed.broadcast_object_list(agreed, src=0)
    attempt: Attempt = agreed[0]
    return attempt
