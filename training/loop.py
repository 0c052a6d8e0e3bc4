"""The training loop of one worker. Read it in one sitting: restore, then step, validate, checkpoint."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray.train
import torch
from torch import Tensor

from pipelines.dataset.errors import SnapshotError, TrainingError
from pipelines.dataset.pair import TRAIN, VALIDATION
from training.checkpoint import restore_checkpoint, save_checkpoint
from training.engine import Engine, build_engine, learning_rate_at, set_threads
from training.index import PairIndex, PairRecord, load_index, load_texts
from training.loader import Batch, PairLoader, PairReader
from training.losses import pair_loss
from training.metrics import PAIR_METRICS, pair_metrics
from training.model import Base, denoising_errors, load_base
from training.order import Plan, noise_seed
from training.spec import TrainSpec
from training.validation import validate, validation_groups
from training.workers import Progress, gather_workers

Slot = tuple[int, int]  # step, slot


def train_worker(work: Mapping[str, TrainSpec]) -> None:
    """Train on this rank from the last checkpoint to `max_steps`; Ray Train runs it on every worker."""
    spec = work["spec"]
    config = spec.config
    set_threads(ray.train.get_context().get_local_world_size())
    index = load_index(spec.storage, spec.snapshot, TRAIN)
    held_out = load_index(spec.storage, spec.snapshot, VALIDATION)
    plan = make_plan(index, spec)
    accumulation_steps = plan.accumulation_steps(config.num_workers)
    base = load_base(spec.base)
    engine = build_engine(base.unet, config, accumulation_steps=accumulation_steps)
    step, history, consumed, starts = restore_checkpoint(engine, key=spec.key)
    reader = PairReader(spec.storage, load_texts(spec.storage, spec.snapshot))
    loss_of = pair_loss(config.method, config.loss, num_train_timesteps=base.scheduler.config.num_train_timesteps)
    groups = validation_groups(held_out, config.micro_batch_size, config.max_validation_pairs, engine.world_size)

    def validation(finished: int) -> None:
        if groups:
            metrics = validate(engine, base, reader, groups, loss_of, seed=spec.seed)
            history.validations.append({"step": finished, **metrics})

    def checkpoint(finished: int) -> None:
        save_checkpoint(engine, key=spec.key, step=finished, history=history, consumed=consumed, starts=starts + 1)

    progress = Progress(spec, starts=starts + 1, workers=gather_workers(engine))
    batches = iter(PairLoader(reader, planned_groups(plan, index, engine, first_step=step)))
    with progress.writer(enabled=engine.rank == 0, start=step) as show:
        if step == 0:
            validation(0)
        while step < config.max_steps:
            started = time.monotonic()
            engine.set_learning_rate(learning_rate_at(step, config))
            sums = torch.zeros(len(PAIR_METRICS))
            for _ in range(accumulation_steps):
                (_, slot), batch = next(batches)
                with engine.accelerator.accumulate(engine.unet):
                    noise, timesteps, batch = draw(batch, spec, base, reader, step=step, slot=slot)
                    chosen, rejected = denoising_errors(
                        engine.unet, base, batch, noise, timesteps, device=engine.device, dtype=engine.dtype
                    )
                    losses = loss_of(chosen, rejected)
                    engine.accelerator.backward(losses.mean())
                    engine.optimizer.step()
                    engine.optimizer.zero_grad()
                sums += pair_metrics(losses, chosen, rejected).cpu()
                consumed.add(batch)
            step += 1
            metrics = step_metrics(engine, sums / accumulation_steps, step=step, seconds=time.monotonic() - started)
            history.steps.append(metrics)
            check_finite(metrics)
            if step % config.validate_every == 0 or step == config.max_steps:
                validation(step)
            show(history)
            if step % config.checkpoint_every == 0 or step == config.max_steps:
                checkpoint(step)


def make_plan(index: PairIndex, spec: TrainSpec) -> Plan:
    """The order of the pairs; an empty snapshot is an error with a way out."""
    if not len(index):
        raise SnapshotError(
            f"{spec.storage_url} has no pair to train on", "`mapo data show` says what was kept and what was not"
        )
    config = spec.config
    return Plan(index.bucket_sizes, config.micro_batch_size, config.global_batch_size, spec.seed)


def planned_groups(
    plan: Plan, index: PairIndex, engine: Engine, *, first_step: int
) -> Iterator[tuple[Slot, list[PairRecord]]]:
    """This rank's groups from `first_step` to the end, in the order in which they are trained on."""
    for step in range(first_step, engine.config.max_steps):
        for slot in plan.slots_of(engine.rank, engine.world_size):
            group = plan.group(step, slot)
            yield (step, slot), [index.pair(group.bucket, int(element)) for element in group.elements]


def draw(
    batch: Batch, spec: TrainSpec, base: Base, reader: PairReader, *, step: int, slot: int
) -> tuple[Tensor, Tensor, Batch]:
    """Noise, timesteps and dropped prompts of one micro-batch: a function of (seed, step, slot) alone."""
    generator = torch.Generator().manual_seed(noise_seed(spec.seed, step, slot))
    shape = batch.chosen_BCHW.shape
    noise = torch.randn(tuple(shape), generator=generator)
    length = base.scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, length, (shape[0],), generator=generator)
    dropped = torch.rand(shape[0], generator=generator) < spec.config.prompt_dropout
    if not dropped.any():
        return noise, timesteps, batch
    null_SD, null_P = reader.null_conditioning
    changed: dict[str, Any] = dict(vars(batch))
    changed["prompt_embeds_BSD"] = torch.where(dropped[:, None, None], null_SD, batch.prompt_embeds_BSD)
    changed["pooled_BP"] = torch.where(dropped[:, None], null_P, batch.pooled_BP)
    return noise, timesteps, Batch(**changed)


def step_metrics(engine: Engine, means: Tensor, *, step: int, seconds: float) -> dict[str, float]:
    """The step's numbers over the whole global batch; collective."""
    over_ranks = engine.mean(means).tolist()
    return {
        "step": step,
        **dict(zip(PAIR_METRICS, over_ranks, strict=True)),
        "grad_norm": float(engine.unet.get_global_grad_norm() or 0.0),
        "learning_rate": learning_rate_at(step - 1, engine.config),
        "skipped_steps": int(engine.unet.skipped_steps),
        "pairs_per_s": engine.config.global_batch_size / seconds,
    }


def check_finite(metrics: dict[str, float]) -> None:
    """Stop at once when the numbers are gone; every rank sees the same ones."""
    if not math.isfinite(metrics["loss"]):
        raise TrainingError(
            f"the loss of step {metrics['step']} is {metrics['loss']} (chosen error {metrics['mse_chosen']:.4g}, "
            f"rejected {metrics['mse_rejected']:.4g}, learning rate {metrics['learning_rate']:.3g})",
            "lower `train.learning_rate`, or set `train.precision: fp32` to see whether bf16 is the cause",
        )
