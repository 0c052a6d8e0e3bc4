"""Images to score, in real shards, and user scorers that count what they are asked."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from scorer_twins import formula_image

from pipelines.dataset.pair import prompt_id
from pipelines.dataset.shard import ShardWriter
from pipelines.dataset.storage import Storage
from pipelines.scores.images import IMAGES_SCHEMA

NAMES = ["image_sha256", "prompt_id", "prompt", "shard", "offset", "length"]


def png(image: Image.Image) -> bytes:
    image.save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def write_images(
    storage: Storage, name: str, files: Sequence[bytes], prompts: Sequence[str], *, siblings: bool = False
) -> pa.Table:
    """Write files as one shard; the table of images to score, perhaps each with the others of its prompt."""
    out = io.BytesIO()
    writer = ShardWriter(out)
    members = [writer.add(f"{place:05d}.png", data) for place, data in enumerate(files)]
    writer.close()
    shard = f"dataset/samples/{name}.tar"
    storage.write(shard, out.getvalue())
    rows: list[dict[str, Any]] = [
        {"image_sha256": each.sha256, "prompt_id": prompt_id(prompt), "prompt": prompt, "shard": shard,
         "offset": each.offset, "length": each.length}
        for each, prompt in zip(members, prompts, strict=True)
    ]  # fmt: skip
    if siblings:
        for row in rows:
            row["siblings"] = [
                place_of(other) for other in rows if other is not row and other["prompt"] == row["prompt"]
            ]
    names = [*NAMES, *(["siblings"] if siblings else [])]
    return pa.Table.from_pylist(rows, schema=pa.schema([IMAGES_SCHEMA.field(each) for each in names]))


def place_of(row: dict[str, Any]) -> dict[str, Any]:
    return {"shard": row["shard"], "offset": row["offset"], "length": row["length"], "sha256": row["image_sha256"]}


def formula_files(count: int, *, side: int = 64, first: int = 0) -> list[bytes]:
    return [png(formula_image(side + seed % 7, side, seed)) for seed in range(first, first + count)]


TRACE = "MAPO_TEST_TRACE"
"""Environment variable: a file to which `Lightness` appends the number of images of each call."""


class Lightness:
    """A user's scorer of today: no `load`, no `needs`; learns from pairs."""

    name = "how light? /é"
    description = "Lighter than the mean of the chosen images?"

    def fit(self, chosen: Sequence[Any], rejected: Sequence[Any], prompts: Sequence[str]) -> None:
        assert len(chosen) == len(rejected) == len(prompts) > 0
        self.mean = float(np.mean([np.asarray(image).mean() for image in chosen]))

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        return [float(np.asarray(image).mean()) - self.mean for image in images]


class Picky:
    """A user's scorer that raises, and returns NaN, for some prompts."""

    name = "picky"
    needs = ("image", "prompt")

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        if any("raise" in prompt for prompt in prompts):
            raise ValueError("no such prompt\nsecond line")
        return [math.nan if "nan" in prompt else float(len(prompt)) for prompt in prompts]


class Broken:
    """A user's scorer whose machine is at fault."""

    name = "broken"

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        raise OSError(28, "No space left on device")


class Reading:
    """A user's scorer with weights, questions and an upper bound of one image at a time."""

    name = "reading"
    needs = ("image", "prompt", "questions")
    higher_is_better = False

    def load(self, weights: Path, device: Any) -> None:
        self.factor = float((weights / "factor.txt").read_text())

    def score(self, images: Sequence[Any], prompts: Sequence[str], questions: Sequence[Any]) -> list[float]:
        if len(images) > 2:
            raise MemoryError("more than two")
        return [self.factor * len(each["asked"]) for each in questions]
