"""accelerate and DeepSpeed set-up inside a Ray Train worker. See docs/concepts/training.md for each choice."""

import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

from training.config import TrainConfig

BUCKET_ELEMENTS = 50_000_000  # DeepSpeed's default of 5e8 costs 2-3 GB a GPU; "auto" needs a hidden_size
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Engine:
    """One rank's training engine. `unet` is the DeepSpeed engine around the UNet."""

    accelerator: Accelerator
    unet: Any
    optimizer: Any
    config: TrainConfig

    @property
    def rank(self) -> int:
        """This worker's number."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """How many workers there are."""
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in; autocast is off under DeepSpeed, so the caller casts."""
        return DTYPES[self.config.precision]

    def set_learning_rate(self, rate: float) -> None:
        """The schedule is ours: accelerate would step a scheduler once for each process."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks; collective."""
        reduced: torch.Tensor = self.accelerator.reduce(values.to(self.device), reduction="mean")
        return reduced.cpu()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks; collective."""
        reduced: torch.Tensor = self.accelerator.reduce(values.to(self.device), reduction="sum")
        return reduced.cpu()

    def identity(self) -> dict[str, Any]:
        """What this worker is, as the engine itself reports it; for the log and the report."""
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "pid": os.getpid(),
            "node": ray.util.get_node_ip_address(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "backend": torch.distributed.get_backend(),
            "engine": type(self.unet).__name__,
            "zero_stage": int(self.unet.zero_optimization_stage()),
        }


def set_threads(sharers: int) -> None:
    """Share this node's cores among `sharers` processes; Ray would leave each with one thread."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, sharers)))


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of an optimizer step, counted from 0: linear warm-up, then the schedule down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.lr_schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - done)
    return config.learning_rate


def deepspeed_config(config: TrainConfig, *, accumulation_steps: int, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration. Integers wherever "auto" would ask the model for a hidden size."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "contiguous_gradients": True,
            "overlap_comm": on_gpu,
        },
    }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if config.zero_stage == 3:
        settings["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": 100_000,
        }
    return settings


def build_engine(unet: Any, config: TrainConfig, *, accumulation_steps: int) -> Engine:
    """Wrap a float32 UNet into DeepSpeed ZeRO; collective.

    The back end is named to accelerate: without it every CPU rank believes that it is rank 0.
    """
    on_gpu = ray.train.torch.get_device().type == "cuda"
    quiet_libraries()
    # DeepSpeed builds an op with ninja, which lies beside this interpreter and need not be on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    plugin = DeepSpeedPlugin(
        hf_ds_config=deepspeed_config(config, accumulation_steps=accumulation_steps, on_gpu=on_gpu)
    )
    accelerator = Accelerator(
        deepspeed_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo")],
    )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=on_gpu
    )
    prepared, wrapped = accelerator.prepare(unet, optimizer)
    return Engine(accelerator, prepared, wrapped, config)


def quiet_libraries() -> None:
    """Leave our own lines readable."""
    for name in ("DeepSpeed", "deepspeed", "accelerate", "diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logger = logging.getLogger("DeepSpeed")
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)
