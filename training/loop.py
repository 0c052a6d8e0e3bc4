"""The training loop of one rank, to read in one sitting: step, measure, validate, checkpoint."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from pipelines.dataset.errors import TrainingError
from training.config import NullPrompt
from training.data.loader import Batch, PairLoader, PairReader
from training.data.order import noise_seed
from training.early_exit import Notice, StopRequest
from training.engine import Engine
from training.image_losses import kl_of
from training.measure import Errors, Measured, gain_sums, measure, measure_errors
from training.methods import METHODS
from training.model import Denoiser
from training.objective import Objective, StepFacts
from training.options import TimestepsConfig
from training.samples import SampleGrid
from training.schedule import learning_rate_at
from training.spec import TrainSpec
from training.state.checkpoint import Checkpointer, gather_parts
from training.state.ema import ShardedEma
from training.state.zero import ZeroState
from training.tracking.account import ConsumedPairs
from training.tracking.anomalies import Watch
from training.tracking.metrics import NUM_SUMS, History, means_of
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
    timesteps: TimestepsConfig
    noise_offset: float

    def draw(self, batch: Batch, *, step: int, slot: int) -> tuple[Tensor, Tensor, Batch]:
        """Draw for one micro-batch; see `draw_with`.

        The global generators are seeded too, so that other draws (dropout in an adapter) are reproducible as well.
        """
        seed = noise_seed(self.seed, step, slot)
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        return draw_with(
            generator, batch, self.reader, self.num_train_timesteps, self.prompt_dropout, self.null_prompt,
            timesteps_of=self.timesteps, noise_offset=self.noise_offset,
        )  # fmt: skip


@dataclass(frozen=True)
class Learner:
    """The parts that change weights in a step."""

    engine: Engine
    denoiser: Denoiser
    objective: Objective
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
            validate(loop.validation, learner.objective, history, step)
            sample(loop.samples, loop.progress, step)
        while step < config.max_steps:
            speed.start(waited_s=loop.loader.waited_s)
            sums, facts = optimizer_step(learner, batches, speed, loop.consumed, step)
            step += 1
            times = speed.stop(waited_s=loop.loader.waited_s)
            metrics = step_metrics(learner.engine, sums, times, loop.stop_request, speed, step=step)
            history.steps.append(metrics | ({"kl": facts.kl} if learner.objective.needs_kl else {}))
            try:
                loop.progress.warn(watch.see(metrics), step=step)
            except TrainingError as stop:  # a decision of all ranks, which another start would only repeat
                return stop
            if is_due(step, config.validate_every, config.max_steps):
                validate(loop.validation, learner.objective, history, step)
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


def optimizer_step(
    learner: Learner, batches: Turns, speed: Speed, consumed: ConsumedPairs, step: int
) -> tuple[Tensor, StepFacts]:
    """Train one step on this rank's micro-batches.

    The loss of a micro-batch is weighed so that the gradient is that of the mean over the whole global batch.

    Returns:
        The rank's sums of metrics, on the engine's device; and what the step's loss depended on.
    """
    engine, denoiser = learner.engine, learner.denoiser
    engine.set_learning_rate(learning_rate_at(step, engine.config))
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=engine.device)
    facts, groups = step_groups(learner, batches, step)
    for (_, slot, weight), batch, known in groups:
        noise, timesteps, batch = learner.draws.draw(batch, step=step, slot=slot)
        with engine.accelerator.accumulate(engine.unet):
            measured: Measured = measure(denoiser, learner.objective, batch, noise, timesteps, facts, known)
            engine.accelerator.backward(weight * measured.losses.mean())
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        if weight:
            sums += measured.sums
            speed.count(batch, num_images=measured.num_images)
            consumed.add(step, slot, (record.pair_key for record in batch.records))
    if learner.ema is not None:
        learner.ema.update(step)
    return sums, facts


def step_groups(
    learner: Learner, batches: Turns, step: int
) -> tuple[StepFacts, Iterable[tuple[Turn, Batch, Errors | None]]]:
    """Return this rank's micro-batches of a step, and what the step's loss depends on; collective for KTO.

    KTO's loss of an image depends on the mean gain of the whole global batch, so all of it is measured first, without
    a gradient; the errors of the reference serve again. Other methods stream their micro-batches.
    """
    objective, engine = learner.objective, learner.engine
    facts = StepFacts(has_margin=objective.has_margin(step))
    turns = (next(batches) for _ in range(engine.accumulation_steps))
    if not objective.needs_kl:
        return facts, ((turn, batch, None) for turn, batch in turns)
    gathered: list[tuple[Turn, Batch, Errors | None]] = []
    gains = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for (of_step, slot, weight), batch in turns:
        noise, timesteps, drawn = learner.draws.draw(batch, step=step, slot=slot)
        with torch.no_grad():
            errors = measure_errors(learner.denoiser, objective, drawn, noise, timesteps, facts)
        gathered.append(((of_step, slot, weight), batch, errors))
        if weight:
            gains += gain_sums(errors, objective.weights_of(timesteps, engine.device))
    return StepFacts(kl=kl_of(*engine.sum(gains).tolist())), gathered


def draw_with(
    generator: torch.Generator,
    batch: Batch,
    reader: PairReader,
    num_train_timesteps: int,
    prompt_dropout: float,
    null_prompt: NullPrompt = "auto",
    *,
    timesteps_of: TimestepsConfig | None = None,
    noise_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Batch]:
    """Draw noise (B, C, H, W), timesteps (B,) and dropped prompts, the same for both images of a pair."""
    shape = batch.chosen_BCHW.shape
    noise = torch.randn(tuple(shape), generator=generator)
    timesteps = draw_timesteps(generator, shape[0], num_train_timesteps, timesteps_of or TimestepsConfig())
    dropped = torch.rand(shape[0], generator=generator) < prompt_dropout
    if noise_offset:
        noise += noise_offset * torch.randn(*shape[:2], 1, 1, generator=generator)
    if not dropped.any():
        return noise, timesteps, batch
    null_SD, null_P = dropped_prompt(batch, reader, null_prompt)
    embeds = torch.where(dropped[:, None, None], null_SD, batch.prompt_embeds_BSD)
    pooled = batch.pooled_BP
    if null_P is not None and pooled is not None:
        pooled = torch.where(dropped[:, None], null_P, pooled)
    return noise, timesteps, replace(batch, prompt_embeds_BSD=embeds, pooled_BP=pooled)


def draw_timesteps(generator: torch.Generator, count: int, length: int, config: TimestepsConfig) -> Tensor:
    """Draw timesteps, int64 (count,).

    Args:
        generator: The source of the draws.
        count: How many to draw.
        length: Length of the noise schedule.
        config: Range and distribution; its range was checked against `length` when the worker started.
    """
    last = length if config.max is None else config.max
    if config.distribution == "uniform":
        return torch.randint(config.min, last, (count,), generator=generator)
    share = torch.sigmoid(config.mean + config.std * torch.randn(count, generator=generator, dtype=torch.float64))
    return (config.min + (share * (last - config.min)).long()).clamp(max=last - 1)


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
        **engine.estimates,
        "skipped_steps": int(engine.unet.skipped_steps),
        **speed.metrics(total[NUM_SUMS:-1]),
    }


def validate(validation: Validation, objective: Objective, history: History, step: int) -> None:
    """Measure the held-out pairs; collective."""
    if metrics := validation.measure(objective):
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
        "max_steps": spec.key_max_steps,
        "seed": spec.seed,
        "starts": saver.starts,
        "num_adam_steps": saver.state.num_steps(),
        "loss_scale": saver.state.loss_scale(),
        "optimizer": saver.state.scalars(),
        "validation_loss": newest.get("loss"),
        "average_validation_loss": newest.get("average_loss"),
        "history": history.to_dict(),
    }
    account = consumed.to_dict() | asdict(saver.engine.identity())
    saver.checkpointer.save(step, gather_parts(saver.state, saver.ema), account=account, state=state)
