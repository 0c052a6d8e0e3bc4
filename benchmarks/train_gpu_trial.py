"""The product's engine around a UNet of random weights, fed with pairs made up in memory; for `cost` and `train_gpu`.

What the parts of `train_gpu` share is here too: the models' sizes, and `Bench`.

Letters: B pairs, C channels, H and W of latents, S tokens, D and P embedding sizes.
"""

import gc
import itertools
import os
import socket
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_peak import Course, Row, settle
from training.config import TrainConfig
from training.data.batch import Batch
from training.engine import Engine, build_engine, dtype_of, quiet_libraries, set_gradient_checkpointing
from training.flops import NUM_TIME_IDS, Flops, pair_flops, peak_flops
from training.losses import LOSSES, PairErrors, pair_loss
from training.methods import NEEDS_REFERENCE
from training.model import Base, Denoiser, Reference, add_lora

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "cross_attention_dim": 2048,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
"""SDXL's UNet, as its config.json has it."""
NARROW_UNET_CONFIG = UNET_CONFIG | {
    "sample_size": 32, "norm_num_groups": 8, "block_out_channels": (40, 80, 160), "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 256, "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 352,
}  # fmt: skip
"""SDXL's depth and blocks, an eighth of its width: 40 million weights."""
SMALL_UNET_CONFIG = UNET_CONFIG | {
    "sample_size": 8, "norm_num_groups": 8, "block_out_channels": (16, 32), "attention_head_dim": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1, "transformer_layers_per_block": 1, "cross_attention_dim": 32, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}  # fmt: skip
TOKENS = 77
TFLOP_A_PAIR: Mapping[bool | str, float] = {False: 40.46, True: 50.89, "resnets": 42.64, "transformers": 48.71}
"""SDXL at 1024 x 1024 by gradient checkpointing, as `training.flops` counts it (two minutes on one core)."""
REFERENCE_TFLOP_A_PAIR = 13.52
PUBLISHED_ACCUMULATION = 32  # micro-batches of 8 pairs in a global batch of 2048 on 8 GPUs
NUM_BATCHES = 4  # distinct ones, taken in turn
LINEAR = torch.nn.functional.linear


def start_alone() -> None:
    """Let this process be the only rank, as a launcher would tell it."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def new_base(unet_config: Mapping[str, Any], device: torch.device) -> Base:
    """A UNet of random weights, float32, made where it will be; SDXL's noise schedule and scale of latents."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    quiet_libraries()
    torch.manual_seed(0)
    with device:
        unet = UNet2DConditionModel(**unet_config)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Base(unet, schedule, 0.13025)


def made_up(unet_config: Mapping[str, Any], num_pairs: int, side: int, seed: int, *, pinned: bool = False) -> Batch:
    """Pairs of random latents and prompts in float16, as data sets store them."""
    draw = torch.Generator().manual_seed(seed)
    pooled = (
        unet_config["projection_class_embeddings_input_dim"] - NUM_TIME_IDS * unet_config["addition_time_embed_dim"]
    )

    def halves(*shape: int) -> Tensor:
        return torch.randn(num_pairs, *shape, generator=draw).half()

    sizes = torch.tensor([[8.0 * side, 8 * side, 0, 0, 8 * side, 8 * side]]).repeat(num_pairs, 1)
    batch = Batch(
        records=[],
        preference_B=torch.ones(num_pairs),
        chosen_BCHW=halves(unet_config["in_channels"], side, side) + 1,
        rejected_BCHW=halves(unet_config["in_channels"], side, side) - 1,
        chosen_time_ids_B6=sizes,
        rejected_time_ids_B6=sizes.clone(),
        prompt_embeds_BSD=halves(TOKENS, unet_config["cross_attention_dim"]),
        pooled_BP=halves(pooled),
    )
    if not pinned:
        return batch
    tensors = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


@dataclass
class Bench(Course):
    """What all sections of `train_gpu` share, and what one leaves for another."""

    work: Path
    small: bool
    deadline: float
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    failed: list[str] = field(default_factory=list)
    peak: float = 0.0
    """TFLOP/s of bfloat16 products."""
    best: "Way | None" = None
    """The fastest way that was found."""
    needs_reference: bool = False

    def __post_init__(self) -> None:
        self.on_gpu = self.device.type == "cuda"
        self.unet_config = SMALL_UNET_CONFIG if self.small else UNET_CONFIG
        self.side = 8 if self.small else 128
        self.seconds = 0.1 if self.small else 3.0  # of timing, for each way
        self._trainee: Trainee | None = None

    def trainee(self) -> "Trainee":
        """The engine of the published recipe's kind: ZeRO-2, bf16, float32 sums over micro-batches, AdamW."""
        if self._trainee is None:
            config = TrainConfig(micro_batch_size=8, global_batch_size=16, gradient_checkpointing=False)
            self._trainee = Trainee(
                self.unet_config, config, accumulation_steps=2, device=self.device, side=self.side,
                has_reference=self.needs_reference,
            )  # fmt: skip
        return self._trainee

    def drop_trainee(self) -> None:
        """Give its memory back; the next one who asks gets a new one."""
        if self._trainee is not None:
            self._trainee.close()
            self._trainee = None

    def shares(self, row: Row, way: "Way", method: str = "mapo_paper") -> Row:
        """The row with the model's share of the measured peak and of the data sheet's, and the hardware's."""
        if not self.on_gpu or self.small:
            return row
        reference = REFERENCE_TFLOP_A_PAIR if method in NEEDS_REFERENCE else 0.0
        rates = [row["pairs/s"] * (TFLOP_A_PAIR[each] + reference) for each in (False, way.checkpointing)]
        found = {}
        if self.peak:
            found = {"MFU": rates[0] / self.peak, "HFU": rates[1] / self.peak}
        sheet = peak_flops(torch.cuda.get_device_name(), "bf16", None)
        return row | found | ({"MFU of data sheet": 1e12 * rates[0] / sheet} if sheet else {})


@dataclass(frozen=True)
class Way:
    """How a micro-batch runs; one engine can change all of it."""

    pairs: int = 8
    checkpointing: bool | str = True
    channels_last: bool = True
    attention: str = "auto"
    compiled: bool = False
    pinned: bool = False
    """Batches lie in pinned memory, so that the copy to the GPU does not wait for the work before it."""
    benchmark: bool = False
    """torch.backends.cudnn.benchmark."""

    @property
    def text(self) -> str:
        """For people."""
        words = {True: "all", False: "none"}
        switches = [name for name in ("compiled", "pinned", "benchmark") if getattr(self, name)]
        layout = [] if self.channels_last else ["channels first"]
        attention = [] if self.attention == "auto" else [f"attention {self.attention}"]
        again = words.get(self.checkpointing, self.checkpointing)  # type: ignore[call-overload]
        return ", ".join([f"{self.pairs} pairs", f"checkpointing {again}", *layout, *attention, *switches])


class Trainee:
    """An engine of one rank, and micro-steps of it by method and way.

    Args:
        unet_config: Of diffusers' UNet2DConditionModel.
        config: The product's; its method decides nothing here, what a `Way` has is changed by `use`.
        accumulation_steps: Micro-batches of an optimizer step.
        device: Where.
        side: Of the latents.
        has_reference: Keep a frozen copy of the weights, on the CPU until `bring_reference`.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        config: TrainConfig,
        *,
        accumulation_steps: int,
        device: torch.device,
        side: int,
        has_reference: bool = False,
    ) -> None:
        start_alone()
        if torch.distributed.is_initialized():
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=False)
        self.unet_config, self.config, self.side, self.device = dict(unet_config), config, side, device
        self.base = new_base(unet_config, device)
        if config.lora is not None:
            add_lora(self.base.unet, config.lora, seed=0)
        self._reference: Reference | None = None
        if has_reference:
            self._reference = Reference.copy_of(self.base.unet, torch.device("cpu"), dtype_of(config))
        self.engine: Engine = build_engine(
            self.base.unet, config, accumulation_steps=accumulation_steps, on_gpu=device.type == "cuda"
        )
        self.engine.set_learning_rate(config.learning_rate)
        self.way = Way()
        self.losses_of = {name: pair_loss(name, {}, num_train_timesteps=1000) for name in LOSSES}
        self.num_micro_steps = 0
        self._batches: list[Batch] = []
        self._denoisers: dict[bool, Denoiser] = {}
        self.bring_reference("cpu")

    def bring_reference(self, where: str | torch.device) -> int:
        """Put the reference there; its bytes."""
        if self._reference is None:
            return 0
        self._reference.unet.to(where)
        return sum(weight.nbytes for weight in self._reference.unet.parameters())

    def reference_digest(self) -> float:
        """A number that changes if a weight of the reference does."""
        if self._reference is None:
            return 0.0
        return sum(float(weight.double().square().sum()) for weight in self._reference.unet.parameters())

    def use(self, way: Way) -> None:
        """Run micro-steps this way from now on."""
        unet = self.base.unet
        unet.disable_gradient_checkpointing()
        set_gradient_checkpointing(unet, way.checkpointing)
        if way.compiled != self.way.compiled or (way.compiled and way.pairs != self.way.pairs):
            torch._dynamo.reset()  # or blocks are compiled once more for any size, slower than for this one
            for module in unet.modules():
                module._compiled_call_impl = None
            if way.compiled:
                unet.compile_repeated_blocks()
        torch.backends.cudnn.benchmark = way.benchmark
        changes = {"channels_last": way.channels_last, "attention": way.attention}
        config, engine = self.config.model_copy(update=changes), self.engine
        self._denoisers = {
            wanted: Denoiser(engine.unet, reference, self.base, config, device=engine.device, dtype=engine.dtype)
            for wanted, reference in ((False, None), (True, self._reference))
        }
        if (way.pairs, way.pinned) != (self.way.pairs, self.way.pinned) or not self._batches:
            self._batches = [
                made_up(self.unet_config, way.pairs, self.side, seed, pinned=way.pinned) for seed in range(NUM_BATCHES)
            ]
        self.way = way

    def micro_step(self, method: str, batch: Batch | None = None) -> Tensor:
        """Forward and backward over one micro-batch, and the optimizer where the accumulation ends; its losses."""
        number, engine = self.num_micro_steps, self.engine
        self.num_micro_steps += 1
        batch = batch or self._batches[number % NUM_BATCHES]
        draw = torch.Generator().manual_seed(number)  # noise comes from the CPU, as `training.loop` draws it
        noise = torch.randn(batch.chosen_BCHW.shape, generator=draw)
        timesteps = torch.randint(0, self.base.num_train_timesteps, (len(noise),), generator=draw)
        with engine.accelerator.accumulate(engine.unet):
            errors = self._denoisers[method in NEEDS_REFERENCE].errors(batch, noise, timesteps)
            losses = self.losses_of[method](errors, batch.preference_B)
            engine.accelerator.backward(losses.mean())
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        return losses.detach()

    def errors(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> PairErrors:
        """The errors of a batch without a reference, as a micro-step has them."""
        return self._denoisers[False].errors(batch, noise, timesteps)

    def step(self, method: str) -> list[float]:
        """One optimizer step; the seconds of each of its micro-steps, by CUDA events on a GPU."""
        if self.device.type != "cuda":
            marks = [time.perf_counter()]
            for _ in range(self.engine.accumulation_steps):
                self.micro_step(method)
                marks.append(time.perf_counter())
            return [after - before for before, after in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.engine.accumulation_steps + 1)]
        events[0].record()
        for event in events[1:]:
            self.micro_step(method)
            event.record()
        events[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]

    def measure(self, way: Way, seconds: float, method: str = "mapo_paper") -> Row:
        """Pairs a second this way: medians of a micro-step and of the last one of an optimizer step, and memory."""
        settle(self.device)
        self.use(way)
        started = time.monotonic()
        self.step(method)
        first_s = time.monotonic() - started  # compiles, and lets cuDNN try what it has
        if way.compiled or way.benchmark:
            self.step(method)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started, inner, last = time.monotonic(), [], []
        while time.monotonic() - started < seconds or len(last) < 2:
            *some, end = self.step(method)
            inner += some
            last.append(end)
        inner_s, last_s = statistics.median(inner or last), statistics.median(last)
        step_s = (PUBLISHED_ACCUMULATION - 1) * inner_s + last_s
        row: Row = {"way": way.text, "method": method, "pairs/s": PUBLISHED_ACCUMULATION * way.pairs / step_s}
        row |= {"micro-step s": inner_s, "last micro-step s": last_s, "first step s": first_s}
        if self.device.type == "cuda":
            row["memory GB"] = torch.cuda.max_memory_allocated() / 1e9
            row["reserved GB"] = torch.cuda.max_memory_reserved() / 1e9
            row["idle GB"] = torch.cuda.memory_allocated() / 1e9
        return row

    def flops(self, method: str, checkpointing: bool | str) -> Flops:
        """Of one pair."""
        needs = method in NEEDS_REFERENCE
        config = self.base.unet.config
        return pair_flops(config, self.side, self.side, TOKENS, needs, checkpointing, self.config.lora)

    def close(self) -> None:
        """Give the memory back."""
        self.engine.unet.destroy()
        self.engine.accelerator.free_memory()
        self.__dict__.clear()
        torch.nn.functional.linear = LINEAR  # ZeRO-3 puts its own in its place, for all models to come
        gc.collect()
        settle(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
