"""Samples of the base and of the aligned model, with the same prompts and seeds, and their scores.

A scorer is any class with the methods of `Scorer`; name it as `module:Class` in `evaluate.scorers`.
"""

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc
from PIL import Image, ImageOps

from pipelines.dataset.errors import ConfigError, SnapshotError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.model_files import STABLE_DIFFUSION, read_family
from pipelines.dataset.pair import TRAIN, VALIDATION, Status
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject
from training.config import EvaluateConfig
from training.data.index import PREFERRED

BOOTSTRAP_RESAMPLES = 2000
MAX_REFERENCES = 512  # pairs that scorers learn from


class Scorer(Protocol):
    """Scorer of samples: one value each, higher is better.

    `fit` is given held-out pairs of the run's own data set before the first `score`.
    """

    name: str
    description: str

    def fit(self, chosen: Sequence[Any], rejected: Sequence[Any], prompts: Sequence[str]) -> None:
        """Learn from held-out pairs: PIL images and their prompts."""
        ...

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        """Return one value per sample, 0..1."""
        ...


@dataclass(frozen=True)
class References:
    """Pairs of one split as images."""

    split: str
    prompts: list[str]
    chosen: list[Image.Image]
    rejected: list[Image.Image]


def load_scorers(names: Sequence[str]) -> list[Scorer]:
    """Load scorers by their `module:Class` names.

    Raises:
        ConfigError: A name cannot be imported.
    """
    scorers: list[Scorer] = []
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            scorers.append(getattr(importlib.import_module(module), attribute)())
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"evaluate.scorers: cannot load {name}: {error}", "name a class as `module:Class` that can be imported"
            ) from error
    return scorers


def load_references(storage: Storage, version: int) -> References:
    """Load up to MAX_REFERENCES held-out pairs of a snapshot, in key order; training pairs if none is held out.

    Raises:
        SnapshotError: The snapshot has no kept pair.
    """
    for split in (VALIDATION, TRAIN):
        where = (pc.field("status") == str(Status.KEPT)) & (pc.field("split") == split)
        where &= pc.field("label_0") != PREFERRED  # a kept tie has no chosen image
        rows = pairs_table(storage, version).read(None, where).sort_by("pair_key").slice(0, MAX_REFERENCES).to_pylist()
        if rows:
            images = [[_stored_image(storage, row, side) for side in (0, 1)] for row in rows]
            chosen = [0 if row["label_0"] > PREFERRED else 1 for row in rows]
            return References(
                split,
                [row["prompt"] for row in rows],
                [pair[side] for pair, side in zip(images, chosen, strict=True)],
                [pair[1 - side] for pair, side in zip(images, chosen, strict=True)],
            )
    raise SnapshotError(f"{storage.url} has no kept pairs to evaluate with", "`mapo data show` says why")


def _stored_image(storage: Storage, row: JsonObject, side: int) -> Image.Image:
    place = (row["shard"], row[f"offset_{side}"], row[f"length_{side}"], row[f"image_{side}_sha256"])
    image = Image.open(io.BytesIO(storage.read_range(*place)))
    return ImageOps.exif_transpose(image).convert("RGB")


def sample_prompts(references: References, num_samples: int) -> list[str]:
    """Cycle through the distinct prompts of the references; return `num_samples` of them."""
    distinct = sorted(set(references.prompts))
    return [distinct[i % len(distinct)] for i in range(num_samples)]


class Sampler:
    """Sampler of one pipeline; a sample's noise follows from its own seed, whatever the batch.

    Args:
        model: Folder of a diffusers pipeline; its `model_index.json` names the class.
        vae: Folder of a VAE that replaces the pipeline's own, or None.
        config: The section `evaluate`.
        resolution: Side of the square samples, in pixels.
        variant: Variant of the pipeline's weights, such as fp16; the plain ones by default.
        unet: Folder of a UNet that replaces the pipeline's own, or None.
        prediction_type: What the UNet predicts, if the pipeline's scheduler file is wrong.
    """

    def __init__(
        self,
        model: str,
        vae: str | None,
        config: EvaluateConfig,
        resolution: int,
        variant: str | None = None,
        unet: str | None = None,
        prediction_type: str | None = None,
    ) -> None:
        import diffusers
        import torch

        family = read_family(Path(model))
        on_gpu = torch.cuda.is_available()
        dtype = torch.float16 if on_gpu else torch.float32
        parts: dict[str, Any] = {}
        if family is STABLE_DIFFUSION:  # a checker paints samples black, and scores would be the checker's
            parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        if unet is not None:
            parts["unet"] = diffusers.UNet2DConditionModel.from_pretrained(unet, dtype=dtype, use_safetensors=True)
        if vae is not None:
            parts["vae"] = diffusers.AutoencoderKL.from_pretrained(vae, dtype=dtype, use_safetensors=True)
        pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(
            model, dtype=dtype, use_safetensors=True, variant=variant, **parts
        )
        if prediction_type is not None:
            schedule = pipeline.scheduler
            pipeline.scheduler = type(schedule).from_config(schedule.config, prediction_type=prediction_type)
        self._pipeline = pipeline.to("cuda" if on_gpu else "cpu")
        self._pipeline.set_progress_bar_config(disable=True)
        self._config, self._resolution = config, resolution

    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[bytes]:
        """Draw one sample for each prompt and its seed; return PNG bytes."""
        import torch

        result = self._pipeline(
            list(prompts),
            height=self._resolution,
            width=self._resolution,
            num_inference_steps=self._config.num_inference_steps,
            guidance_scale=self._config.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        return [_png(image) for image in result.images]


def _png(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def score_samples(
    scorers: Sequence[Scorer], references: References, samples: dict[str, list[bytes]], prompts: Sequence[str]
) -> list[JsonObject]:
    """Return each scorer's mean and 95 % bootstrap interval for each model.

    Args:
        scorers: The scorers, not yet fitted.
        references: The pairs that they are fitted on.
        samples: PNG bytes by model name (`base`, `aligned`), in the order of `prompts`.
        prompts: One prompt per sample.
    """
    results = []
    for scorer in scorers:
        scorer.fit(references.chosen, references.rejected, references.prompts)
        result: JsonObject = {"name": scorer.name, "description": scorer.description}
        for model, images in samples.items():
            opened = [Image.open(io.BytesIO(png)).convert("RGB") for png in images]
            result[model] = bootstrap_interval(scorer.score(opened, list(prompts)))
        results.append(result)
    return results


def bootstrap_interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean with its 95 % percentile bootstrap interval over samples; equal values, equal interval."""
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(array), (BOOTSTRAP_RESAMPLES, len(array)))
    low, high = np.percentile(array[draws].mean(axis=1), [2.5, 97.5])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high)}
