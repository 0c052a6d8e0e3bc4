"""The evaluate stage: samples of both models on the cluster, scores on the driver."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from orchestration.config import RunConfig
from orchestration.run.context import EVALUATION, RESULTS
from orchestration.stages.drawn_samples import DrawnSamples, digest_of
from orchestration.stages.turns import Room, draw_missing
from pipelines.config import EncodeConfig
from pipelines.dataset.errors import EncodingError
from pipelines.dataset.model_files import MODEL_INDEX, file_digests
from pipelines.dataset.processes import TORCH_ENVIRONMENT
from pipelines.dataset.storage import Storage
from pipelines.encode.fingerprint import latents_parts, text_parts
from pipelines.encode.plan import with_absolute_paths
from pipelines.resources import uses_gpu

MAX_RESTARTS = 3  # of a model's actor, whose node may go


def evaluate(config: RunConfig, storage: Storage, *, folder: str, version: int, weights: Any) -> dict[str, Any]:
    """Sample the base and the exported model, score both, keep images and numbers below `evaluation/`.

    Args:
        config: The run's configuration.
        storage: The run's storage.
        folder: The run's folder.
        version: The pinned version of the table of pairs.
        weights: Plain data that identifies the weights of the exported model.

    Returns:
        The results for the report: settings, scores, and the samples with the names of their images.
    """
    from training.evaluate import load_references, load_scorers, sample_prompts, score_samples

    scorers = load_scorers(config.evaluate.scorers)
    references = load_references(storage, version)
    prompts = sample_prompts(references, config.evaluate.num_samples)
    seeds = [config.seed + i for i in range(len(prompts))]
    drawn = draw_samples(config, storage, f"{folder}/{EVALUATION}", weights, prompts, seeds)
    results: dict[str, Any] = {
        "num_samples": len(prompts),
        "split": references.split,
        "num_inference_steps": config.evaluate.num_inference_steps,
        "guidance_scale": config.evaluate.guidance_scale,
        "scores": score_samples(scorers, references, {name: each.images for name, each in drawn.items()}, prompts),
        "samples": [
            {"prompt": prompt, "seed": seeds[i], **{name: each.name(i) for name, each in drawn.items()}}
            for i, prompt in enumerate(prompts)
        ],
    }
    storage.write(f"{folder}/{EVALUATION}/{RESULTS}", json.dumps(results, indent=1).encode())
    return results


def draw_samples(
    config: RunConfig, storage: Storage, folder: str, weights: Any, prompts: list[str], seeds: list[int]
) -> dict[str, DrawnSamples]:
    """Draw the missing samples of both models; those that an earlier attempt has drawn are kept.

    Args:
        config: The run's configuration.
        storage: The run's storage; the exported model lies next to `folder`.
        folder: The folder of the samples.
        weights: See `evaluate`.
        prompts: One prompt per sample.
        seeds: One seed per sample.

    Returns:
        The samples of `base` and of `aligned`, all drawn.
    """
    import ray

    assert config.encode is not None
    config = config.model_copy(update={"encode": with_absolute_paths(config.encode)})
    assert config.encode is not None
    base = base_identity(config.encode)
    models: dict[str, Storage | None] = {"base": None, "aligned": storage.child(f"{folder.rpartition('/')[0]}/model")}
    drawn = {
        name: DrawnSamples(storage, folder, name, _made_from(config, model, prompts, seeds))
        for name, model in (("base", base), ("aligned", [base, weights]))
    }
    if any(samples.missing for samples in drawn.values()):
        storage.delete(f"{folder}/{RESULTS}")  # of samples that go now
    for samples in drawn.values():
        samples.remove_others()

    def new_actor(name: str, room: Room) -> Any:
        options = room.demand.options() | {"runtime_env": {"env_vars": TORCH_ENVIRONMENT}}
        options |= {"max_restarts": MAX_RESTARTS, "max_task_retries": MAX_RESTARTS}  # a sample follows from its seed
        return ray.remote(**options)(SampleModel).remote(config, models[name], room.at_once)

    draw_missing(config, drawn, new_actor, prompts, seeds)
    return drawn


def base_identity(config: EncodeConfig) -> str:
    """Digest every file of the base that shapes a sample: UNet, scheduler, VAE, text encoders, tokenizers."""
    from training.spec import base_digest

    texts = {name: files for name, files in text_parts(config).items() if isinstance(files, dict)}
    index = file_digests([config.source.folder() / MODEL_INDEX])
    return digest_of([base_digest(config.source), latents_parts(config)["vae"], texts, index])


def _made_from(config: RunConfig, model: Any, prompts: list[str], seeds: list[int]) -> list[str]:
    """Return for each sample of a model a digest of everything that shapes it."""
    assert config.encode is not None
    shaping = {
        "model": model,
        "num_inference_steps": config.evaluate.num_inference_steps,
        "guidance_scale": config.evaluate.guidance_scale,
        "resolution": config.encode.resolution,
        "device": "gpu" if uses_gpu(config.encode.device) else "cpu",  # float16 or float32
        "prediction_type": None if config.train is None else config.train.prediction_type,
    }
    return [digest_of([shaping, prompt, seed]) for prompt, seed in zip(prompts, seeds, strict=True)]


class SampleModel:
    """A Ray actor that samples one model. An exported model is read from its storage, never from a cache.

    Args:
        config: The run's configuration.
        where: The storage of the exported model; None for the base model.
        sharers: How many of these actors may share a node's cores.
    """

    def __init__(self, config: RunConfig, where: Storage | None, sharers: int = 1) -> None:
        self._config, self._where, self._sharers = config, where, sharers
        self._sampler: Any = None

    def dtype(self) -> str:
        """Return the type that the pipeline computes in on this machine."""
        import torch

        return "float16" if torch.cuda.is_available() else "float32"

    def sample(self, prompts: list[str], seeds: list[int]) -> list[bytes] | None:
        """Draw one sample for each prompt and its seed, as PNG; None if there was not enough memory for that many.

        Raises:
            EncodingError: There is not enough memory for the model, or for a single sample of it.
        """
        from pipelines.units.actor import BatchSize

        if self._sampler is None:
            self._sampler = self._load()
        assert self._config.encode is not None
        side = self._config.encode.resolution
        return BatchSize(len(prompts)).attempt(
            lambda: list(self._sampler.sample(prompts, seeds)), len(prompts),
            f"draw one sample of {side} x {side} pixels", "evaluate on a machine with more memory",
        )  # fmt: skip

    def _load(self) -> Any:
        """Load the pipeline; called with the first batch, when Ray keeps the class of an error."""
        from pipelines.units.actor import is_out_of_memory
        from training.engine import set_threads
        from training.evaluate import Sampler

        set_threads(self._sharers)
        config, where = self._config, self._where
        assert config.encode is not None
        source = config.encode.source
        vae = None if source.vae is None else str(source.vae_folder())
        sampler = functools.partial(
            Sampler, vae=vae, config=config.evaluate, resolution=config.encode.resolution,
            prediction_type=None if config.train is None else config.train.prediction_type,
        )  # fmt: skip
        try:
            with tempfile.TemporaryDirectory(prefix="mapo-model-") as work:
                if where is None:
                    return sampler(str(source.folder()), variant=source.variant)
                folder = Path(where.path()) if where.is_local else Path(work)
                if not where.is_local:
                    where.download_folder("", folder)
                if (folder / MODEL_INDEX).is_file():  # an export has plain weights
                    return sampler(str(folder))
                # of the UNet alone
                return sampler(str(source.folder()), variant=source.variant, unet=str(folder / "unet"))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            what = "the base model" if where is None else where.url
            raise EncodingError(
                f"not enough memory to load {what}: {str(error).splitlines()[0] if str(error) else 'MemoryError'}",
                "evaluate on a machine with more memory",
            ) from error
