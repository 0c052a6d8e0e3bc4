"""The training loop of one rank, to read in one sitting: step, measure, validate, checkpoint."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from pipelines.dataset.errors import TrainingError
from training.config import NullPrompt
from training.data.loader import Batch, PairLoader, PairReader
from training.data.order import noise_seed
from training.early_exit import Notice, StopRequest
from training.engine import Engine
from training.losses import PairLoss
from training.methods import METHODS
from training.model import Denoiser
from training.samples import SampleGrid
from training.schedule import learning_rate_at
from training.spec import TrainSpec
from training.state.checkpoint import Checkpointer, gather_parts
from training.state.ema import ShardedEma
from training.state.zero import ZeroState
from training.tracking.account import ConsumedPairs
from training.tracking.anomalies import Watch
from training.tracking.metrics import NUM_SUMS, History, means_of, pair_sums
from training.tracking.progress import ProgressReporter, Speed
from training.validation import Validation

Turn = tuple[int, int, float]
"""step, slot, weight of the slot's mean loss."""
Turns = Iterator[tuple[Turn, Batch]]
"""This rank's micro-batches, in training order."""


@dataclass(frozen=True)
class Draws:
    """Random draws of noise, timesteps and dropped prompts: functions of (seed, step, slot) alone."""

    seed: int
    reader: PairReader
    num_train_timesteps: int
    prompt_dropout: float
    null_prompt: NullPrompt

    def draw(self, batch: Batch, *, step: int, slot: int) -> tuple[Tensor, Tensor, Batch]:
        """Draw for one micro-batch; see `draw_with`.

        The global generators are seeded too, so that other draws (dropout in an adapter) are reproducible as well.
        """
        seed = noise_seed(self.seed, step, slot)
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        return draw_with(generator, batch, self.reader, self.num_train_timesteps, self.prompt_dropout, self.null_prompt)


@dataclass(frozen=True)
class Learner:
    """The parts that change weights in a step."""

    engine: Engine
    denoiser: Denoiser
    loss_of: PairLoss
    draws: Draws
    ema: ShardedEma | None


@dataclass(frozen=True)
class Saver:
    """The parts of a checkpoint besides the history and the account of consumed pairs."""

    spec: TrainSpec
    engine: Engine
    state: ZeroState
    ema: ShardedEma | None
    checkpointer: Checkpointer
    starts: int


@dataclass(frozen=True)
class Loop:
    """Everything a rank trains with, built in training/worker.py. Only `run` sees the whole of it."""

    spec: TrainSpec
    learner: Learner
    loader: PairLoader[Turn]
    validation: Validation
    samples: SampleGrid | None
    saver: Saver
    progress: ProgressReporter
    history: History
    consumed: ConsumedPairs
    stop_request: StopRequest


def run(loop: Loop, *, first_step: int) -> TrainingError | None:
    """Train from `first_step` finished steps to `max_steps`.

    Returns:
        The error that ended the run, the same on every rank; None if all went well or the driver asked to stop.
    """
    config, history, learner, step = loop.spec.config, loop.history, loop.learner, first_step
    batches, notice = iter(loop.loader), Notice()
    watch = Watch(config.trouble, history.steps, learns_preference=METHODS[config.method].learns_preference)
    speed = Speed(loop.spec, learner.engine, dict(learner.denoiser.base.unet.config))
    with (
        loop.progress.writer(enabled=learner.engine.is_first, history=history) as show,
        loop.stop_request.watching(),
        loop.saver.checkpointer.closing(),
    ):
        if step == 0:
            validate(loop.validation, learner.loss_of, history, step)
            sample(loop.samples, loop.progress, step)
        while step < config.max_steps:
            speed.start(waited_s=loop.loader.waited_s)
            sums = optimizer_step(learner, batches, speed, loop.consumed, step)
            step += 1
            times = speed.stop(waited_s=loop.loader.waited_s)
            metrics = step_metrics(learner.engine, sums, times, loop.stop_request, speed, step=step)
            history.steps.append(metrics)
            try:
                loop.progress.warn(watch.see(metrics), step=step)
            except TrainingError as stop:  # a decision of all ranks, which another start would only repeat
                return stop
            if is_due(step, config.validate_every, config.max_steps):
                validate(loop.validation, learner.loss_of, history, step)
            if is_due(step, config.sample_every, config.max_steps):
                sample(loop.samples, loop.progress, step)
            show(history)
            is_leaving = notice.has_come(metrics["step_s"]) or loop.stop_request.is_agreed
            if is_leaving or is_due(step, config.checkpoint_every, config.max_steps):
                checkpoint(loop.saver, history, loop.consumed, step)
            if is_leaving:
                loop.saver.checkpointer.wait()  # the node may be gone at any moment
            if loop.stop_request.is_agreed:
                break
    return None


def is_due(step: int, every: int | None, max_steps: int) -> bool:
    """Return whether something done every `every` steps and after the last is due; never if `every` is 0 or None."""
    return every is not None and every > 0 and (step % every == 0 or step == max_steps)


def optimizer_step(learner: Learner, batches: Turns, speed: Speed, consumed: ConsumedPairs, step: int) -> Tensor:
    """Train one step on this rank's micro-batches; return its sums of metrics, on the engine's device.

    The loss of a micro-batch is weighed so that the gradient is that of the mean over the whole global batch.
    """
    engine, denoiser = learner.engine, learner.denoiser
    engine.set_learning_rate(learning_rate_at(step, engine.config))
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=engine.device)
    for _ in range(engine.accumulation_steps):
        (_, slot, weight), batch = next(batches)
        noise, timesteps, batch = learner.draws.draw(batch, step=step, slot=slot)
        with engine.accelerator.accumulate(engine.unet):
            errors = denoiser.errors(batch, noise, timesteps)
            losses = learner.loss_of(errors, batch.preference_B)
            engine.accelerator.backward(weight * losses.mean())
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        if weight:
            sums += pair_sums(losses.detach(), errors, batch.preference_B, timesteps, denoiser.base.num_train_timesteps)
            speed.count(batch)
            consumed.add(step, slot, (record.pair_key for record in batch.records))
    if learner.ema is not None:
        learner.ema.update(step)
    return sums


def draw_with(
    generator: torch.Generator,
    batch: Batch,
    reader: PairReader,
    num_train_timesteps: int,
    prompt_dropout: float,
    null_prompt: NullPrompt = "auto",
) -> tuple[Tensor, Tensor, Batch]:
    """Draw noise (B, C, H, W), timesteps (B,) and dropped prompts, the same for both images of a pair."""
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
    """Return the replacement of a dropped prompt: embeddings (S, D) and pooled (P,), if the base has them."""
    if null_prompt == "zeros":
        pooled = batch.pooled_BP
        return torch.zeros_like(batch.prompt_embeds_BSD[0]), None if pooled is None else torch.zeros_like(pooled[0])
    return reader.empty_conditioning if null_prompt == "empty" else reader.null_conditioning


def step_metrics(
    engine: Engine, sums: Tensor, times: Tensor, stop_request: StopRequest, speed: Speed, *, step: int
) -> dict[str, float]:
    """Return the metrics of a finished step over the whole global batch, the same on every rank; collective.

    Args:
        engine: Sums over the ranks.
        sums: From `optimizer_step`.
        times: From `speed.stop`.
        stop_request: Learns whether the ranks agree to stop.
        speed: Reads the sum of `times`.
        step: Number of finished steps.
    """
    asked = sums.new_tensor([stop_request.seen])
    total = engine.sum(torch.cat([sums, times.to(sums.device), asked]))
    stop_request.is_agreed = bool(total[-1])
    return {
        "step": step,
        **means_of(total[:NUM_SUMS]),
        "grad_norm": float(engine.unet.get_global_grad_norm() or 0.0),
        "learning_rate": learning_rate_at(step - 1, engine.config),
        "skipped_steps": int(engine.unet.skipped_steps),
        **speed.metrics(total[NUM_SUMS:-1]),
    }


def validate(validation: Validation, loss_of: PairLoss, history: History, step: int) -> None:
    """Measure the held-out pairs; collective."""
    if metrics := validation.measure(loss_of):
        history.validations.append({"step": step, **metrics})


def sample(samples: SampleGrid | None, progress: ProgressReporter, step: int) -> None:
    """Draw samples from held-out prompts, if configured; collective."""
    if samples is not None and (grid := samples.draw(step)) is not None:
        progress.picture("samples", grid, step=step)


def checkpoint(saver: Saver, history: History, consumed: ConsumedPairs, step: int) -> None:
    """Start writing a checkpoint after `step` finished steps."""
    spec = saver.spec
    newest = history.validations[-1] if history.validations else {}
    state = {
        "key": spec.key,
        "step": step,
        "seed": spec.seed,
        "starts": saver.starts,
        "num_adam_steps": saver.state.num_steps(),
        "loss_scale": saver.state.loss_scale(),
        "validation_loss": newest.get("loss"),
        "average_validation_loss": newest.get("average_loss"),
        "history": history.to_dict(),
    }
    account = consumed.to_dict() | asdict(saver.engine.identity())
    saver.checkpointer.save(step, gather_parts(saver.state, saver.ema), account=account, state=state)
