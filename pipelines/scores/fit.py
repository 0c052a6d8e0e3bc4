"""Held-out pairs that scorers with a `fit` learn from."""

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.storage import Storage
from pipelines.dataset.values import Row
from pipelines.scores.scorers.images import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

READERS = 8
TIE = 0.5
FIT_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("label_0", pa.float64()),  # probability that image 0 is preferred
        ("shard", pa.string()),
        ("image_0_sha256", pa.string()),
        ("offset_0", pa.int64()),
        ("length_0", pa.int64()),
        ("image_1_sha256", pa.string()),
        ("offset_1", pa.int64()),
        ("length_1", pa.int64()),
    ]
)
"""The columns of a pair to learn from; all are columns of the table of pairs."""


@dataclass(frozen=True)
class LearntPairs:
    """Pairs as the `fit` of a scorer takes them: images in RGB, in the order of the table."""

    chosen: "list[Image]"
    rejected: "list[Image]"
    prompts: list[str]


@dataclass(frozen=True)
class FitPairs:
    """Held-out pairs by their places; ties are left out, which have no chosen image.

    Args:
        table: Rows with the columns of FIT_SCHEMA, in the order in which scorers learn from them.
    """

    table: pa.Table

    def __post_init__(self) -> None:
        rows = self.table.select(FIT_SCHEMA.names).cast(FIT_SCHEMA)
        object.__setattr__(self, "table", rows.filter(pc.not_equal(rows["label_0"], TIE)).combine_chunks())

    def digest(self) -> str:
        """Return a digest of everything that a scorer learns: images, prompts, and which image was preferred."""
        columns = [self.table[name].to_pylist() for name in ("prompt", "label_0", "image_0_sha256", "image_1_sha256")]
        learnt = [
            [prompt, *((first, second) if label > TIE else (second, first))]
            for prompt, label, first, second in zip(*columns, strict=True)
        ]
        return hashlib.sha256(json.dumps(learnt).encode()).hexdigest()

    def read(self, storage: Storage) -> LearntPairs:
        """Read and decode the images.

        Raises:
            ShardCorrupt: Bytes differ from their digest.
            UnreadableImage: An image cannot be decoded.
        """
        rows: Sequence[Row] = self.table.to_pylist()
        with ThreadPoolExecutor(READERS) as readers:
            sides = [list(readers.map(lambda row, side=side: _image(storage, row, side), rows)) for side in (0, 1)]
        preferred = [0 if row["label_0"] > TIE else 1 for row in rows]
        return LearntPairs(
            [sides[side][place] for place, side in enumerate(preferred)],
            [sides[1 - side][place] for place, side in enumerate(preferred)],
            [row["prompt"] for row in rows],
        )


def _image(storage: Storage, row: Row, side: int) -> "Image":
    from PIL import Image

    place = row["shard"], row[f"offset_{side}"], row[f"length_{side}"], row[f"image_{side}_sha256"]
    return to_rgb(Image.open(io.BytesIO(storage.read_range(*place))))
