"""What the ranks of the engine's tests do: real steps of the real loop's parts, on synthetic pairs."""

import ctypes
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

import training.engine
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.data.batch import Batch
from training.engine import Engine, build_engine, dtype_of
from training.losses import pair_loss
from training.methods import NEEDS_REFERENCE
from training.model import Base, Denoiser, Reference, add_lora, load_base
from training.state.checkpoint import Checkpointer, gather_parts, restore
from training.state.ema import EMA, ShardedEma
from training.state.masters import StoredWeights, start_from_base
from training.state.zero import WEIGHT, ZeroState

PAIRS = 8  # of a global batch
CONFIG = TrainConfig(
    num_workers=2,
    global_batch_size=PAIRS,
    micro_batch_size=2,
    max_steps=20,
    learning_rate=1e-3,
    precision="fp32",
    gradient_checkpointing=False,
    channels_last=False,
)
"""Two ranks, exact arithmetic; tests change what they are about."""


def global_batch(step: int) -> tuple[Batch, Tensor, Tensor]:
    """PAIRS pairs with noise and timesteps; the same everywhere."""
    draw = torch.Generator().manual_seed(1000 + step)
    batch = Batch(
        records=[],
        chosen_BCHW=1 + 0.1 * torch.randn(PAIRS, 4, 8, 8, generator=draw),
        rejected_BCHW=-1 + 0.1 * torch.randn(PAIRS, 4, 8, 8, generator=draw),
        chosen_time_ids_B6=torch.full((PAIRS, 6), 64.0),
        rejected_time_ids_B6=torch.full((PAIRS, 6), 64.0),
        prompt_embeds_BSD=torch.randn(PAIRS, 77, 32, generator=draw),
        pooled_BP=torch.randn(PAIRS, 16, generator=draw),
        preference_B=torch.ones(PAIRS),
    )
    noise = torch.randn(PAIRS, 4, 8, 8, generator=draw)
    return batch, noise, torch.randint(0, 1000, (PAIRS,), generator=draw)


def part_of(step: int, low: int, high: int) -> tuple[Batch, Tensor, Tensor]:
    """Pairs `low` to `high` of a global batch."""
    batch, noise, timesteps = global_batch(step)
    cut = {name: value[low:high] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **cut), noise[low:high], timesteps[low:high]


def make(config: TrainConfig, base_folder: str, accumulation_steps: int) -> tuple[Engine, Denoiser, Base]:
    if torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=False)
    base = load_base(ModelSource(base_folder))
    if config.lora:
        add_lora(base.unet, config.lora, seed=0)
    needs = config.method in NEEDS_REFERENCE
    frozen = Reference.copy_of(base.unet, torch.device("cpu"), dtype_of(config)) if needs and not config.lora else None
    engine = build_engine(base.unet, config, accumulation_steps=accumulation_steps, on_gpu=False)
    reference = (frozen or Reference.of_adapters(engine.unet)) if needs else None
    denoiser = Denoiser(engine.unet, reference, base, config, device=engine.device, dtype=engine.dtype)
    return engine, denoiser, base


def train_step(engine: Engine, denoiser: Denoiser, config: TrainConfig, step: int) -> float:
    """One optimizer step; the mean loss over the global batch."""
    loss_of = pair_loss(config.method, config.loss, num_train_timesteps=1000)
    engine.set_learning_rate(config.learning_rate)
    total = torch.zeros(1, dtype=torch.float64)
    for turn in range(engine.accumulation_steps):
        slot = turn * engine.world_size + engine.rank
        low = slot * config.micro_batch_size
        batch, noise, timesteps = part_of(step, low, low + config.micro_batch_size)
        with engine.accelerator.accumulate(engine.unet):
            losses = loss_of(denoiser.errors(batch, noise, timesteps), batch.preference_B)
            engine.accelerator.backward(losses.mean())
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        total += losses.detach().double().sum()
    return float(engine.sum(total)) / PAIRS


def losses_of_configs(configs: list[TrainConfig], base_folder: str, num_steps: int) -> list[list[float]]:
    """The curve of each configuration, one after another in the same processes."""
    curves = []
    for config in configs:
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else config.worker_range[0]
        accumulation_steps = PAIRS // config.micro_batch_size // ranks
        engine, denoiser, _ = make(config, base_folder, accumulation_steps)
        curves.append([train_step(engine, denoiser, config, step) for step in range(num_steps)])
    return curves


def plain_adamw(
    config: TrainConfig, base_folder: str, num_steps: int, optimizer_of: Callable[..., Any] = torch.optim.AdamW
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """The same by hand: one process, torch's AdamW, the whole global batch at once; curve, weights and average."""
    base = load_base(ModelSource(base_folder))
    if config.lora:
        add_lora(base.unet, config.lora, seed=0)
    base.unet.train()
    weights = {name: weight for name, weight in base.unet.named_parameters() if weight.requires_grad}
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = optimizer_of(weights.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    denoiser = Denoiser(base.unet, None, base, config, device=torch.device("cpu"), dtype=torch.float32)
    loss_of = pair_loss(config.method, config.loss, num_train_timesteps=1000)
    curve = []
    for step in range(num_steps):
        batch, noise, timesteps = global_batch(step)
        loss = loss_of(denoiser.errors(batch, noise, timesteps), batch.preference_B).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
        decay = min(config.ema.decay, (1 + step) / (10 + step)) if config.ema and step else 0.0
        for name, weight in weights.items():
            average[name] = decay * average[name] + (1 - decay) * weight.detach()
    return curve, {name: weight.detach() for name, weight in weights.items()}, average


def train_and_save(config: TrainConfig, base_folder: str, storage_url: str, num_steps: int) -> dict[str, Any]:
    """Go on from the newest checkpoint to `num_steps`, and write one as the ranks of a run do."""
    storage = Storage(storage_url)
    engine, denoiser, _ = make(config, base_folder, PAIRS // config.micro_batch_size // config.worker_range[0])
    state = ZeroState(engine.unet)
    ema = ShardedEma(state, config.ema) if config.ema else None
    restored = restore(storage, "checkpoints", state, ema, note=lambda text: None)
    first = 0 if restored is None else restored.state["step"]
    if restored is None and config.precision != "fp32" and config.lora is None:
        start_from_base(ModelSource(base_folder), state, ema)
    curve = []
    for step in range(first, num_steps):
        curve.append(train_step(engine, denoiser, config, step))
        if ema:
            ema.update(step)
    checkpointer = Checkpointer(
        storage, "checkpoints", rank=engine.rank, world_size=engine.world_size, zero_stage=config.zero_stage,
        attempt=f"{num_steps:08d}", keep=10, keep_best=False, timeout_s=60,
    )  # fmt: skip
    shared: dict[str, Any] = {"step": num_steps, "num_adam_steps": state.num_steps(), "loss_scale": state.loss_scale()}
    shared["optimizer"] = state.scalars()
    with checkpointer.closing():
        checkpointer.save(num_steps, gather_parts(state, ema), account=asdict(engine.identity()), state=shared)
    torch.distributed.barrier()
    return {"first": first, "curve": curve, **shared}


def move(config: TrainConfig, base_folder: str, num_steps: int, from_float32: bool) -> dict[str, float]:
    """How far training moves the weights, and how much of that the forward pass sees.

    Returns:
        `projection`: the move of the model's own weights, projected on the masters'; 1 if all of it arrives.
        `gain`: the change of the loss of one held-out batch.
        `off`: how far masters are from the base's float32 weights before the first step, at most.
    """
    engine, denoiser, _ = make(config, base_folder, PAIRS // config.micro_batch_size // config.worker_range[0])
    state = ZeroState(engine.unet)
    if from_float32:
        start_from_base(ModelSource(base_folder), state, None)
    stored = StoredWeights.of(Path(base_folder) / "unet", None)
    off = max(float((view - stored.read(fragment)).abs().max()) for fragment, view in state.views(WEIGHT))
    masters = [view.clone() for _, view in state.views(WEIGHT)]
    model = [view.clone().double() for _, view in state.model_views()]
    before = held_out_loss(engine, denoiser, config)
    for step in range(num_steps):
        train_step(engine, denoiser, config, step)
    along = squared = 0.0
    for (_, now), (_, seen), old, old_seen in zip(
        state.views(WEIGHT), state.model_views(), masters, model, strict=True
    ):
        moved = now.double() - old.double()
        along += float(moved @ (seen.double() - old_seen))
        squared += float(moved @ moved)
    along, squared = engine.sum(torch.tensor([along, squared], dtype=torch.float64)).tolist()
    return {
        "projection": along / squared, "gain": held_out_loss(engine, denoiser, config) - before,
        "off": off, "squared": squared,
    }  # fmt: skip


def moves(configs: list[tuple[TrainConfig, bool]], base_folder: str, num_steps: int) -> list[dict[str, float]]:
    """`move` of each configuration, in the same processes."""
    return [move(config, base_folder, num_steps, from_float32) for config, from_float32 in configs]


def average_in_place(configs: list[TrainConfig], base_folder: str) -> list[dict[str, Any]]:
    """Three steps; after the second one the average takes the weights' place and leaves it again; and three without."""
    found = []
    for config in configs:
        (curve,) = losses_of_configs([config], base_folder, 3)  # now: ZeRO-3 puts its own `linear` in place for good
        engine, denoiser, _ = make(config, base_folder, PAIRS // config.micro_batch_size // config.worker_range[0])
        state = ZeroState(engine.unet)
        assert config.ema is not None
        ema = ShardedEma(state, config.ema)
        for step in range(2):
            train_step(engine, denoiser, config, step)
            ema.update(step)
        before = {key: part.clone() for key, part in gather_parts(state, ema).items()}
        model = [view.clone() for _, view in state.model_views()]
        loss = held_out_loss(engine, denoiser, config)
        with ema.in_place_of_the_weights():
            wanted = [before[EMA, fragment].to(engine.dtype) for fragment, _ in state.model_views()]
            is_average = all(torch.equal(a, b) for a, (_, b) in zip(wanted, state.model_views(), strict=True))
            of_average = held_out_loss(engine, denoiser, config)
        after = gather_parts(state, ema)
        same_state = all(torch.equal(after[key], part) for key, part in before.items())
        same_model = all(torch.equal(a, b) for a, (_, b) in zip(model, state.model_views(), strict=True))
        found.append({
            "is_average": is_average, "same_state": same_state, "same_model": same_model, "loss": loss,
            "of_average": of_average, "again": held_out_loss(engine, denoiser, config),
            "last": train_step(engine, denoiser, config, 2), "undisturbed": curve[2],
        })  # fmt: skip
    return found


def held_out_loss(engine: Engine, denoiser: Denoiser, config: TrainConfig) -> float:
    """The mean chosen error over four batches that no step sees."""
    engine.unet.eval()
    total = 0.0
    with torch.no_grad():
        for number in range(4):
            total += float(denoiser.errors(*global_batch(-number - 1)).chosen.double().mean()) / 4
    engine.unet.train()
    return total


def on_nvme(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work` with partitions so small that there are several; without CUDA DeepSpeed does not link libaio."""
    ctypes.CDLL("libaio.so.1", ctypes.RTLD_GLOBAL)
    settings_of = training.engine.deepspeed_config

    def in_parts(*given: Any, **named: Any) -> dict[str, Any]:
        settings = settings_of(*given, **named)
        settings["zero_optimization"]["sub_group_size"] = 800_000
        return settings

    training.engine.deepspeed_config = in_parts
    return work(*arguments)


def in_half(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work` where DeepSpeed takes this CPU for one with fp16: torch computes in it, though slowly."""
    from deepspeed.accelerator import get_accelerator  # here: collecting the tests imports no DeepSpeed

    get_accelerator().is_fp16_supported = lambda: True
    return work(*arguments)
