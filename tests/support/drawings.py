"""Drawings of tiny models, drawn without Ray, and the pixels of samples; for tests of samples."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.dataset.layout import SAMPLES, samples_table
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import prompt_id
from pipelines.dataset.storage import Storage
from pipelines.encode.fingerprint import note_parts
from pipelines.samples.drawing import Drawing, DrawnModel, Sampling
from pipelines.samples.fingerprint import samples_fingerprint, samples_parts
from pipelines.samples.plan import pending_samples, wanted_samples
from pipelines.samples.prompts import Prompt

TEXTS = ("a cat", "a red house on the hill", "a dog at night", "photo of a tree")


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(prompt_id(text), text) for text in texts]


def sampling_of(**changed: Any) -> Sampling:
    return Sampling(**({"num_inference_steps": 2, "guidance_scale": 5.0, "height": 64, "width": 64} | changed))


def drawing_of(
    source: Path | str | ModelSource,
    texts: Sequence[str] = TEXTS,
    *,
    name: str = "tiny",
    images_per_prompt: int = 1,
    seed: int = 0,
    sampling: Sampling | None = None,
    **of_model: Any,
) -> Drawing:
    """The wanted samples of a model, with the fingerprint of its files."""
    source = source if isinstance(source, ModelSource) else ModelSource(str(source))
    model, sampling = DrawnModel(name, source, **of_model), sampling or sampling_of()
    fingerprint = samples_fingerprint(model, sampling)
    wanted = wanted_samples(prompts_of(*texts), fingerprint, seed=seed, images_per_prompt=images_per_prompt)
    return Drawing(model, sampling, fingerprint, wanted)


def draw_here(storage: Storage, drawing: Drawing, batch_size: int = 4, num_threads: int = 1) -> list[Any]:
    """Draw what is missing without Ray: the same units, shards and commits. Return the units."""
    from pipelines.samples.actor import DrawSettings, SampleWriter

    note_parts(storage, SAMPLES, samples_parts(drawing.model, drawing.sampling))
    models = {drawing.fingerprint: (drawing.model, drawing.sampling)}
    writer = SampleWriter(models, storage, DrawSettings("evaluate", batch_size, num_threads))
    units = pending_samples(storage, drawing, batch_size)
    for unit in units:
        rows, _ = writer.write(unit.id, unit.rows)
        samples_table(storage, drawing.fingerprint).append(unit.id, rows)
    return units


def pixels_of(storage: Storage, row: dict[str, Any]) -> NDArray[np.int16]:
    """The pixels of a row's sample."""
    data = storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"])
    return np.asarray(Image.open(io.BytesIO(data))).astype(np.int16)


def tars_of(storage: Storage) -> dict[str, str]:
    """The digest of every shard of samples, whether a row points to it or not."""
    names = [name for name in storage.names(SAMPLES) if name.endswith(".tar")]
    return {name: hashlib.sha256(storage.read(name)).hexdigest() for name in names}
