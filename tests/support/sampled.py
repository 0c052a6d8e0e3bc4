"""Samples of a model as PNG, drawn in this process as `evaluate` draws them."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from pipelines.dataset.model_files import ModelSource
from pipelines.samples.drawing import DrawnModel, Sampling


def draw_here(
    model: str | Path | DrawnModel, texts: Sequence[str], seeds: Sequence[int], *, steps: int = 2, side: int = 64,
    prediction_type: str | None = None,
) -> list[bytes]:  # fmt: skip
    """Draw one sample for each text and its seed, in one batch."""
    from pipelines.samples.sampler import Sampler

    drawn = model if isinstance(model, DrawnModel) else DrawnModel("here", ModelSource(str(model)))
    if prediction_type is not None:
        drawn = replace(drawn, prediction_type=prediction_type)
    sampler = Sampler(drawn, Sampling(steps, 5.0, side, side))
    batch = sampler.draw([sampler.embed(text) for text in texts], seeds)
    found = []
    for pixels_HWC in batch.pixels_BHWC:
        out = io.BytesIO()
        Image.fromarray(pixels_HWC).save(out, "PNG")
        found.append(out.getvalue())
    return found
