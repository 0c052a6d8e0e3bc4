"""The evaluate stage: samples of both models on the cluster, scores on the driver."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from orchestration.config import RunConfig
from pipelines.dataset.errors import unwrap
from pipelines.dataset.model_files import MODEL_INDEX
from pipelines.dataset.processes import TORCH_ENVIRONMENT
from pipelines.dataset.storage import Storage
from pipelines.encode_plan import located
from pipelines.progress import Progress
from pipelines.room import uses_gpu

MAX_RESTARTS = 3  # of a model's actor, whose node may go
EVALUATION = "evaluation"


def evaluate(config: RunConfig, storage: Storage, *, folder: str, version: int) -> dict[str, Any]:
    """Sample the base and the exported model, score both, keep images and numbers below `evaluation/`.

    Args:
        config: The run's.
        storage: Its storage.
        folder: The run's folder.
        version: The pinned version of the table of pairs.

    Returns:
        What the report shows: settings, scores, and the samples with their images' names.
    """
    from training.evaluate import load_references, load_scorers, sample_prompts, score_samples

    scorers = load_scorers(config.evaluate.scorers)
    references = load_references(storage, version)
    prompts = sample_prompts(references, config.evaluate.num_samples)
    seeds = [config.seed + i for i in range(len(prompts))]
    samples = draw_samples(config, {"base": None, "aligned": storage.child(f"{folder}/model")}, prompts, seeds)
    results: dict[str, Any] = {
        "num_samples": len(prompts),
        "split": references.split,
        "num_inference_steps": config.evaluate.num_inference_steps,
        "guidance_scale": config.evaluate.guidance_scale,
        "scores": score_samples(scorers, references, samples, prompts),
        "samples": [
            {"prompt": prompt, "seed": seeds[i], "base": f"base-{i:03d}.png", "aligned": f"aligned-{i:03d}.png"}
            for i, prompt in enumerate(prompts)
        ],
    }
    for name, pngs in samples.items():
        for i, png in enumerate(pngs):
            storage.write(f"{folder}/{EVALUATION}/{name}-{i:03d}.png", png)
    storage.write(f"{folder}/{EVALUATION}/evaluation.json", json.dumps(results, indent=1).encode())
    return results


def draw_samples(
    config: RunConfig, models: dict[str, Storage | None], prompts: list[str], seeds: list[int]
) -> dict[str, list[bytes]]:
    """PNG bytes of each model's samples, in the order of the prompts; one Ray actor a model.

    Args:
        config: The run's.
        models: Where each model lies; None is the base model of the configuration.
        prompts: One for each sample.
        seeds: One for each sample.
    """
    import ray

    assert config.encode is not None
    device = config.encode.device
    config = config.model_copy(update={"encode": located(config.encode)})
    environment = {"env_vars": TORCH_ENVIRONMENT}
    again = {"max_restarts": MAX_RESTARTS, "max_task_retries": MAX_RESTARTS}  # a sample follows from its seed alone
    actor = ray.remote(num_cpus=1, num_gpus=int(uses_gpu(device)), runtime_env=environment, **again)(SampleModel)
    size = config.evaluate.batch_size
    starts = range(0, len(prompts), size)
    try:
        actors = {name: actor.remote(config, where) for name, where in models.items()}
        pending = {
            name: [each.sample.remote(prompts[i : i + size], seeds[i : i + size]) for i in starts]
            for name, each in actors.items()
        }
        waiting = [chunk for chunks in pending.values() for chunk in chunks]
        with Progress("evaluate", len(waiting), "batches") as progress:
            while waiting:
                done, waiting = ray.wait(waiting)
                ray.get(done)
                progress.advance(len(done))
        return {name: [png for chunk in chunks for png in ray.get(chunk)] for name, chunks in pending.items()}
    except ray.exceptions.RayError as error:
        raise unwrap(error) or error from error


class SampleModel:
    """A Ray actor that samples one model. An exported model is read from its storage, never from a cache."""

    def __init__(self, config: RunConfig, where: Storage | None) -> None:
        from training.engine import set_threads
        from training.evaluate import Sampler

        set_threads(sharers=2)
        assert config.encode is not None
        source = config.encode.source
        vae = None if source.vae is None else str(source.vae_folder())
        sampler = functools.partial(Sampler, vae=vae, config=config.evaluate, resolution=config.encode.resolution)
        with tempfile.TemporaryDirectory(prefix="mapo-model-") as work:
            if where is None:
                self._sampler = sampler(str(source.folder()), variant=source.variant)
                return
            folder = Path(where.path()) if where.is_local else Path(work)
            if not where.is_local:
                where.download_folder("", folder)
            if (folder / MODEL_INDEX).is_file():  # an export has plain weights
                self._sampler = sampler(str(folder))
            else:  # of the UNet alone
                self._sampler = sampler(str(source.folder()), variant=source.variant, unet=str(folder / "unet"))

    def sample(self, prompts: list[str], seeds: list[int]) -> list[bytes]:
        """PNG bytes of one sample for each prompt and its seed."""
        return self._sampler.sample(prompts, seeds)
