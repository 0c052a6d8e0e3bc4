"""Configuration of the data stages. Imports neither ray nor torch."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pipelines.dataset.config import Config, Device, Resources, WorkerCount, worker_range
from pipelines.dataset.model_files import ModelSource
from pipelines.sources.config import SourceConfig as SourceConfig


class IngestConfig(Config):
    """Ingest: from preference sources to pair shards."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """The preference sources to read."""
    max_shard_bytes: int = Field(268_435_456, ge=65_536)
    """Close a shard once it reaches this size."""
    validation_ratio: float = Field(0.01, ge=0.0, lt=1.0)
    """Share of prompts held out from training, by prompt hash; for sources without their own splits."""
    ties: Literal["drop", "keep"] = "drop"
    """What to do with a pair without a preference."""
    min_vote_share: float = Field(0.5, ge=0.5, le=1.0)
    """A preference with a smaller share of the votes than this is a tie."""
    image_check: Literal["full", "header"] = "full"
    """Check every image's whole stream, or only its header: faster, but truncated images surface only in encode."""
    resources: Resources = Field(default_factory=dict)
    """Custom Ray resources that each reading task requests as well; it then runs only on nodes that have them."""
    max_drop_ratio: float = Field(0.05, ge=0.0, le=1.0)
    """Share of rows that may be quarantined before the stage fails."""


MIN_SIDE = 32
VAE_FACTOR = 8


def _buckets(value: object) -> object:
    """Check that the value is true, false, or a list of [height, width]."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("write true, false (one square) or a list of [height, width], such as [[64, 64], [48, 80]]")
    for bucket in value:
        _check_bucket(bucket)
    if len({tuple(bucket) for bucket in value}) < len(value):
        raise ValueError("the list contains a bucket twice")
    return value


def _check_bucket(bucket: object) -> None:
    """Check one bucket of the list."""
    if not isinstance(bucket, list | tuple) or len(bucket) != 2 or not all(type(side) is int for side in bucket):
        raise ValueError(f"a bucket must be [height, width] in whole pixels, not {bucket}")
    if any(side < MIN_SIDE or side % VAE_FACTOR for side in bucket):
        raise ValueError(
            f"a bucket's sides must be multiples of {VAE_FACTOR} and at least {MIN_SIDE} pixels, not {list(bucket)}"
        )


class EncodeConfig(Config):
    """Encoding: from pair shards to latent and text shards."""

    model: str = Field(min_length=1)
    """Path, fsspec URL or Hugging Face id of a diffusers pipeline of the SDXL or the Stable Diffusion family."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of a model on the Hugging Face hub."""
    variant: str | None = Field(None, pattern=r"^[\w-]+$")
    """Variant of the model's weights, such as fp16; by default the plain files."""
    vae: str | None = None
    """A VAE to use instead of the pipeline's own, such as madebyollin/sdxl-vae-fp16-fix."""
    vae_dtype: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """Type that the VAE computes in; float16 is rejected for a VAE with `force_upcast`, such as SDXL's own."""
    resolution: int = Field(1024, ge=MIN_SIDE)
    """Side of a square image after resizing, in pixels; the buckets of the default list have about this area."""
    buckets: Annotated[bool | tuple[tuple[int, int], ...], BeforeValidator(_buckets)] = True
    """Aspect buckets: SDXL's own list, scaled (true), a list of [height, width], or the square centre crop (false)."""
    flips: bool = False
    """Also encode every image mirrored, so that `train.flips` can draw either one; doubles time and bytes."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the stored numbers."""
    batch_size: int = Field(8, ge=1)
    """Images in one VAE pass, prompts in one text pass; halved automatically when memory runs out."""
    num_workers: WorkerCount = 1
    """Encoders, one GPU (or CPU) each: a number, or a range such as 2..8 for as many of these as fit."""
    device: Device = "auto"
    """What encoders run on: `auto` takes GPUs if the cluster has any now; `gpu` waits for an autoscaler to add them."""
    resources: Resources = Field(default_factory=dict)
    """Custom Ray resources that each encoder requests as well; it then runs only on nodes that have them."""
    start_timeout_s: int | None = Field(None, ge=1)
    """Seconds to wait for a node with the resources of an encoder, or of a sampler of `evaluate`; by default 1800 with
    an autoscaler and 60 without."""
    max_drop_ratio: float = Field(0.05, ge=0.0, le=1.0)
    """Share of pairs, or of prompts, that may be quarantined before the stage fails."""

    @property
    def source(self) -> ModelSource:
        """The base model that the stages read."""
        return ModelSource(self.model, self.vae, self.revision, self.variant)

    @property
    def worker_range(self) -> tuple[int, int]:
        """The smallest and the largest number of encoders."""
        return worker_range(self.num_workers)

    @model_validator(mode="after")
    def resolution_fits_the_vae(self) -> Self:
        """Check that the VAE, which halves the side two or three times, divides the resolution."""
        if self.resolution % VAE_FACTOR:
            raise ValueError(f"resolution must be a multiple of {VAE_FACTOR}, not {self.resolution}")
        return self
