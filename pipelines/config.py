"""Configuration of the data stages. Imports neither ray nor torch."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pipelines.dataset.config import Config, Device, Resources, WorkerCount, worker_range
from pipelines.dataset.model_files import ModelSource
from pipelines.sources.config import SourceConfig as SourceConfig


class IngestConfig(Config):
    """Sources to pair shards."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where preferences come from."""
    max_shard_bytes: int = Field(268_435_456, ge=65_536)
    """Close a shard once it reaches this size."""
    validation_ratio: float = Field(0.01, ge=0.0, lt=1.0)
    """Share of prompts held out from training, by prompt hash, where a source has no splits of its own."""
    ties: Literal["drop", "keep"] = "drop"
    """What becomes of a pair without a preference."""
    min_vote_share: float = Field(0.5, ge=0.5, le=1.0)
    """A preference of fewer votes than this share is a tie."""
    image_check: Literal["full", "header"] = "full"
    """Read every image's whole stream, or only its header: faster, and a cut image shows in encode."""
    resources: Resources = Field(default_factory=dict)
    """Custom resources of Ray that each reading task asks for as well: they keep it to the nodes that have them."""
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
        raise ValueError("a bucket is in the list twice")
    return value


def _check_bucket(bucket: object) -> None:
    """Check one bucket of the list."""
    if not isinstance(bucket, list | tuple) or len(bucket) != 2 or not all(type(side) is int for side in bucket):
        raise ValueError(f"a bucket is [height, width] in whole pixels, not {bucket}")
    if any(side < MIN_SIDE or side % VAE_FACTOR for side in bucket):
        raise ValueError(
            f"a bucket's sides are multiples of {VAE_FACTOR} from {MIN_SIDE} pixels on, not {list(bucket)}"
        )


class EncodeConfig(Config):
    """Pair shards to latent and text shards."""

    model: str = Field(min_length=1)
    """Path, fsspec URL or hub id of a diffusers pipeline of the SDXL or the Stable Diffusion family."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of the model on the hub."""
    variant: str | None = Field(None, pattern=r"^[\w-]+$")
    """Which weights of the model, such as fp16; the plain ones by default."""
    vae: str | None = None
    """Another VAE than the pipeline's own, such as madebyollin/sdxl-vae-fp16-fix."""
    vae_dtype: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """What the VAE computes in; float16 is refused for a VAE with `force_upcast`, SDXL's own one among them."""
    resolution: int = Field(1024, ge=MIN_SIDE)
    """Side of a square image after resizing, in pixels; the area of every bucket of the default list."""
    buckets: Annotated[bool | tuple[tuple[int, int], ...], BeforeValidator(_buckets)] = True
    """Aspect buckets: SDXL's own list, scaled (true), a list of [height, width], or the square centre crop (false)."""
    flips: bool = False
    """Encode every image mirrored as well, so that `train.flips` can draw one of the two: twice the time and bytes."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the stored numbers."""
    batch_size: int = Field(8, ge=1)
    """Images a VAE pass, prompts a text pass; halved by itself when memory runs out."""
    num_workers: WorkerCount = 1
    """Encoders, one GPU each (or a CPU): a number, or 2..8 for as many of that as there is room for."""
    device: Device = "auto"
    """What encoders run on: `auto` is GPUs if the cluster has some now; `gpu` waits for an autoscaler's."""
    resources: Resources = Field(default_factory=dict)
    """Custom resources of Ray that each encoder asks for as well: they keep it to the nodes that have them."""
    start_timeout_s: int | None = Field(None, ge=1)
    """Seconds to wait for a node that has what an encoder, or a sampler of `evaluate`, asks for; by default 60 without
    an autoscaler and 1800 with one."""
    max_drop_ratio: float = Field(0.05, ge=0.0, le=1.0)
    """Share of pairs, or of prompts, that may be quarantined before the stage fails."""

    @property
    def source(self) -> ModelSource:
        """The base model as the stages read it."""
        return ModelSource(self.model, self.vae, self.revision, self.variant)

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the most encoders."""
        return worker_range(self.num_workers)

    @model_validator(mode="after")
    def resolution_fits_the_vae(self) -> Self:
        """Check that the VAE, which halves the side two or three times, divides the resolution."""
        if self.resolution % VAE_FACTOR:
            raise ValueError(f"resolution must be a multiple of {VAE_FACTOR}, not {self.resolution}")
        return self
