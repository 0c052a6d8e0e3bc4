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
from pipelines.scores.actor import ScoreWriter
from pipelines.scores.execution import Commits
from pipelines.scores.fit import FIT_SCHEMA, FitPairs
from pipelines.scores.images import IMAGES_SCHEMA
from pipelines.scores.judges import Judge
from pipelines.scores.loaded import load_judge
from pipelines.scores.plan import pending_scores, table_of

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
    """A user's scorer with weights and questions, for which more than two images at a time are too many."""

    name = "reading"
    needs = ("image", "prompt", "questions")
    higher_is_better = False

    def load(self, weights: Path, device: Any) -> None:
        self.factor = float((weights / "factor.txt").read_text())

    def score(self, images: Sequence[Any], prompts: Sequence[str], questions: Sequence[Any]) -> list[float]:
        if len(images) > 2:
            raise MemoryError("more than two")
        return [self.factor * len(each["asked"]) for each in questions]


def score_here(storage: Storage, judges: Sequence[Judge], images: pa.Table, num_threads: int = 1) -> ScoreWriter:
    """Score what is missing in this process, without Ray; the writer, with its scorers."""
    writer = ScoreWriter(storage, [load_judge(judge, storage, "cpu") for judge in judges], num_threads)
    commits = Commits(storage, judges)
    for unit in pending_scores(storage, judges, images).units:
        commits.add(writer.write(unit.id, unit.rows)[0])
    return writer


def rows_of(storage: Storage, judge: Judge) -> list[dict[str, Any]]:
    """All rows of a judge's table, in the order of images."""
    rows = table_of(storage, judge).read().to_pylist()
    return sorted(rows, key=lambda row: (row["image_sha256"], row["prompt_id"], row["context"]))


def pairs_to_fit(images: pa.Table) -> FitPairs:
    """Pairs of neighbouring rows of a table of images; the first of two is preferred in every second pair."""
    rows = images.to_pylist()
    pairs = [
        {"prompt": first["prompt"], "label_0": float(number % 2), "shard": first["shard"],
         "image_0_sha256": first["image_sha256"], "offset_0": first["offset"], "length_0": first["length"],
         "image_1_sha256": second["image_sha256"], "offset_1": second["offset"], "length_1": second["length"]}
        for number, (first, second) in enumerate(zip(rows[::2], rows[1::2], strict=True))
    ]  # fmt: skip
    return FitPairs(pa.Table.from_pylist(pairs, schema=FIT_SCHEMA))
