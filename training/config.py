"""Configuration of training. Imports neither ray nor torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipelines.dataset.config import Config
from pipelines.dataset.errors import ConfigError
from training.methods import check_parameters

LATER = "this version of mapo does not have it yet"


class TrainConfig(Config):
    """MaPO on DeepSpeed ZeRO."""

    method: str = "mapo_paper"
    """A loss: mapo_paper, mapo or sft."""
    loss: dict[str, float] = Field(default_factory=dict)
    """The method's own parameters; what is left out has the method's default."""
    num_workers: int = Field(1, ge=1)
    """Ray Train workers, one GPU each (or a CPU)."""
    global_batch_size: int = Field(2048, ge=1)
    """Pairs of one optimizer step over all workers; gradient accumulation follows from it."""
    micro_batch_size: int = Field(8, ge=1)
    """Pairs of one forward pass."""
    max_steps: int = Field(2000, ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(1e-7, gt=0)
    """The highest learning rate of the schedule."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the rate rises linearly from 0."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip the gradient of the global batch to this norm."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of the forward and backward pass; the optimizer keeps float32 weights."""
    zero_stage: Literal[1, 2, 3] = 2
    """What DeepSpeed shards: 1 optimizer states, 2 also gradients, 3 also parameters."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer states live."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, a third more arithmetic."""
    prompt_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of pairs whose prompt becomes the null conditioning, the same for both images."""
    lora: dict[str, int] | None = None
    """Train low-rank adapters instead of the whole UNet."""
    ema: dict[str, float] | None = None
    """Keep an exponential moving average of the weights."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints."""
    validate_every: int = Field(100, ge=1)
    """Steps between validations on the held-out pairs."""
    max_validation_pairs: int = Field(256, ge=1)
    """Held-out pairs a validation uses; the first by key if there are more."""
    max_failures: int = Field(3, ge=0)
    """Restarts of the workers, each from the last checkpoint, before the stage fails."""

    @model_validator(mode="after")
    def method_knows_its_parameters(self) -> Self:
        """A wrong name is found before anything starts."""
        try:
            check_parameters(self.method, self.loss)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def batches_divide(self) -> Self:
        """A global batch is a whole number of micro-batches, shared evenly by the workers."""
        share = self.micro_batch_size * self.num_workers
        if self.global_batch_size % share:
            below = self.global_batch_size // share * share
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size x num_workers = "
                f"{self.micro_batch_size} x {self.num_workers} = {share}\n"
                f"hint: the nearest that fit are {', '.join(str(n) for n in (below, below + share) if n)}"
            )
        return self

    @model_validator(mode="after")
    def nothing_is_ignored(self) -> Self:
        """A key that this version cannot honour is refused, never silently dropped."""
        for name, unset in (("lora", None), ("ema", None), ("offload", "none")):
            if getattr(self, name) != unset:
                raise ValueError(f"{name}: {LATER}\nhint: leave `train.{name}` out")
        if self.precision == "fp16":
            raise ValueError(f"precision fp16: {LATER}\nhint: use bf16, or fp32")
        return self

    @property
    def loss_parameters(self) -> dict[str, float]:
        """All parameters of the method: the given ones over its defaults."""
        return check_parameters(self.method, self.loss)


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
