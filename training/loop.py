"""The training loop of one rank. Read it in one sitting: step, measure, validate, checkpoint."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipelines.dataset.errors import TrainingError
from training.config import NullPrompt
from training.data.loader import Batch, PairLoader, PairReader
from training.data.order import noise_seed
from training.engine import Engine
from training.losses import PairLoss
from training.methods import METHODS
from training.model import Denoiser
from training.preemption import Notice
from training.samples import SampleGrid
from training.schedule import learning_rate_at
from training.spec import TrainSpec
from training.state.checkpoint import Checkpointer, gather_parts
from training.state.ema import ShardedEma
from training.state.zero import ZeroState
from training.stop_request import StopRequest
from training.tracking.account import Consumed
from training.tracking.anomalies import Watch
from training.tracking.metrics import NUM_SUMS, History, means_of, pair_sums
from training.tracking.progress import Progress, Speed
from training.validation import Validation

Turn = tuple[int, int, float]
"""step, slot, weight of the slot's mean loss."""


@dataclass(frozen=True)
class Loop:
    """All that a rank trains with; see training/worker.py for how it is made."""

    spec: TrainSpec
    engine: Engine
    denoiser: Denoiser
    state: ZeroState
    ema: ShardedEma | None
    loss_of: PairLoss
    loader: PairLoader[Turn]
    reader: PairReader
    validation: Validation
    checkpointer: Checkpointer
    samples: SampleGrid | None
    progress: Progress
    history: History
    consumed: Consumed
    stop_request: StopRequest


def run(loop: Loop, *, first_step: int) -> TrainingError | None:
    """Train from `first_step` finished steps to `max_steps`.

    Returns:
        What went wrong, on every rank alike, if that ended the run; None if all went well, or the driver asked to stop.
    """
    config, history, step = loop.spec.config, loop.history, first_step
    batches, notice = iter(loop.loader), Notice()
    watch = Watch(config.trouble, history.steps, learns_preference=METHODS[config.method].learns_preference)
    speed = Speed(loop.spec, loop.engine, dict(loop.denoiser.base.unet.config))
    with (
        loop.progress.writer(enabled=loop.engine.is_first, history=history) as show,
        loop.stop_request.watching(),
        loop.checkpointer.closing(),
    ):
        if step == 0:
            validate(loop, step)
            sample(loop, step)
        while step < config.max_steps:
            speed.start(waited_s=loop.loader.waited_s)
            sums = optimizer_step(loop, step, batches, speed)
            step += 1
            metrics = step_metrics(loop, sums, speed, step=step)
            history.steps.append(metrics)
            try:
                loop.progress.warn(watch.see(metrics), step=step)
            except TrainingError as stop:  # a decision of all ranks, which another start would only repeat
                return stop
            is_last = step == config.max_steps
            if step % config.validate_every == 0 or is_last:
                validate(loop, step)
            if config.sample_every and (step % config.sample_every == 0 or is_last):
                sample(loop, step)
            show(history)
            is_leaving = notice.has_come(metrics["step_s"]) or loop.stop_request.is_agreed
            if step % config.checkpoint_every == 0 or is_last or is_leaving:
                checkpoint(loop, step)
            if is_leaving:
                loop.checkpointer.wait()  # the node may be gone at any moment
            if loop.stop_request.is_agreed:
                break
    return None


def optimizer_step(loop: Loop, step: int, batches: Any, speed: Speed) -> Tensor:
    """One step over this rank's micro-batches; its sums of metrics, on the engine's device.

    The loss of a micro-batch is weighed so that the gradient is that of the mean over the whole global batch.
    """
    engine, spec = loop.engine, loop.spec
    engine.set_learning_rate(learning_rate_at(step, spec.config))
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=engine.device)
    for _ in range(engine.accumulation_steps):
        (_, slot, weight), batch = next(batches)
        noise, timesteps, batch = draw(batch, loop, step=step, slot=slot)
        with engine.accelerator.accumulate(engine.unet):
            errors = loop.denoiser.errors(batch, noise, timesteps)
            losses = loop.loss_of(errors, batch.preference_B)
            engine.accelerator.backward(weight * losses.mean())
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        if weight:
            sums += pair_sums(
                losses.detach(), errors, batch.preference_B, timesteps, loop.denoiser.base.num_train_timesteps
            )
            speed.count(batch)
            loop.consumed.add(step, slot, (record.pair_key for record in batch.records))
    if loop.ema is not None:
        loop.ema.update(step)
    return sums


def draw(batch: Batch, loop: Loop, *, step: int, slot: int) -> tuple[Tensor, Tensor, Batch]:
    """Noise, timesteps and dropped prompts of one micro-batch: a function of (seed, step, slot) alone.

    The global generators are seeded from it too, so that whatever else draws (dropout in an adapter) is as exact.
    """
    seed = noise_seed(loop.spec.seed, step, slot)
    torch.manual_seed(seed)
    return draw_with(
        torch.Generator().manual_seed(seed),
        batch,
        loop.reader,
        loop.denoiser.base.num_train_timesteps,
        loop.spec.config.prompt_dropout,
        loop.spec.config.null_prompt,
    )


def draw_with(
    generator: torch.Generator,
    batch: Batch,
    reader: PairReader,
    num_train_timesteps: int,
    prompt_dropout: float,
    null_prompt: NullPrompt = "auto",
) -> tuple[Tensor, Tensor, Batch]:
    """Noise (B, C, H, W), timesteps (B,), and the batch with dropped prompts, the same for both images of a pair."""
    shape = batch.chosen_BCHW.shape
    noise = torch.randn(tuple(shape), generator=generator)
    timesteps = torch.randint(0, num_train_timesteps, (shape[0],), generator=generator)
    dropped = torch.rand(shape[0], generator=generator) < prompt_dropout
    if not dropped.any():
        return noise, timesteps, batch
    null_SD, null_P = dropped_prompt(batch, reader, null_prompt)
    embeds = torch.where(dropped[:, None, None], null_SD, batch.prompt_embeds_BSD)
    pooled = batch.pooled_BP
    if null_P is not None and pooled is not None:
        pooled = torch.where(dropped[:, None], null_P, pooled)
    return noise, timesteps, replace(batch, prompt_embeds_BSD=embeds, pooled_BP=pooled)


def dropped_prompt(batch: Batch, reader: PairReader, null_prompt: NullPrompt) -> tuple[Tensor, Tensor | None]:
    """What a dropped prompt becomes: embeddings (S, D) and pooled (P,), if the base has them."""
    if null_prompt == "zeros":
        pooled = batch.pooled_BP
        return torch.zeros_like(batch.prompt_embeds_BSD[0]), None if pooled is None else torch.zeros_like(pooled[0])
    return reader.empty_conditioning if null_prompt == "empty" else reader.null_conditioning


def step_metrics(loop: Loop, sums: Tensor, speed: Speed, *, step: int) -> dict[str, float]:
    """The step's numbers over the whole global batch, the same on every rank; collective."""
    engine = loop.engine
    asked = sums.new_tensor([loop.stop_request.seen])
    total = engine.sum(torch.cat([sums, speed.stop(waited_s=loop.loader.waited_s).to(sums.device), asked]))
    loop.stop_request.is_agreed = bool(total[-1])
    return {
        "step": step,
        **means_of(total[:NUM_SUMS]),
        "grad_norm": float(engine.unet.get_global_grad_norm() or 0.0),
        "learning_rate": learning_rate_at(step - 1, engine.config),
        "skipped_steps": int(engine.unet.skipped_steps),
        **speed.metrics(total[NUM_SUMS:-1]),
    }


def validate(loop: Loop, step: int) -> None:
    """Measure the held-out pairs; collective."""
    if metrics := loop.validation.measure(loop.loss_of):
        loop.history.validations.append({"step": step, **metrics})


def sample(loop: Loop, step: int) -> None:
    """Draw samples from held-out prompts, if that is wanted; collective."""
    if loop.samples is not None and (grid := loop.samples.draw(step)) is not None:
        loop.progress.picture("samples", grid, step=step)


def checkpoint(loop: Loop, step: int) -> None:
    """Start to write a checkpoint of `step` finished steps."""
    spec, history = loop.spec, loop.history
    newest = history.validations[-1] if history.validations else {}
    state = {
        "key": spec.key,
        "step": step,
        "seed": spec.seed,
        "starts": loop.progress.starts,
        "num_adam_steps": loop.state.num_steps(),
        "loss_scale": loop.state.loss_scale(),
        "validation_loss": newest.get("loss"),
        "average_validation_loss": newest.get("average_loss"),
        "history": history.to_dict(),
    }
    account = loop.consumed.to_dict() | loop.engine.identity()
    loop.checkpointer.save(step, gather_parts(loop.state, loop.ema), account=account, state=state)
