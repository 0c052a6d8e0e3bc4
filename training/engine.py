"""Setup of accelerate and DeepSpeed inside a Ray Train worker. docs/concepts/training.md explains each choice."""

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

from pipelines.dataset.errors import ConfigError
from pipelines.dataset.values import JsonObject
from training.config import TrainConfig
from training.ops import leave_out_ops
from training.optimizers.adafactor import Adafactor
from training.optimizers.partition import Partition
from training.optimizers.prodigy import Prodigy
from training.optimizers.registry import OPTIMIZERS
from training.run_progress import WorkerIdentity

BUCKET_ELEMENTS = 50_000_000  # DeepSpeed's default of 5e8 costs 2-3 GB a GPU; "auto" needs a hidden_size
ALL_ELEMENTS = 10**15  # of a rank in one sub-group: at DeepSpeed's 1e9, optimizers would see a part at a time
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Engine:
    """One rank's training engine. `unet` is the DeepSpeed engine around the UNet."""

    accelerator: Accelerator
    unet: Any
    optimizer: Any
    config: TrainConfig

    @property
    def rank(self) -> int:
        """This worker's rank."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return int(self.accelerator.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks for all."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the UNet computes in; autocast is off under DeepSpeed, so the caller casts."""
        return dtype_of(self.config)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that this rank adds up in an optimizer step."""
        return int(self.unet.gradient_accumulation_steps())

    @property
    def estimates(self) -> dict[str, float]:
        """The step size that Prodigy estimates, as a metric; nothing with another optimizer."""
        optimizer = self.unet.optimizer.optimizer
        return {"step_size": optimizer.param_groups[0]["d"]} if isinstance(optimizer, Prodigy) else {}

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of this step: an accelerate scheduler would step once per process."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks, on the CPU; collective."""
        summed = values.to(self.device, copy=True)
        torch.distributed.all_reduce(summed)
        return summed.cpu()

    def identity(self) -> WorkerIdentity:
        """Describe this worker, as the engine reports it, for the log and the report."""
        from ray.util import get_node_ip_address  # here, so that an engine can be had without Ray

        return WorkerIdentity(
            rank=self.rank,
            world_size=self.world_size,
            pid=os.getpid(),
            node=get_node_ip_address(),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            backend=torch.distributed.get_backend(),
            engine=type(self.unet).__name__,
            zero_stage=int(self.unet.zero_optimization_stage()),
        )


def dtype_of(config: TrainConfig) -> torch.dtype:
    """Return the type that the UNet computes in."""
    return DTYPES[config.precision]


def set_threads(sharers: int) -> None:
    """Share this node's cores among `sharers` processes; Ray would leave each with one thread."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, sharers)))


def deepspeed_config(config: TrainConfig, *, accumulation_steps: int, on_gpu: bool) -> JsonObject:
    """Return DeepSpeed's own configuration, with integers wherever "auto" would ask the model for a hidden size."""
    zero: JsonObject = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
    }
    settings: JsonObject = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": config.optimizer != "adamw",
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW computes the same on every machine and needs no compiler
    }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if config.precision == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000}
    if config.precision != "fp32" and accumulation_steps > 1:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}  # 16-bit sums of many micro-batches lose small gradients
    if config.zero_stage == 3 and OPTIMIZERS[config.optimizer].is_over_ranks:
        zero["sub_group_size"] = ALL_ELEMENTS
    if config.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": BUCKET_ELEMENTS, "stage3_param_persistence_threshold": 100_000}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": config.offload, "pin_memory": on_gpu}
        if config.offload == "nvme":
            zero["offload_optimizer"]["nvme_path"] = config.offload_path
    return settings


def check_machine(config: TrainConfig) -> None:
    """Reject settings that this machine cannot run, before a model is loaded.

    Raises:
        ConfigError: fp16 without a GPU that supports it, an optimizer without its package, or NVMe without libaio.
    """
    from deepspeed.accelerator import get_accelerator

    if config.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError("train.precision fp16: the CPUs of this machine do not support fp16", "use bf16, or GPUs")
    optimizer = OPTIMIZERS[config.optimizer]
    if optimizer.package is not None and importlib.util.find_spec(optimizer.package) is None:
        raise ConfigError(
            f"train.optimizer {config.optimizer} needs {optimizer.package}, which is not installed",
            f"pip install 'mapo[{optimizer.extra}]'",
        )
    if config.offload == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError(
                "train.offload nvme: DeepSpeed cannot build its asynchronous I/O here", "apt install libaio-dev"
            )


def build_optimizer(unet: Any, config: TrainConfig, *, on_gpu: bool) -> Any:
    """Build the optimizer over the trainable weights; ZeRO gives it this rank's part of them in float32."""
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    device = torch.device("cuda" if on_gpu else "cpu")
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=rate, weight_decay=decay)
    if config.optimizer == "adafactor":
        return Adafactor(trained, lr=rate, weight_decay=decay, device=device)
    if config.optimizer == "prodigy":
        return Prodigy(trained, lr=rate, weight_decay=decay, **config.prodigy.model_dump(), device=device)
    fused = on_gpu and config.offload == "none"
    return torch.optim.AdamW(trained, lr=rate, weight_decay=decay, fused=fused)


def set_gradient_checkpointing(unet: Any, wanted: bool | str) -> None:
    """Recompute in the backward pass: all blocks, only the convolutional ones, or only the transformer ones."""
    if not wanted:
        return
    unet.enable_gradient_checkpointing()
    if wanted is True:
        return
    for module in unet.modules():
        if getattr(module, "gradient_checkpointing", False):
            is_transformer = type(module).__name__ == "Transformer2DModel"
            module.gradient_checkpointing = is_transformer == (wanted == "transformers")


def build_engine(unet: Any, config: TrainConfig, *, accumulation_steps: int, on_gpu: bool) -> Engine:
    """Wrap a float32 UNet in DeepSpeed ZeRO; collective.

    accelerate is given the backend explicitly: without it every CPU rank believes that it is rank 0.
    """
    quiet_libraries()
    leave_out_ops()
    plugin = DeepSpeedPlugin(
        hf_ds_config=deepspeed_config(config, accumulation_steps=accumulation_steps, on_gpu=on_gpu)
    )
    accelerator = Accelerator(
        deepspeed_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo")],
    )
    set_gradient_checkpointing(unet, config.gradient_checkpointing)
    if config.compile:
        unet.compile_repeated_blocks()
    unet.train()
    optimizer = build_optimizer(unet, config, on_gpu=on_gpu)
    prepared, wrapped = accelerator.prepare(unet, optimizer)
    if OPTIMIZERS[config.optimizer].is_over_ranks:
        optimizer.bind(Partition(prepared))
    return Engine(accelerator, prepared, wrapped, config)


def quiet_libraries() -> None:
    """Silence library logs below the level of errors."""
    for name in ("DeepSpeed", "deepspeed", "accelerate", "diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logger = logging.getLogger("DeepSpeed")
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)
