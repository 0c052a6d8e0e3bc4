"""Configuration of training, export and evaluation. Imports neither ray nor torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from pipelines.dataset.config import Config, Device, WorkerCount, worker_range
from pipelines.dataset.errors import ConfigError
from training.methods import NEEDS_REFERENCE, check_parameters, default_rate
from training.tracking.backends import BACKENDS

if TYPE_CHECKING:
    TrackerName = str
else:
    TrackerName = Literal[tuple(BACKENDS)]

Action = Literal["stop", "warn", "ignore"]
NullPrompt = Literal["auto", "zeros", "empty"]
Flips = Literal["none", "pair", "image"]


class LoraConfig(Config):
    """Low-rank adapters on the attention projections of the UNet."""

    rank: int = Field(ge=1)
    """Rank of each adapter."""
    alpha: float | None = Field(None, gt=0)
    """Scale of an adapter is alpha / rank; the rank by default, so that the scale is 1."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the linear layers that get an adapter; the attention projections by default, as the released code."""


class EmaConfig(Config):
    """Exponential moving average of the weights, in float32, each rank its own part."""

    decay: float = Field(0.9999, gt=0.0, lt=1.0)
    """Largest share of the average that stays at an optimizer step."""
    warmup: bool = True
    """Let the share rise as (1 + s) / (10 + s) with the finished steps s, up to `decay`: without it a short training
    exports mostly its base."""


class TroubleConfig(Config):
    """What a run does when its numbers go wrong."""

    not_finite: Literal["stop"] = Field("stop", json_schema_extra={"hidden": True})
    """No setting: accepted for older configurations, and ignored."""
    error_explosion: Action = "stop"
    """The chosen error has grown to `max_error_ratio` times what it was at the start."""
    max_error_ratio: float = Field(5.0, gt=1.0)
    """Mean of the newest window of steps against the mean of the first one."""
    no_preference: Action = "warn"
    """The implicit accuracy has stayed at 0.5, within what chance allows, for `patience` steps."""
    skipped_steps: Action = "stop"
    """fp16 found no loss scale at which gradients are finite, for `window` steps in a row."""
    window: int = Field(20, ge=1)
    """Steps of a window."""
    patience: int = Field(500, ge=1)
    """Steps after which a run that has learnt no preference is in trouble."""


def _default_learning_rate(given: Mapping[str, Any]) -> float:
    return default_rate(given.get("method", ""), with_adapters=given.get("lora") is not None).value


class TrainConfig(Config):
    """MaPO on DeepSpeed ZeRO."""

    method: str = "mapo_paper"
    """The loss, by its name in [Losses](#losses)."""
    loss: dict[str, float] = Field(default_factory=dict)
    """The method's own parameters; what is left out has the method's default."""
    labels: Literal["soft", "hard"] = "soft"
    """A vote share of 0.7 weighs the two orders 0.7 and 0.3, a kept tie half and half (soft); or the preferred image
    is chosen outright and kept ties are left out (hard)."""
    num_workers: WorkerCount = 1
    """Ray Train workers, one GPU each (or a CPU): a number, or 2..8 for as many of that as there is room for."""
    device: Device = "auto"
    """What workers run on: `auto` is GPUs if the cluster has some now; `gpu` waits for an autoscaler's."""
    global_batch_size: int = Field(2048, ge=1)
    """Pairs of one optimizer step over all workers; gradient accumulation follows from it."""
    micro_batch_size: int = Field(8, ge=1)
    """Pairs of one forward pass."""
    max_steps: int = Field(2000, ge=1)
    """Optimizer steps."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the whole UNet, such as {rank: 64}."""
    learning_rate: float = Field(default_factory=_default_learning_rate, gt=0, allow_inf_nan=False)
    """The highest learning rate of the schedule; left out or null, the published one of the method for all weights or
    for adapters, which the plan names with its source."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the rate rises linearly from 0."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, fused on GPUs; or with 8-bit states (needs bitsandbytes: `pip install 'mapo[gpu]'`)."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled weight decay."""
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
    """Recompute activations in the backward pass: of all blocks (true; a quarter more arithmetic), of the convolutional
    ones alone (5 % more), of the transformers alone (20 % more), or of none."""
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    """Back end of scaled dot product attention; auto lets torch choose."""
    channels_last: bool = True
    """Lay activations out as convolutions on GPUs like them."""
    compile: bool = False
    """Compile the repeated transformer blocks with torch.compile; each shape compiles once, at its first batch."""
    prompt_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of pairs whose prompt becomes the null conditioning, the same for both images."""
    null_prompt: NullPrompt = "auto"
    """What a dropped prompt becomes: what the base's pipeline takes for guidance (auto: zeros for SDXL, the embedding
    of "" for SD 1.x and 2.x), zeros, or the embedding of "" (empty), as Diffusion-DPO's script trains."""
    flips: Flips = "none"
    """Mirror half of the pairs, both images alike (pair), or half of all images (image); needs `encode.flips`."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base predicts, where its scheduler file is known to be wrong; by default what that file says."""
    ema: EmaConfig | None = None
    """Keep an exponential moving average of the weights, such as {decay: 0.9999}."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest checkpoints that are kept."""
    keep_best: bool = True
    """Keep the checkpoint with the least validation loss too."""
    rounds: Literal["restart", "continue"] = "restart"
    """On a new snapshot train the base model anew, or continue from the model that the run exported last."""
    keep_rounds: int = Field(2, ge=1)
    """The newest finished rounds whose checkpoints are kept; of older ones the records alone."""
    validate_every: int = Field(100, ge=1)
    """Steps between validations on the held-out pairs."""
    max_validation_pairs: int = Field(256, ge=1)
    """Held-out pairs a validation uses: if there are more, those of the first buckets, by key within a bucket."""
    sample_every: int | None = Field(None, ge=1)
    """Steps between grids of samples from held-out prompts; none by default."""
    num_samples: int = Field(4, ge=1)
    """Samples of a grid."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where curves go beside the report; wandb and mlflow are configured by their own environment variables."""
    trouble: TroubleConfig = TroubleConfig()
    """What a run does when its numbers go wrong."""
    max_failures: int = Field(3, ge=0)
    """Restarts of the workers, each from the last checkpoint, before the stage fails."""
    read_ahead: int = Field(8, ge=1)
    """Micro-batches that are read ahead of the step."""
    cache_dir: str | None = None
    """A folder on each node that keeps the shards it has read; none by default."""
    max_cache_bytes: int = Field(107_374_182_400, ge=1)
    """The least recently used shards leave `cache_dir` above this size."""
    start_timeout_s: int = Field(1800, ge=1)
    """Seconds to wait for the GPUs of `device: gpu`, where nodes may still come; left out, 60 for the first workers of
    a cluster without an autoscaler."""
    collective_timeout_s: int = Field(1800, ge=1)
    """A collective that lasts longer fails the workers, which start again from the last checkpoint."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the workers, such as NCCL_SOCKET_IFNAME or NCCL_IB_HCA; no secrets."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device for the model's FLOPs utilization; by default known for A100, H100, H200, B200 and L40S."""

    @model_validator(mode="before")
    @classmethod
    def no_rate_is_the_methods_own(cls, given: Any) -> Any:
        """Take `learning_rate: null` for one that is left out."""
        if isinstance(given, dict) and given.get("learning_rate", 0) is None:
            return {name: value for name, value in given.items() if name != "learning_rate"}
        return given

    @model_validator(mode="after")
    def method_knows_its_parameters(self) -> Self:
        """Check method and loss parameters before anything starts."""
        try:
            check_parameters(self.method, self.loss)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def reference_is_where_the_round_starts(self) -> Self:
        """Refuse adapters where the reference is the model that a round continues: switched off, they give the base."""
        if self.rounds == "continue" and self.lora is not None and self.method in NEEDS_REFERENCE:
            raise ValueError(
                f"rounds: continue with method {self.method} and lora: the reference of a round is the model that it "
                "starts from, and adapters switched off give the base\n"
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
                f"hint: the nearest that fit are {', '.join(str(n) for n in (below, below + share) if n)}"
            )
        if most > self.global_batch_size // self.micro_batch_size:
            raise ValueError(
                f"num_workers {self.num_workers}: a global batch of {self.global_batch_size} has "
                f"{self.global_batch_size // self.micro_batch_size} micro-batches of {self.micro_batch_size}, "
                f"and each worker needs one\nhint: lower num_workers or micro_batch_size"
            )
        return self

    @model_validator(mode="after")
    def offload_has_a_place(self) -> Self:
        """Require a folder and ZeRO-3 for NVMe, and no offload for 8-bit states."""
        if self.offload == "nvme" and (self.offload_path is None or self.zero_stage != 3):
            raise ValueError(
                f"offload nvme needs zero_stage 3 and offload_path; they are {self.zero_stage} and {self.offload_path}"
                "\nhint: `offload: cpu` works with every stage"
            )
        if self.offload != "nvme" and self.offload_path is not None:
            raise ValueError("offload_path is set, but offload is not nvme\nhint: leave `train.offload_path` out")
        if self.offload != "none" and self.optimizer == "adamw_8bit":
            raise ValueError(
                f"offload {self.offload} and optimizer adamw_8bit exclude each other\nhint: use `optimizer: adamw`"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the most workers."""
        return worker_range(self.num_workers)

    @property
    def loss_parameters(self) -> dict[str, float]:
        """All parameters of the method: the given ones over its defaults."""
        return check_parameters(self.method, self.loss)


LATER_KEYS: Mapping[str, Any] = MappingProxyType(
    {name: TrainConfig.model_fields[name].default for name in ("null_prompt", "flips", "prediction_type")}
    | {"ema.warmup": EmaConfig.model_fields["warmup"].default}
)
"""Keys of `train` that came after there were trainings, with their defaults: at those they tell no training from an
older one."""


class ExportConfig(Config):
    """A checkpoint becomes a diffusers model."""

    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint, or the one with the least validation loss."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """The moving average, or the weights themselves; auto takes the average if there is one."""
    parts: Literal["pipeline", "unet"] = "pipeline"
    """The whole pipeline, or the UNet alone. LoRA adapters are written beside either."""
    push_to_hub: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """A hub repository, such as me/sdxl-aligned, that the model is also pushed to, privately; needs HF_TOKEN."""


class EvaluateConfig(Config):
    """Samples of the base and of the aligned model: same prompts, same seeds."""

    num_samples: int = Field(64, ge=1)
    """Samples of each model, over the held-out prompts in turn."""
    num_inference_steps: int = Field(30, ge=1)
    """Steps of the pipeline's own scheduler."""
    guidance_scale: float = Field(5.0, ge=0.0)
    """Classifier-free guidance; 1 or less is none."""
    batch_size: int = Field(16, ge=1)
    """Samples of one pipeline call."""
    scorers: tuple[str, ...] = ()
    """`module:Class` names of scorers (see training/evaluate.py); each sample of both models gets their scores."""
