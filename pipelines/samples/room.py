"""The workers that fit: on a CPU cluster, as many samplers as nodes have memory for; at least one."""

import math
from collections.abc import Sequence
from dataclasses import replace

from pipelines.dataset.model_files import read_family, weight_files
from pipelines.dataset.safetensors_header import tensor_shapes
from pipelines.resources import Demand, nodes, uses_gpu
from pipelines.samples.drawing import DrawnModel, Sampling
from pipelines.units.pool import Pool, divide_cluster
from pipelines.units.workers import Workers

PROCESS_BYTES = 1 << 30  # Python with torch and diffusers
PIXEL_BYTES = 3 << 10  # of a sample while the VAE decodes it: 3 GB at 1024 x 1024, about three times its widest layer
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def room_for(models: Sequence[tuple[DrawnModel, Sampling]], workers: Workers, num_units: int) -> Pool:
    """Return the pool of samplers that fits on the cluster now.

    Every sampler has one model in memory, whichever that is. GPUs are Ray's to count; on CPUs each sampler requests the
    memory of the largest model, so that no more start than fit. One may always start: it must not be refused by an
    estimate.

    Args:
        models: The models and their settings.
        workers: Which devices, and how many at most.
        num_units: Number of units, which limits the number of samplers.
    """
    if uses_gpu(workers.device):
        return divide_cluster(workers, num_units)
    low, high = workers.worker_range
    needed = sampler_bytes(models, workers.batch_size)
    places = Demand("CPU", {**workers.resources, "memory": needed}).places(nodes())
    if places == 0 or high == 1 or (places == 1 and low == high):
        return divide_cluster(replace(workers, num_workers=1), num_units)
    count = min(high, places) if low == high else f"{min(low, places)}..{high}"
    pool = divide_cluster(replace(workers, num_workers=count), num_units)
    return replace(pool, options={**pool.options, "memory": needed})


def sampler_bytes(models: Sequence[tuple[DrawnModel, Sampling]], batch_size: int) -> int:
    """Return the memory of a process that draws with the largest of these models, in bytes."""
    here = [(model, sampling) for model, sampling in models if model.source.is_fetched()]
    return PROCESS_BYTES + max(
        WEIGHT_BYTES[sampling.dtype] * num_weights(model) + PIXEL_BYTES * sampling.height * sampling.width * batch_size
        for model, sampling in here or models
    )


def num_weights(model: DrawnModel) -> int:
    """Count the weights of a pipeline, by the headers of its files; a UNet that replaces its own has as many."""
    source = model.source
    folder = source.folder()
    parts = [(folder / "unet", "diffusion_pytorch_model", source.variant)]
    parts.append((source.vae_folder(), "diffusion_pytorch_model", source.vae_variant))
    parts += [(folder / name, "model", source.variant) for name in read_family(folder).text_encoders]
    shapes = [shape for part in parts for shape in tensor_shapes(weight_files(*part)).values()]
    return sum(math.prod(shape) for shape in shapes)
