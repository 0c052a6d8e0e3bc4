"""Configuration of training, export and evaluation. Imports neither ray nor torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from pipelines.dataset.config import Config, Device, WorkerCount, worker_range
from pipelines.dataset.errors import ConfigError
from training.methods import NEEDS_REFERENCE, check_parameters, default_rate
from training.optimizers.registry import OPTIMIZERS, check_offload
from training.options import SnrWeighting, TimestepsConfig, check_options
from training.tracking.backends import BACKENDS

if TYPE_CHECKING:
    TrackerName = str
    OptimizerName = str
else:
    TrackerName = Literal[tuple(BACKENDS)]
    OptimizerName = Literal[tuple(OPTIMIZERS)]

Action = Literal["stop", "warn", "ignore"]
NullPrompt = Literal["auto", "zeros", "empty"]
Flips = Literal["none", "pair", "image"]


class LoraConfig(Config):
    """Low-rank adapters on the attention projections of the UNet."""

    rank: int = Field(ge=1)
    """Rank of each adapter."""
    alpha: float | None = Field(None, gt=0)
    """Adapters are scaled by alpha / rank; by default alpha is the rank, so that the scale is 1."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the linear layers that get an adapter; by default the attention projections, as in the released code."""
    weights: str | None = Field(None, min_length=1, exclude_if=lambda weights: weights is None)
    """Start from these adapters instead of new ones: a safetensors file, its folder, an fsspec URL, or a hub id, as
    diffusers, peft or kohya's scripts save them. They must fit `rank` and `targets`."""


class EmaConfig(Config):
    """Exponential moving average of the weights, in float32; each rank keeps its own part."""

    decay: float = Field(0.9999, gt=0.0, lt=1.0)
    """Largest share of the old average that an optimizer step keeps."""
    warmup: bool = True
    """Let that share rise as (1 + s) / (10 + s) with the number of finished steps s, up to `decay`; without the
    warm-up, a short training exports mostly its base."""


class ProdigyConfig(Config):
    """Prodigy's estimate of the step size d."""

    d_coef: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor of the estimate: 0.5 for smaller steps, 2 for larger ones. Change this rather than `learning_rate`."""
    d0: float = Field(1e-6, gt=0, allow_inf_nan=False)
    """First d, from which it only grows; 1e-5 or 1e-4 if d stays too small."""
    growth_rate: float | None = Field(None, gt=1, allow_inf_nan=False)
    """Largest factor by which d grows in a step, such as 1.02; unlimited by default."""


class TroubleConfig(Config):
    """How training reacts when its numbers go wrong."""

    not_finite: Literal["stop"] = Field("stop", json_schema_extra={"hidden": True})
    """No longer a setting: accepted in older configurations, and ignored."""
    error_explosion: Action = "stop"
    """Reaction when the chosen error has grown to `max_error_ratio` times its value at the start."""
    max_error_ratio: float = Field(5.0, gt=1.0)
    """Limit for the mean error of the newest window of steps, as a multiple of the first window's."""
    both_errors_grow: Action = "warn"
    """Reaction when the errors of chosen and rejected images have both grown to `min_error_growth` times their first
    values, by more than noise: the failure that users of DPO report most."""
    min_error_growth: float = Field(1.1, gt=1.0, allow_inf_nan=False)
    """Growth of both errors that counts, as a multiple of the first window's means."""
    no_preference: Action = "warn"
    """Reaction when the implicit accuracy has stayed at 0.5, within what chance allows, for `patience` steps."""
    skipped_steps: Action = "stop"
    """Reaction when fp16 has found no loss scale with finite gradients for `window` steps in a row."""
    window: int = Field(20, ge=1)
    """Length of a window, in steps."""
    patience: int = Field(500, ge=1)
    """Steps that a run may go without learning a preference."""


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Raise a check's ConfigError as the ValueError that pydantic collects."""
    try:
        yield
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _default_learning_rate(given: Mapping[str, Any]) -> float:
    optimizer = OPTIMIZERS.get(given.get("optimizer", ""))
    if optimizer is not None and optimizer.rate is not None:
        return optimizer.rate.value
    return default_rate(given.get("method", ""), with_adapters=given.get("lora") is not None).value


class TrainConfig(Config):
    """The training: method, optimizer, workers, checkpoints."""

    method: str = "mapo_paper"
    """The loss, by its name in [Losses](#losses)."""
    loss: dict[str, float] = Field(default_factory=dict)
    """The method's own parameters; those left out take the method's defaults."""
    sft_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Add this many times the chosen error to the loss, which holds the model to images that people chose."""
    rejected_weight: float = Field(1.0, ge=0, le=1)
    """Share of the rejected image's pull; 0 leaves it out of the gradient. The safest remedy if both errors grow."""
    margin_share: float = Field(1.0, gt=0, le=1)
    """Share of the steps that have the margin; the others only fine-tune on the chosen image, without a forward pass of
    the rejected one. Which steps these are follows from the seed."""
    safeguard: float | None = Field(None, ge=0, lt=1)
    """Hold back the rejected image's gradient where it would raise the chosen error (Diffusion-SDPO's μ: 0.6 for SDXL,
    0.9 for SD 1.5; the larger, the safer); off by default."""
    snr_weighting: SnrWeighting | None = None
    """Weigh both errors by their timestep before the loss: `min_snr`, `{min_snr: 1}` (gamma, by default 5) or
    `debiased`; none by default. It changes the scale of the errors, and so the meaning of beta."""
    noise_offset: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Add this many times a random constant to each channel of the noise (SDXL itself: 0.05), the same for both images
    of a pair and in the target."""
    timesteps: TimestepsConfig = TimestepsConfig()
    """The timesteps that training draws, such as {min: 200, max: 1000} or {distribution: logit_normal}."""
    labels: Literal["soft", "hard"] = "soft"
    """soft: weigh the two orders of a pair by its votes, a share of 0.7 as 0.7 and 0.3, a kept tie half and half.
    hard: take the preferred image outright and leave kept ties out."""
    num_workers: WorkerCount = 1
    """Ray Train workers, one GPU (or CPU) each: a number, or a range such as 2..8 for as many of these as fit."""
    device: Device = "auto"
    """What workers run on: `auto` takes GPUs if the cluster has any now; `gpu` waits for an autoscaler to add them."""
    global_batch_size: int = Field(2048, ge=1)
    """Pairs in one optimizer step, over all workers; gradient accumulation follows from this."""
    micro_batch_size: int = Field(8, ge=1)
    """Pairs in one forward pass."""
    max_steps: int = Field(2000, ge=1)
    """Optimizer steps."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the whole UNet, such as {rank: 64}."""
    optimizer: OptimizerName = "adamw"
    """The optimizer, by its name in [Optimizers](#optimizers)."""
    prodigy: ProdigyConfig = ProdigyConfig()
    """Settings of `optimizer: prodigy`, such as {d_coef: 2}."""
    learning_rate: float = Field(default_factory=_default_learning_rate, gt=0, allow_inf_nan=False)
    """Peak learning rate of the schedule. Left out or null: the rate published for the method, for all weights or for
    adapters; `prodigy` has 1, a factor of its own estimate. The plan shows the rate with its source."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the rate rises linearly from 0."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip the gradient of the global batch to this norm."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of the forward and backward pass; the optimizer keeps float32 weights. fp16 scales the loss."""
    zero_stage: Literal[1, 2, 3] = 2
    """What DeepSpeed shards: 1 optimizer states, 2 also gradients, 3 also parameters."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer states live; nvme needs zero_stage 3 and `offload_path`."""
    offload_path: str | None = None
    """A folder on a fast local disk of each node, for `offload: nvme`."""
    gradient_checkpointing: bool | Literal["resnets", "transformers"] = True
    """Recompute activations in the backward pass: in all blocks (true; 25 % more arithmetic), only in the
    convolutional blocks (resnets; 5 % more), only in the transformer blocks (transformers; 20 % more), or in none."""
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    """Backend of scaled dot product attention; auto lets torch choose."""
    channels_last: bool = True
    """Use the channels-last memory layout, which makes convolutions faster on GPUs."""
    compile: bool = False
    """Compile the repeated transformer blocks with torch.compile; each shape compiles once, at its first batch."""
    prompt_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of pairs whose prompt is replaced by the null conditioning, for both images alike."""
    null_prompt: NullPrompt = "auto"
    """What replaces a dropped prompt. auto: what the base's pipeline uses for guidance (zeros for SDXL, the embedding
    of "" for SD 1.x and 2.x); zeros; or empty: the embedding of "", as in Diffusion-DPO's script."""
    flips: Flips = "none"
    """Mirror half of the pairs, both images alike (pair), or half of all images (image); needs `encode.flips`."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base predicts; set this only if the base's scheduler file is wrong. By default what that file says."""
    ema: EmaConfig | None = None
    """Keep an exponential moving average of the weights, such as {decay: 0.9999}."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    rounds: Literal["restart", "continue"] = "restart"
    """On a new snapshot, start again from the base model or continue from the model that the run exported last."""
    keep_rounds: int = Field(2, ge=1)
    """How many of the newest finished rounds keep their checkpoints; older rounds keep only their records."""
    validate_every: int = Field(100, ge=1)
    """Steps between validations on the held-out pairs."""
    max_validation_pairs: int = Field(256, ge=1)
    """Held-out pairs in a validation; if there are more, those of the first buckets, by key within a bucket."""
    sample_every: int | None = Field(None, ge=1)
    """Steps between grids of samples from held-out prompts; none by default."""
    num_samples: int = Field(4, ge=1)
    """Samples in a grid."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where curves go in addition to the report; wandb and mlflow are configured by their own environment variables."""
    trouble: TroubleConfig = TroubleConfig()
    """How training reacts when its numbers go wrong."""
    max_failures: int = Field(3, ge=0)
    """How often workers may be restarted, each time from the last checkpoint, before the stage fails."""
    read_ahead: int = Field(8, ge=1)
    """Micro-batches to read ahead of the current step."""
    cache_dir: str | None = None
    """A folder on each node that caches shards; no cache by default."""
    max_cache_bytes: int = Field(107_374_182_400, ge=1)
    """Size limit of `cache_dir`; above it the least recently used shards are removed."""
    start_timeout_s: int = Field(1800, ge=1)
    """Seconds to wait for GPUs with `device: gpu`, while nodes may still join. If this is left out, a cluster without
    an autoscaler waits only 60 for the first workers."""
    collective_timeout_s: int = Field(1800, ge=1)
    """A collective that takes longer fails the workers, which restart from the last checkpoint."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables for the workers, such as NCCL_SOCKET_IFNAME or NCCL_IB_HCA; no secrets."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device, for computing model FLOPs utilization; known by default for A100, H100, H200, B200, L40S."""

    @model_validator(mode="before")
    @classmethod
    def no_rate_is_the_methods_own(cls, given: Any) -> Any:
        """Treat `learning_rate: null` as left out."""
        if isinstance(given, dict) and given.get("learning_rate", 0) is None:
            return {name: value for name, value in given.items() if name != "learning_rate"}
        return given

    @model_validator(mode="after")
    def method_knows_its_parameters(self) -> Self:
        """Check method and loss parameters before anything starts."""
        with _as_value_error():
            check_parameters(self.method, self.loss)
        return self

    @model_validator(mode="after")
    def options_suit_the_method(self) -> Self:
        """Check that the options of the loss change something."""
        options = {name: getattr(self, name) for name in ("sft_weight", "rejected_weight", "margin_share", "safeguard")}
        with _as_value_error():
            check_options(self.method, **options)
        return self

    @model_validator(mode="after")
    def reference_is_where_the_round_starts(self) -> Self:
        """Reject adapters if the reference is the model that a round continues: switched off, they give the base."""
        if self.rounds == "continue" and self.lora is not None and self.method in NEEDS_REFERENCE:
            raise ValueError(
                f"`rounds: continue` does not work with method {self.method} and lora: the reference must be the model "
                "that the round starts from, but adapters switched off give the base\n"
                "hint: use `rounds: restart`, train the whole UNet (`lora: null`), or a method without a reference"
            )
        return self

    @model_validator(mode="after")
    def batches_divide(self) -> Self:
        """Require a global batch of whole micro-batches, shared evenly by a fixed number of workers."""
        _, most = self.worker_range
        is_fixed = isinstance(self.num_workers, int)
        share = self.micro_batch_size * (most if is_fixed else 1)
        if self.global_batch_size % share:
            below = self.global_batch_size // share * share
            by = "micro_batch_size x num_workers" if is_fixed else "micro_batch_size"
            of = f"{self.micro_batch_size} x {most} = {share}" if is_fixed else f"{share}"
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of {by} = {of}\n"
                f"hint: the nearest multiples are {', '.join(str(n) for n in (below, below + share) if n)}"
            )
        if most > self.global_batch_size // self.micro_batch_size:
            raise ValueError(
                f"num_workers {self.num_workers}: a global batch of {self.global_batch_size} has "
                f"{self.global_batch_size // self.micro_batch_size} micro-batches of {self.micro_batch_size}, "
                f"and each worker needs at least one\nhint: lower num_workers or micro_batch_size"
            )
        return self

    @model_validator(mode="after")
    def offload_has_a_place(self) -> Self:
        """Require a folder and ZeRO-3 for NVMe, and an optimizer that works with the offload."""
        if self.offload == "nvme" and (self.offload_path is None or self.zero_stage != 3):
            raise ValueError(
                f"offload nvme needs zero_stage 3 and offload_path; given: {self.zero_stage}, {self.offload_path}"
                "\nhint: `offload: cpu` works with every stage"
            )
        if self.offload != "nvme" and self.offload_path is not None:
            raise ValueError("offload_path is set, but offload is not nvme\nhint: leave `train.offload_path` out")
        with _as_value_error():
            check_offload(self.optimizer, self.offload)
        return self

    @model_validator(mode="after")
    def prodigy_is_the_optimizer(self) -> Self:
        """Reject settings of an optimizer that is not used."""
        if self.prodigy != ProdigyConfig() and self.optimizer != "prodigy":
            raise ValueError(
                f"`prodigy` is set, but optimizer is {self.optimizer}\nhint: leave `train.prodigy` out, or use "
                "`optimizer: prodigy`"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """The smallest and the largest number of workers."""
        return worker_range(self.num_workers)

    @property
    def loss_parameters(self) -> dict[str, float]:
        """All parameters of the method: the given ones over its defaults."""
        return check_parameters(self.method, self.loss)


_LATER = (
    "null_prompt", "flips", "prediction_type", "sft_weight", "rejected_weight", "margin_share", "safeguard",
    "snr_weighting", "noise_offset",
)  # fmt: skip
LATER_KEYS: Mapping[str, Any] = MappingProxyType(
    {name: TrainConfig.model_fields[name].default for name in _LATER}
    | {"timesteps": TimestepsConfig().model_dump(mode="json"), "prodigy": ProdigyConfig().model_dump(mode="json")}
    | {"ema.warmup": EmaConfig.model_fields["warmup"].default}
)
"""Keys of `train` that later versions added, with their defaults: at its default a key changes no training's identity,
so that older trainings are still found."""


class ExportConfig(Config):
    """Export of a checkpoint as a diffusers model."""

    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint, or the one with the lowest validation loss."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """The moving average (ema) or the weights themselves (raw); auto takes the average if there is one."""
    parts: Literal["pipeline", "unet"] = "pipeline"
    """The whole pipeline, or the UNet alone. LoRA adapters are written next to either."""
    push_to_hub: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Also push the model to this Hugging Face repository, such as me/sdxl-aligned, as private; needs HF_TOKEN."""
