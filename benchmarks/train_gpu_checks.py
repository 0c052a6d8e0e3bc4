"""What must be right on a GPU before its speed counts; `benchmarks.train_gpu` runs these on models of its small sizes.

Each check yields rows of what was found, and tells the bench whether it passed.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_peak import Row, first_line, settle
from benchmarks.train_gpu_trial import NARROW_UNET_CONFIG, SMALL_UNET_CONFIG, Bench, Trainee, Way, made_up, new_base
from pipelines.dataset.storage import Storage
from training.config import EmaConfig, LoraConfig, TrainConfig
from training.engine import set_gradient_checkpointing
from training.losses import pair_loss
from training.model import ATTENTION, Base, Denoiser, set_attention
from training.state.checkpoint import Checkpointer, gather_parts, restore
from training.state.ema import ShardedEma
from training.state.zero import KINDS, WEIGHT, ZeroState

CPU = torch.device("cpu")
PAIRS = 2
FAR_TOO_LARGE = 2.0**40  # a loss scale that fp16 cannot hold


class Gradients:
    """Losses and gradients of one model by device, type and setting, without an engine."""

    def __init__(self, bench: Bench) -> None:
        self.side = 8 if bench.small else 32
        self.unet_config = SMALL_UNET_CONFIG if bench.small else NARROW_UNET_CONFIG
        self._base = new_base(self.unet_config, CPU)
        self._batch = made_up(self.unet_config, PAIRS, self.side, seed=0)
        draw = torch.Generator().manual_seed(1)
        self._noise = torch.randn(self._batch.chosen_BCHW.shape, generator=draw)
        self._timesteps = torch.randint(0, 1000, (PAIRS,), generator=draw)

    def __call__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        method: str = "mapo_paper",
        checkpointing: bool | str = False,
        attention: str = "auto",
        compiled: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The losses, and all gradients as one vector; both float64 on the CPU."""
        unet = copy.deepcopy(self._base.unet).train()
        set_gradient_checkpointing(unet, checkpointing)
        unet.to(device, dtype)
        if compiled:
            unet.compile_repeated_blocks()
        base = Base(unet, self._base.scheduler, self._base.scaling_factor)
        config = TrainConfig(attention=attention)
        denoiser = Denoiser(unet, None, base, config, device=device, dtype=dtype)
        errors = denoiser.errors(self._batch, self._noise, self._timesteps)
        losses = pair_loss(method, {}, num_train_timesteps=1000)(errors, self._batch.preference_B)
        scale = 1024.0 if dtype == torch.float16 else 1.0  # as a loss scale would
        (scale * losses.mean()).backward()
        gradients = torch.cat([weight.grad.flatten().double().cpu() / scale for weight in unet.parameters()])
        set_attention("auto")
        return losses.detach().double().cpu(), gradients


def off_by(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Row:
    """Relative errors, and whether all bits are the same."""
    norms = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return {"loss off by": norms[0], "gradient off by": norms[1], "same bits": same}


def numbers(bench: Bench) -> Iterator[Row]:
    """Losses and gradients by type, against float32 on the CPU."""
    gradients = Gradients(bench)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for method in ("mapo_paper", "mapo"):
        expected = gradients(CPU, torch.float32, method=method)
        dtypes = {torch.float32: 1e-3, torch.bfloat16: 0.1} | ({torch.float16: 0.02} if bench.on_gpu else {})
        for dtype, worst in dtypes.items():
            row = off_by(gradients(bench.device, dtype, method=method), expected)
            name = f"{method} in {str(dtype).removeprefix('torch.')}"
            is_near = row["loss off by"] <= worst and row["gradient off by"] <= worst
            steep = method == "mapo" and dtype != torch.float32  # its margin multiplies what rounding does by 500
            yield {"check": f"{name} against the CPU's float32", **row, "ok": bench.verify(name, is_near or steep)}


def settings(bench: Bench) -> Iterator[Row]:
    """Gradient checkpointing, attention back ends and compilation change nothing but rounding."""
    gradients = Gradients(bench)
    expected = gradients(bench.device, torch.float32)
    for checkpointing in (True, "resnets", "transformers"):
        row = off_by(gradients(bench.device, torch.float32, checkpointing=checkpointing), expected)
        name = f"checkpointing {checkpointing}"
        yield {"check": name, **row, "ok": bench.verify(name, row["gradient off by"] <= 1e-4)}
    for attention in ATTENTION:
        name = f"attention {attention} in bfloat16"
        try:
            row = off_by(gradients(bench.device, torch.bfloat16, attention=attention), expected)
        except RuntimeError as error:  # this device or build has none; a run that asks for it stops so, too
            set_attention("auto")
            yield {"check": name, "note": first_line(error)}
            continue
        yield {"check": name, **row, "ok": bench.verify(name, row["gradient off by"] <= 0.1)}
    if bench.on_gpu:
        row = off_by(gradients(bench.device, torch.float32, compiled=True), expected)
        yield {"check": "compiled", **row, "ok": bench.verify("compiled", row["gradient off by"] <= 1e-3)}


def trainee(bench: Bench, *, pairs: int = PAIRS, **changes: Any) -> Trainee:
    """A small engine."""
    small = Gradients(bench)
    config = TrainConfig(
        micro_batch_size=pairs, global_batch_size=2 * pairs, learning_rate=1e-3, gradient_checkpointing=False
    )
    config = TrainConfig.model_validate(config.model_dump() | {"precision": "bf16"} | changes)
    made = Trainee(small.unet_config, config, accumulation_steps=2, device=bench.device, side=small.side)
    made.use(Way(pairs, checkpointing=False))
    return made


def step(made: Trainee, method: str = "mapo_paper") -> float:
    """One optimizer step; its mean loss."""
    return sum(float(made.micro_step(method).mean()) for _ in range(2)) / 2


def stages(bench: Bench) -> Iterator[Row]:
    """Every ZeRO stage and the offload to the CPU give one curve."""
    wanted = [(1, "none"), (2, "none"), (3, "none"), (2, "cpu"), (3, "cpu")]
    curves: dict[str, list[float]] = {}
    for stage, offload in wanted[1:3] if bench.small else wanted:
        made = trainee(bench, zero_stage=stage, offload=offload, precision="fp32")
        name = f"ZeRO-{stage}, offload {offload}"
        curves[name] = [step(made) for _ in range(3)]
        made.close()
        first = next(iter(curves.values()))
        error = max(abs(a - b) / abs(b) for a, b in zip(curves[name], first, strict=True))
        yield {"check": f"{name}: 3 steps", "loss off by": error, "ok": bench.verify(name, error <= 1e-3)}


def half(bench: Bench) -> Iterator[Row]:
    """fp16 finds a loss scale: steps that overflow are skipped, counted and leave the weights alone."""
    if not bench.on_gpu:
        yield {"check": "fp16", "note": "needs a GPU"}
        return
    made = trainee(bench, precision="fp16", learning_rate=1e-4)
    scaler, state = made.engine.unet.optimizer.loss_scaler, ZeroState(made.engine.unet)
    scaler.cur_scale = FAR_TOO_LARGE
    before = [view.clone() for _, view in state.views(WEIGHT)]
    step(made)
    kept = all(torch.equal(a, b) for a, (_, b) in zip(before, state.views(WEIGHT), strict=True))
    curve = [step(made) for _ in range(59)]
    skipped, moved = int(made.engine.unet.skipped_steps), int(made.engine.unet.global_steps)
    done = state.num_steps()
    finite = all(torch.isfinite(torch.tensor(curve)))
    passed = kept and finite and 0 < skipped < 50 and done == 60 - skipped and scaler.cur_scale < FAR_TOO_LARGE
    found = f"{skipped} of {moved} steps skipped, {done} done, scale {scaler.cur_scale:.0f}, loss {curve[-1]:.4f}"
    yield {"check": "fp16", "note": found, "ok": bench.verify("fp16", passed)}
    made.close()


def checkpoints(bench: Bench) -> Iterator[Row]:
    """A checkpoint gives every bit back, the average's too, and the next step is the one it would have been."""
    storage = Storage(str(bench.work / "storage"))
    made = trainee(bench)
    state = ZeroState(made.engine.unet)
    ema = ShardedEma(state, EmaConfig(decay=0.5, warmup=False))
    averages = [view.double() for _, view in state.views(WEIGHT)]
    for number in range(2):
        step(made)
        ema.update(number)
        averages = [a.lerp(view.double(), 0.5) for a, (_, view) in zip(averages, state.views(WEIGHT), strict=True)]
    error = max(float((a - b).abs().max()) for a, b in zip(averages, ema.fragments().values(), strict=True))
    yield {"check": "EMA against float64", "loss off by": error, "ok": bench.verify("EMA", error <= 1e-6)}
    saver = Checkpointer(
        storage, "checkpoints", rank=0, world_size=1, zero_stage=2, attempt="one", keep=1, keep_best=False, timeout_s=60
    )
    saved = {key: tensor.clone() for key, tensor in gather_parts(state, ema).items()}
    with saver.closing():
        shared = {"step": 2, "num_adam_steps": state.num_steps(), "loss_scale": state.loss_scale()}
        saver.save(2, gather_parts(state, ema), account={}, state=shared)
    after, position = step(made), made.num_micro_steps - 2
    weights = {part: view.clone() for part, view in state.views(WEIGHT)}
    made.close()
    made = trainee(bench)
    state = ZeroState(made.engine.unet)
    ema = ShardedEma(state, EmaConfig(decay=0.5, warmup=False))
    for weight in made.base.unet.parameters():
        weight.data.zero_()  # what is not restored shows
    restore(storage, "checkpoints", state, ema, note=print)
    found = gather_parts(state, ema)
    same = set(found) == set(saved) and all(torch.equal(found[key], saved[key]) for key in saved)
    made.num_micro_steps = position
    loss = step(made)
    off = max(float((view - weights[part]).abs().max()) for part, view in state.views(WEIGHT))
    text = f"{len(saved)} fragments of {', '.join([*KINDS, 'ema'])}"
    yield {"check": f"checkpoint: {text}", "same bits": same, "ok": bench.verify("checkpoint", same)}
    row: Row = {"check": "the step after it", "loss off by": abs(loss - after), "same bits": off == 0.0}
    yield {**row, "ok": bench.verify("step after a checkpoint", abs(loss - after) <= 1e-6 and off <= 1e-5)}
    made.close()


def adapters(bench: Bench) -> Iterator[Row]:
    """LoRA moves its adapters and nothing else."""
    made = trainee(bench, lora=LoraConfig(rank=4).model_dump())
    weights = dict(made.base.unet.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    curve = [step(made) for _ in range(3)]
    moved = {name for name, weight in weights.items() if not torch.equal(weight.detach(), before[name])}
    trained = {name for name, weight in weights.items() if weight.requires_grad}
    passed = len(moved) > 0 and moved <= trained and all("lora" in name for name in trained)
    note = f"{len(moved)} of {len(trained)} adapters moved of {len(weights)} tensors, loss {curve[-1]:.4f}"
    yield {"check": "LoRA", "note": note, "ok": bench.verify("LoRA", passed)}
    made.close()


CHECKS: tuple[Callable[[Bench], Iterator[Row]], ...] = (numbers, settings, stages, half, checkpoints, adapters)


def check(bench: Bench) -> Iterator[Row]:
    """All of them; one that raises is a failure, and the others go on."""
    for each in CHECKS:
        try:
            yield from each(bench)
        except Exception as error:
            bench.verify(each.__name__, False)
            yield {"check": each.__name__, "note": first_line(error), "ok": "FAILED"}
        settle(bench.device)
