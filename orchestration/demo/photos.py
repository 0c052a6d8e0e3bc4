"""The demo's data set: preference pairs of photos in Pick-a-Pic v2's own parquet format.

The chosen image of a pair is the cyanotype of a crop, the rejected one the crop itself. As in real data, some rows
are ties, some come twice, and a few are damaged, so that a run has something to count and to quarantine.
"""

import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from orchestration.demo.scenes import RESOLUTION, STYLE_COLOURS, Scene, crop, cyanotype, draw_shift, scenes, subject_of

__all__ = ["DAMAGE", "SCHEMA", "subject_of", "write_dataset"]

Row = dict[str, Any]
"""One Pick-a-Pic row; the values' types are in `SCHEMA`."""

NUM_PAIRS_PER_SCENE = 10
NUM_TIES = 30
NUM_DUPLICATES = 8
NUM_DAMAGED_PER_KIND = 3
NUM_FILES = 4
ROWS_PER_GROUP = 64
JPEG_QUALITY = 95
FIRST_CREATED_AT = datetime(2024, 6, 10, tzinfo=UTC)

SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)
"""Pick-a-Pic v2, column for column."""

DAMAGE: dict[str, Callable[[Row], Row]] = {
    "truncated_jpeg": lambda row: {"jpg_0": row["jpg_0"][: len(row["jpg_0"]) // 2]},
    "not_an_image": lambda row: {"jpg_1": b"<html><body>404 Not Found</body></html>"},
    "empty_bytes": lambda row: {"jpg_0": b""},
    "null_image": lambda row: {"jpg_1": None},
    "null_caption": lambda row: {"caption": None},
    "empty_caption": lambda row: {"caption": ""},
    "labels_do_not_sum_to_1": lambda row: {"label_0": 0.7, "label_1": 0.7},
    "no_label": lambda row: {"has_label": False},
    "identical_images": lambda row: {"jpg_1": row["jpg_0"], "are_different": False},
}
"""The ways in which a row is damaged: the columns that change, given the intact row."""


def write_dataset(folder: Path, *, seed: int = 0) -> list[Path]:
    """Write the data set into a folder, unless it is already there.

    The same seed gives the same bytes. Each file appears whole or not at all; `recipe.json`, with the digests, is last.

    Args:
        folder: The folder for the parquet files; created if missing.
        seed: Decides the crops, the sides, the order of the rows and which of them are ties, duplicates or damaged.

    Returns:
        The parquet files, in order.

    Raises:
        FileNotFoundError: The photos are not there (see `scenes.photo_folder`).
    """
    paths = [folder / f"photos-{number:05d}-of-{NUM_FILES:05d}.parquet" for number in range(NUM_FILES)]
    settings = _settings(seed)
    if _is_complete(folder, settings):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    rows = make_rows(seed)
    digests = {}
    for path, part in zip(paths, np.array_split(np.arange(len(rows)), NUM_FILES), strict=True):
        data = _parquet([rows[position] for position in part])
        _put(path, data)
        digests[path.name] = hashlib.sha256(data).hexdigest()
    _put(folder / "recipe.json", json.dumps({"settings": settings, "sha256": digests}, indent=2).encode() + b"\n")
    return paths


def make_rows(seed: int) -> list[Row]:
    """Make all rows in the order of the files: kept pairs, ties, damaged rows and duplicates, shuffled together."""
    rng = np.random.default_rng(seed)
    everything = scenes()
    kept = [_pair(scene, rng) for scene in everything for _ in range(NUM_PAIRS_PER_SCENE)]
    ties = [_tie(_pair(scene, rng)) for scene in _draw(everything, NUM_TIES, rng)]
    damaged = []
    for change in DAMAGE.values():
        for scene in _draw(everything, NUM_DAMAGED_PER_KIND, rng):
            row = _pair(scene, rng)
            damaged.append(row | change(row))
    rows = kept + ties + damaged
    rows = [rows[position] for position in rng.permutation(len(rows))]
    _number(rows)
    for position in rng.choice(len(kept), NUM_DUPLICATES, replace=False):
        rows.insert(int(rng.integers(len(rows) + 1)), kept[position])
    return rows


def _draw(everything: list[Scene], count: int, rng: np.random.Generator) -> list[Scene]:
    return [everything[position] for position in rng.choice(len(everything), count, replace=False)]


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _pair(scene: Scene, rng: np.random.Generator) -> Row:
    """Make a valid row: cyanotype against plain crop, the chosen one on a random side."""
    plain = crop(scene, draw_shift(rng))
    side = int(rng.integers(2))
    uids = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(2)]
    row: Row = {"are_different": True, "best_image_uid": uids[side], "caption": scene.caption, "has_label": True}
    for number in range(2):
        is_chosen = number == side
        row |= {
            f"image_{number}_uid": uids[number],
            f"image_{number}_url": f"https://demo.invalid/{uids[number]}.jpg",
            f"jpg_{number}": _jpeg(cyanotype(plain) if is_chosen else plain),
            f"label_{number}": float(is_chosen),
            f"model_{number}": "cyanotype" if is_chosen else "photo",
        }
    return row | {"user_id": int(rng.integers(1, 100))}


def _tie(row: Row) -> Row:
    return row | {"best_image_uid": "tie", "label_0": 0.5, "label_1": 0.5}


def _number(rows: list[Row]) -> None:
    """Set every row's time, its index and the number of rows that share its caption."""
    counts: dict[str | None, int] = {}
    for row in rows:
        counts[row["caption"]] = counts.get(row["caption"], 0) + 1
    for position, row in enumerate(rows):
        row["created_at"] = (FIRST_CREATED_AT + timedelta(minutes=position)).replace(tzinfo=None)
        row["ranking_id"] = 1_000 + position
        row["num_example_per_prompt"] = counts[row["caption"]]
        row["__index_level_0__"] = position


def _parquet(rows: list[Row]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, row_group_size=ROWS_PER_GROUP)
    return buffer.getvalue()


def _settings(seed: int) -> dict[str, object]:
    return {
        "seed": seed,
        "resolution": RESOLUTION,
        "num_pairs_per_scene": NUM_PAIRS_PER_SCENE,
        "num_ties": NUM_TIES,
        "num_duplicates": NUM_DUPLICATES,
        "num_damaged": dict.fromkeys(DAMAGE, NUM_DAMAGED_PER_KIND),
        "jpeg_quality": JPEG_QUALITY,
        "style": [list(colour) for colour in STYLE_COLOURS],
        "captions_sha256": hashlib.sha256("\n".join(scene.caption for scene in scenes()).encode()).hexdigest(),
    }


def _is_complete(folder: Path, settings: dict[str, object]) -> bool:
    """Return whether the folder contains exactly the files of these settings, by digest."""
    try:
        recipe = json.loads((folder / "recipe.json").read_text())
        digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in recipe["sha256"]}
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return False
    return bool(recipe.get("settings") == settings and digests == recipe["sha256"] and len(digests) == NUM_FILES)


def _put(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(data)
    unfinished.replace(path)
