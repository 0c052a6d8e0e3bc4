"""One training worker, from the pinned snapshot to a loop that is ready to step; Ray Train runs it on every rank."""

import contextlib
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
from training.adapter_start import add_starting_adapters, start_from_adapter
from training.data.index import PairIndex, PairRecord, load_index, load_texts
from training.data.loader import PairLoader, PairReader
from training.data.order import Plan, flips_of
from training.data.shard_cache import ShardCache
from training.early_exit import StopRequest
from training.engine import Engine, build_engine, check_machine, dtype_of, quiet_libraries, set_threads
from training.loop import Draws, Learner, Loop, Saver, Turn, run
from training.methods import METHODS, NEEDS_REFERENCE
from training.model import Base, Denoiser, Reference, add_lora, load_base
from training.objective import Objective
from training.options import check_timesteps
from training.samples import SampleGrid
from training.spec import TrainSpec
from training.state.checkpoint import Checkpointer, restore
from training.state.checkpoint_format import Reader
from training.state.ema import ShardedEma
from training.state.masters import start_from_base
from training.state.parent import load_parent, start_from_parent
from training.state.zero import ZeroState
from training.tracking.account import ConsumedPairs
from training.tracking.metrics import History
from training.tracking.progress import ProgressReporter, StartUp, gather_workers
from training.validation import Validation


def train_worker(work: Mapping[str, Any]) -> None:
    """Train on this rank from the last checkpoint to `max_steps`, or until the driver asks to stop.

    Args:
        work: `spec`, a TrainSpec, and `stop_flag`, from `training.early_exit.new_flag`.
    """
    spec: TrainSpec = work["spec"]
    start_up, notes = StartUp(), list[str]()
    set_threads(ray.train.get_context().get_local_world_size())
    quiet_libraries()
    check_machine(spec.config)
    with start_up.part("index"):
        pairs = load_pairs(spec)
    base, engine, denoiser = load_model(spec, pairs.plan, start_up)
    state = ZeroState(engine.unet)
    ema = ShardedEma(state, spec.config.ema) if spec.config.ema else None
    restored = restore_or_begin(spec, engine, state, ema, start_up, notes)
    start = agree_on_start(spec, engine)
    step, history, consumed = 0, History(), ConsumedPairs()
    if restored is not None:
        step, history = restored.state["step"], History.from_dict(restored.state["history"])
        consumed = ConsumedPairs.sum(restored.ranks[engine.rank :: engine.world_size])
    with opened_reader(spec) as reader:
        samples = open_samples(spec, pairs.held_out, reader, engine, base, ema, notes)
        workers = gather_workers(engine)
        loop = Loop(
            spec=spec,
            learner=make_learner(spec, engine, denoiser, reader, ema),
            loader=PairLoader(
                reader,
                turns(pairs.plan, pairs.index, engine, first_step=step),
                read_ahead=spec.config.read_ahead,
            ),
            validation=Validation(pairs.held_out, reader, spec, engine, denoiser, ema),
            samples=samples,
            saver=Saver(spec, engine, state, ema, make_checkpointer(spec, engine, start), start.number),
            progress=ProgressReporter(spec, starts=start.number, workers=workers, start_up=start_up, notes=notes),
            history=history,
            consumed=consumed,
            stop_request=StopRequest(work["stop_flag"], engine.rank),
        )
        stop = run(loop, first_step=step)
    if stop is not None and engine.is_first:
        spec.storage.write(spec.stop_file, json.dumps([stop.message, stop.hint]).encode())


@dataclass(frozen=True)
class Pairs:
    """The pairs of a run: those to train on, those held out, and the order of the former."""

    index: PairIndex
    held_out: PairIndex
    plan: Plan


def load_pairs(spec: TrainSpec) -> Pairs:
    """Read the index of the pinned snapshot: the records that the method learns from."""
    method = METHODS[spec.config.method]
    index, held_out = (
        load_index(
            spec.storage, spec.snapshot, split, labels=spec.config.labels, kinds=method.kinds,
            only_good=method.needs_good, balance=split == TRAIN and method.is_balanced,
        )
        for split in (TRAIN, VALIDATION)
    )  # fmt: skip
    return Pairs(index, held_out, make_plan(index, spec))


def load_model(spec: TrainSpec, plan: Plan, start_up: StartUp) -> tuple[Base, Engine, Denoiser]:
    """Load the base and build the engine around its UNet; collective."""
    config, num_workers = spec.config, ray.train.get_context().get_world_size()
    with start_up.part("model"):
        # The engine casts a whole UNet anyway, and adapters are made before it does.
        dtype = torch.float32 if config.lora is not None else dtype_of(config)
        base = load_base(spec.unet_source, dtype=dtype, prediction_type=config.prediction_type)
    with start_up.part("engine"):
        on_gpu = ray.train.torch.get_device().type == "cuda"
        engine, denoiser = build(base, spec, accumulation_steps=plan.accumulation_steps(num_workers), on_gpu=on_gpu)
    return base, engine, denoiser


def restore_or_begin(
    spec: TrainSpec, engine: Engine, state: ZeroState, ema: ShardedEma | None, start_up: StartUp, notes: list[str]
) -> Reader | None:
    """Restore the newest complete checkpoint; without one, load the weights that training starts from; collective.

    Returns:
        The reader of the checkpoint that was restored; None if there was none.
    """
    with start_up.part("restore"):
        restored = restore(spec.storage, spec.checkpoints, state, ema, note=notes.append)
    if restored is None and spec.parent is not None:
        with start_up.part("parent"):
            start_from_parent(spec, engine.unet.module, state, ema)
    if restored is None and spec.adapter_digest is not None:
        with start_up.part("adapters"):
            start_from_adapter(spec, engine.unet.module, state, ema)
    if restored is None and spec.starts_from_float32:
        with start_up.part("masters"):
            note = start_from_base(spec.unet_source, state, ema)
        notes += [note] if note else []
    return restored


@contextlib.contextmanager
def opened_reader(spec: TrainSpec) -> Iterator[PairReader]:
    """Open the reader of pairs, with the node's shard cache if one is configured."""
    config = spec.config
    cache = make_cache(spec)
    texts = load_texts(spec.storage, spec.snapshot, include_empty_prompt=config.null_prompt == "empty")
    try:
        yield PairReader(spec.storage, texts, cache=cache)
    finally:
        if cache is not None:
            cache.close()


def open_samples(
    spec: TrainSpec,
    held_out: PairIndex,
    reader: PairReader,
    engine: Engine,
    base: Base,
    ema: ShardedEma | None,
    notes: list[str],
) -> SampleGrid | None:
    """Prepare the sample grid, if one is configured; append to `notes` why it stays empty."""
    if not spec.config.sample_every:
        return None
    samples = SampleGrid(held_out, reader, spec, engine, base, ema)
    notes += [samples.note] if samples.note else []
    return samples


def make_learner(
    spec: TrainSpec, engine: Engine, denoiser: Denoiser, reader: PairReader, ema: ShardedEma | None
) -> Learner:
    """Build the parts that change weights in a step."""
    config, length = spec.config, denoiser.base.num_train_timesteps
    check_timesteps(config.timesteps, length)
    draws = Draws(
        spec.seed, reader, length, config.prompt_dropout, config.null_prompt, config.timesteps, config.noise_offset
    )
    return Learner(engine, denoiser, Objective(config, denoiser.base, spec.seed), draws, ema)


def make_checkpointer(spec: TrainSpec, engine: Engine, start: "Start") -> Checkpointer:
    """Open this rank's side of the checkpoints."""
    return Checkpointer(
        spec.storage,
        spec.checkpoints,
        rank=engine.rank,
        world_size=engine.world_size,
        zero_stage=spec.config.zero_stage,
        attempt=start.name,
        keep=spec.config.keep_checkpoints,
        keep_best=spec.config.keep_best,
        timeout_s=spec.config.collective_timeout_s,
    )


def build(base: Base, spec: TrainSpec, *, accumulation_steps: int, on_gpu: bool) -> tuple[Engine, Denoiser]:
    """Build the engine around the UNet, and the denoiser that computes errors with it; collective."""
    config, reference = spec.config, None
    needs_reference = config.method in NEEDS_REFERENCE
    if spec.adapter_digest is not None:
        add_starting_adapters(spec, base.unet, with_reference=needs_reference)
    elif config.lora is not None:
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
        of_adapters = Reference.of_adapters if spec.adapter_digest is None else Reference.of_starting_adapters
        reference = frozen or of_adapters(engine.unet)
    return engine, Denoiser(engine.unet, reference, base, config, device=engine.device, dtype=engine.dtype)


def make_plan(index: PairIndex, spec: TrainSpec) -> Plan:
    """Return the order of the pairs; an empty snapshot is an error with a hint."""
    if not len(index):
        raise SnapshotError(
            f"{spec.storage_url} has no pairs to train on", "`mapo data show` says what was kept and what was not"
        )
    config = spec.config
    return Plan(index.bucket_sizes, config.micro_batch_size, config.global_batch_size, spec.seed)


def turns(plan: Plan, index: PairIndex, engine: Engine, *, first_step: int) -> Iterator[tuple[Turn, list[PairRecord]]]:
    """Yield this rank's micro-batches from `first_step` to the end, in training order."""
    shares = plan.slots_of(engine.rank, engine.world_size)
    for step in range(first_step, engine.config.max_steps):
        for slot, weight in shares:
            group = plan.group(step, slot)
            flips = flips_of(plan.seed, step, slot, len(group.elements), engine.config.flips)
            drawn = zip(group.elements, flips, strict=True)
            yield (step, slot, weight), [index.pair(group.bucket, int(element), sides) for element, sides in drawn]


def make_cache(spec: TrainSpec) -> ShardCache | None:
    """Open the node's shard cache, if one is configured."""
    if spec.config.cache_dir is None:
        return None
    return ShardCache(spec.storage, spec.config.cache_dir, max_bytes=spec.config.max_cache_bytes)


@dataclass(frozen=True)
class Start:
    """One start of all workers: its number from 1, and a unique name that sorts by number."""

    number: int
    name: str


def agree_on_start(spec: TrainSpec, engine: Engine) -> Start:
    """Count this start on the storage and name it; collective."""
    agreed: list[Any] = [None]
    if engine.is_first:
        file = f"{spec.checkpoints}/starts.json"
        data = spec.storage.read_if_there(file)
        before = 0 if data is None else json.loads(data)["starts"]
        spec.storage.write(file, json.dumps({"starts": before + 1, "last": time.time()}).encode())
        agreed[0] = Start(before + 1, f"{before + 1:04d}-{uuid.uuid4().hex[:8]}")
    torch.distributed.broadcast_object_list(agreed, src=0)
    start: Start = agreed[0]
    return start
