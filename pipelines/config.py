"""Configuration of the data stages. Imports neither ray nor torch."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

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
    prompt_chunks: int = Field(1, ge=1, le=32)
    """Chunks of 75 tokens in which every prompt is embedded; what is beyond the last is cut off. 3 are 225 tokens, in
    three times the bytes."""
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


BASE, ALIGNED, CHECKPOINTS = "base", "aligned", "checkpoints"
OF_CHECKPOINT = re.compile(r"step-\d+")
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class PromptFile(Config):
    """A file of prompts."""

    path: str = Field(min_length=1)
    """A path or fsspec URL of a .txt (one prompt a line), .jsonl, .csv, .tsv or .parquet file."""
    column: str = Field("prompt", min_length=1)
    """The column, or the key of each JSON line, that holds the prompt."""
    limit: int | None = Field(None, ge=1)
    """Use only so many of the prompts, chosen by the run's seed."""


class NamedModel(Config):
    """Another model to judge: a whole pipeline, a UNet for the base pipeline, or a LoRA for it."""

    name: str = Field(pattern=MODEL_NAME, max_length=60)
    """Its name in the results."""
    model: str | None = Field(None, min_length=1)
    """Path, fsspec URL or Hugging Face id of a diffusers pipeline; by default the run's base model."""
    unet: bool = False
    """Take only the UNet of `model`, and everything else of the run's base model."""
    lora: str | None = Field(None, min_length=1)
    """Path or fsspec URL of a LoRA, as `load_lora_weights` of diffusers reads it."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of a model on the Hugging Face hub."""
    variant: str | None = Field(None, pattern=r"^[\w-]+$")
    """Variant of the model's weights, such as fp16; by default the plain files."""

    @model_validator(mode="after")
    def names_a_model(self) -> Self:
        """Check that there is something to judge besides the base itself."""
        if self.model is None and self.lora is None:
            raise ValueError("set `model`, `lora` or both")
        if self.model is None and (self.unet or self.revision or self.variant):
            raise ValueError("`unet`, `revision` and `variant` belong to `model`, which is not set")
        if self.name in (BASE, ALIGNED, CHECKPOINTS) or OF_CHECKPOINT.fullmatch(self.name):
            raise ValueError(f"the name {self.name} is taken: give the model another one")
        return self


class ScorerEntry(Config):
    """A scorer with settings of its own."""

    name: str = Field(min_length=1)
    """A name of `mapo scorers`, or `module:Class`."""
    weights: str | None = Field(None, min_length=1)
    """A folder of weights; by default those that `mapo scorers fetch` brought."""
    batch_size: int = Field(32, ge=1)
    """Images in one pass; halved automatically when memory runs out."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the scorer itself, for those that have some."""

    @model_serializer(mode="wrap")
    def _without_no_options(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave empty options out, so that the digests of configurations without them stay as they were."""
        found: dict[str, Any] = serialize(self)
        return found if found.get("options") else {name: each for name, each in found.items() if name != "options"}


def _prompt_file(value: object) -> object:
    """Take a path alone for a `PromptFile`."""
    return {"path": value} if isinstance(value, str) else value


class EvaluateConfig(Config):
    """Evaluation: samples of several models with the same prompts and noise, and their scores."""

    num_samples: int = Field(64, ge=1)
    """Samples of each model in the suite `held-out`: of its distinct prompts, as many images a prompt as fit."""
    num_inference_steps: int | None = Field(None, ge=1)
    """Denoising steps of a sample, with the pipeline's own scheduler; by default the suite's own, 30 for ours."""
    guidance_scale: float | None = Field(None, ge=0.0)
    """Classifier-free guidance; 1 or less turns it off. By default the suite's own, 5 for ours."""
    batch_size: int = Field(16, ge=1)
    """Samples in one pipeline call; halved automatically when memory runs out."""
    scorers: tuple[str | ScorerEntry, ...] = ()
    """Scorers in addition to those of the suites: names of `mapo scorers`, `module:Class`, `imported:NAME` for imported
    scores, and `votes` for the votes of people."""
    suites: tuple[str, ...] | None = None
    """Suites of prompts; by default `held-out`, or the suite `prompts` alone if `prompts` is set."""
    prompts: Annotated[PromptFile | None, BeforeValidator(_prompt_file)] = None
    """A file of your own prompts, as the suite `prompts`."""
    models: tuple[str | NamedModel, ...] = (BASE, ALIGNED)
    """The models to judge: base, aligned, checkpoints, and others by name."""
    against: str = BASE
    """The model that differences and win rates compare with."""
    images_per_prompt: int | None = Field(None, ge=1)
    """Images of each prompt; by default the suite's own."""
    resolution: int | None = Field(None, ge=MIN_SIDE)
    """Side of a square sample, in pixels; by default the suite's own, or `encode.resolution`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that pipelines compute in; `auto` is float16 on a GPU and float32 on a CPU."""
    num_workers: WorkerCount = 1
    """Samplers, one GPU (or CPU) each: a number, or a range such as 2..8 for as many of these as fit."""
    limit_prompts: int | None = Field(None, ge=1)
    """Use only so many prompts of each suite, chosen by the run's seed: for a look, not as the suite's protocol."""
    max_audit_pairs: int = Field(512, ge=0)
    """Held-out human pairs on which every scorer is audited; scorers with a `fit` learn from the same pairs."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """The smallest and the largest number of samplers."""
        return worker_range(self.num_workers)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of the models in `models`."""
        return tuple(model if isinstance(model, str) else model.name for model in self.models)

    @property
    def scorer_entries(self) -> tuple[ScorerEntry, ...]:
        """The scorers, each with its settings."""
        return tuple(ScorerEntry(name=each) if isinstance(each, str) else each for each in self.scorers)

    @property
    def suite_names(self) -> tuple[str, ...]:
        """The names of the suites, with their defaults."""
        if self.suites is not None:
            return (*self.suites, *(["prompts"] if self.prompts is not None and "prompts" not in self.suites else []))
        return ("held-out",) if self.prompts is None else ("prompts",)

    @model_validator(mode="after")
    def models_are_known(self) -> Self:
        """Check the names of the models, and that there is one to compare with."""
        names = self.model_names
        unknown = [each for each in self.models if isinstance(each, str) and each not in (BASE, ALIGNED, CHECKPOINTS)]
        if unknown:
            raise ValueError(
                f"models: {unknown[0]} is not base, aligned or checkpoints; name others as {{name: ..., model: ...}}"
            )
        if not names or len(set(names)) < len(names):
            raise ValueError(f"models: {'there is none' if not names else 'two models have the same name'}")
        if self.against not in names or self.against == CHECKPOINTS:
            raise ValueError(f"against: {self.against} is not one of the models {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def prompts_and_sizes_fit(self) -> Self:
        """Check that suites and scorers are named once, that `prompts` has prompts, and that a VAE divides the size."""
        suites, scorers = [each.partition("@")[0] for each in self.suite_names], [e.name for e in self.scorer_entries]
        for key, names in (("suites", suites), ("scorers", scorers)):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key}: {twice[0]} is there twice")
        if not suites:
            raise ValueError("suites: name at least one")
        if "prompts" in self.suite_names and self.prompts is None:
            raise ValueError("suites: the suite `prompts` needs the key `prompts`, a file of prompts")
        if self.resolution is not None and self.resolution % VAE_FACTOR:
            raise ValueError(f"resolution must be a multiple of {VAE_FACTOR}, not {self.resolution}")
        return self
