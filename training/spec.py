"""The pinned inputs of a training run, passed as a whole from the driver to every worker."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

from pipelines.dataset.layout import RUNS
from pipelines.dataset.model_files import ModelSource, file_digests, read_config, weight_files
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject
from training.config import LATER_KEYS, TrainConfig

KEYS_NOT_IN_DIGEST = (
    "loss", "max_failures", "checkpoint_every", "keep_checkpoints", "keep_best", "validate_every",
    "max_validation_pairs", "sample_every", "num_samples", "trackers", "trouble", "read_ahead", "cache_dir",
    "max_cache_bytes", "start_timeout_s", "collective_timeout_s", "environment", "peak_tflops",
    "rounds", "keep_rounds",  # the parent is in the key by itself
    # These change the weights by rounding alone: a run may go on with others.
    "num_workers", "device", "zero_stage", "offload", "offload_path", "gradient_checkpointing", "attention",
    "channels_last", "compile",
)  # fmt: skip
"""Keys of `train` that do not change a training's identity."""
RATE_BEFORE = 1e-7
"""The default `learning_rate` of every method, before each had its own."""


@dataclass(frozen=True)
class Snapshot:
    """The versions of the tables a run reads; later commits change nothing for it."""

    pairs_version: int
    latents_fingerprint: str
    latents_version: int
    text_fingerprint: str
    text_version: int


@dataclass(frozen=True)
class Parent:
    """The finished round that a training starts from, and which of its weights.

    Args:
        round: The round's number.
        key: The key of its training.
        checkpoint: The folder of the checkpoint, relative to the storage.
        manifest: sha256 of the checkpoint's manifest, and so of all its contents.
        weights: `raw`, the float32 weights themselves, or `ema`, their average.
        base_digest: Digest of the base that the first round was trained from.
        lora: The section `train.lora`; None if the whole UNet was trained.
    """

    round: int
    key: str
    checkpoint: str
    manifest: str
    weights: str
    base_digest: str
    lora: JsonObject | None

    @property
    def identity(self) -> dict[str, str]:
        """The values that identify the parent."""
        return {name: getattr(self, name) for name in ("key", "checkpoint", "manifest", "weights")}

    def __str__(self) -> str:
        return f"round {self.round} ({self.checkpoint})"


def base_digest(base: ModelSource) -> str:
    """Return 16 hex digits for what training starts from: the UNet's weights and configuration, and the noise schedule.

    Raises:
        ModelError: The model is missing, incomplete or damaged.
    """
    folder = base.folder()
    files = [folder / "scheduler" / "scheduler_config.json", folder / "unet" / "config.json"]
    for file in files:
        read_config(file)
    files += weight_files(folder / "unet", "diffusion_pytorch_model", base.variant)
    return hashlib.sha256(json.dumps(file_digests(files), sort_keys=True).encode()).hexdigest()[:16]


def stated_prediction(base: ModelSource) -> str:
    """Return what the UNet predicts according to the base's scheduler file; `epsilon` if the file does not say.

    Raises:
        ModelError: The file is missing or damaged.
    """
    return str(read_config(base.folder() / "scheduler" / "scheduler_config.json").get("prediction_type") or "epsilon")


def adapter_file(folder: str, digest: str) -> str:
    """Return where a run keeps its copy of the adapters that a training starts from.

    Args:
        folder: The run's folder on the storage.
        digest: The file's sha256.
    """
    return f"{folder}/adapters/{digest}.safetensors"


@dataclass(frozen=True)
class TrainSpec:
    """Everything a worker needs to know.

    Args:
        storage_url: The storage of data set and runs.
        run: The run's name.
        base: The base pipeline, as the section `encode` names it.
        base_digest: Digest of the weights that training starts from.
        seed: The run's seed.
        config: The `train` section.
        snapshot: Pinned tables.
        round: The number of this round, from 1.
        parent: The round whose weights it starts from; None if it starts from the base.
        float32_digest: Digest of the base's float32 weights, if they lie next to those of `encode.variant` and
            training starts from them; from `training.state.float32_base`.
        adapter_digest: sha256 of the file of adapters that training starts from; None if it starts from new ones, or
            from a parent.
        is_prediction_type_stated: Whether the scheduler file says the same as `train.prediction_type`, which then
            changes nothing except that a base which looks distilled is accepted.
        masters: Where the float32 weights of a 16-bit training of the whole UNet start: at the base's own float32
            weights, or at those rounded to 16 bits, as in versions before December 2026.
        begun_max_steps: The `max_steps` that it began with, if it was extended since: its key stays.
    """

    storage_url: str
    run: str
    base: ModelSource
    base_digest: str
    seed: int
    config: TrainConfig
    snapshot: Snapshot
    round: int = 1
    parent: Parent | None = None
    float32_digest: str | None = None
    adapter_digest: str | None = None
    is_prediction_type_stated: bool = False
    masters: Literal["float32", "rounded"] = "float32"
    begun_max_steps: int | None = None

    @property
    def storage(self) -> Storage:
        """The storage, opened in the process that uses it."""
        return Storage(self.storage_url)

    @property
    def folder(self) -> str:
        """The run's folder on the storage."""
        return f"{RUNS}/{self.run}"

    @property
    def key(self) -> str:
        """16 hex digits for all that shapes the trained weights; checkpoints of another key are never resumed."""
        config = self.config.model_copy(update={"max_steps": self.key_max_steps})
        shaping = {
            "config": _shaping_config(config, ("prediction_type",) if self.is_prediction_type_stated else ()),
            "loss": self.config.loss_parameters,  # with the defaults: saying a default changes nothing
            "seed": self.seed,
            "base": self.base_digest,
            "snapshot": asdict(self.snapshot),
        }
        if self.parent is not None:
            shaping["parent"] = self.parent.identity
        if self.adapter_digest is not None:
            shaping["adapter"] = self.adapter_digest
        if self.starts_from_float32:
            shaping["masters"] = " ".join(filter(None, (self.masters, self.float32_digest)))
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def key_max_steps(self) -> int:
        """The `max_steps` in its key: the one that it began with."""
        return self.config.max_steps if self.begun_max_steps is None else self.begun_max_steps

    @property
    def starts_from_float32(self) -> bool:
        """Whether to load the base's own float32 weights: from a 16-bit model the engine would get rounded ones."""
        return self.is_whole_in_16_bits and self.masters == "float32"

    @property
    def unet_source(self) -> ModelSource:
        """Where the UNet is read from: the base as configured, or the float32 weights next to it."""
        if self.float32_digest is None or not self.starts_from_float32:
            return self.base
        return ModelSource(str(self.base.folder()), self.base.vae)

    @property
    def is_whole_in_16_bits(self) -> bool:
        """Whether all weights of the base are trained in 16 bits, from the base itself."""
        return self.config.precision != "fp32" and self.config.lora is None and self.parent is None

    def as_legacy(self) -> "TrainSpec":
        """Return this training as in versions before December 2026, under the key that it had there.

        Their 16-bit trainings started from rounded weights, an average had no warm-up, and `learning_rate` was 1e-7
        by default.
        """
        changes: JsonObject = {}
        if "learning_rate" not in self.config.model_fields_set:
            changes["learning_rate"] = RATE_BEFORE
        if self.config.ema is not None and "warmup" not in self.config.ema.model_fields_set:
            changes["ema"] = self.config.ema.model_copy(update={"warmup": False})
        return replace(self, config=self.config.model_copy(update=changes), masters="rounded")

    @property
    def checkpoints(self) -> str:
        """The folder of this training's checkpoints; its last part is the key."""
        return f"{self.folder}/checkpoints/{self.key}"

    @property
    def stop_file(self) -> str:
        """The file in which workers note why they stopped a failing run."""
        return f"{self.checkpoints}/stopped.json"


def _shaping_config(config: TrainConfig, others: tuple[str, ...]) -> JsonObject:
    """Return the keys of `train` that shape weights: without later keys at their default, and without `others`."""
    shaping = config.model_dump(mode="json", exclude={*KEYS_NOT_IN_DIGEST, *others})
    for name in LATER_KEYS.keys() - {*others, "ema.warmup"}:
        if shaping[name] == LATER_KEYS[name]:
            del shaping[name]
    if config.lora is not None:
        shaping["lora"].pop("weights", None)  # the digest counts, not the place
    if config.ema is not None and not config.ema.warmup:  # averages had none before: that is off, not the default
        del shaping["ema"]["warmup"]
    return shaping
