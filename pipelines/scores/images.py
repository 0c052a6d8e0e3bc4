"""The images to score: where their bytes are, what else their scores depend on, and the key of a score.

Light: needs neither ray nor torch.
"""

import hashlib
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.dataset.errors import ConfigError, SnapshotError
from pipelines.dataset.key_map import Keys, keys_of, places_in_sorted

PLACE = pa.struct(
    [
        ("shard", pa.string()),  # relative to the storage, or the path or URL of a file of its own
        ("offset", pa.int64()),  # null for a whole file
        ("length", pa.int64()),
        ("sha256", pa.string()),
    ]
)
"""The place of an image that another image is compared with."""

REQUIRED = pa.schema(
    [
        ("image_sha256", pa.string()),  # of the bytes as they are stored
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),  # null where there is none
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)
OPTIONAL = pa.schema(
    [
        ("siblings", pa.list_(PLACE)),  # the other images of the prompt, by the same model
        ("references", pa.list_(PLACE)),
        ("metadata", pa.string()),  # JSON
        ("questions", pa.string()),  # JSON
        ("without_adjectives", pa.string()),  # JSON: the prompt as a text
    ]
)
IMAGES_SCHEMA = pa.schema([*REQUIRED, *OPTIONAL])
"""The columns of a table of images; those of OPTIONAL may be left out if no scorer needs them."""
JUDGES = "judges"
"""An optional column: the names of the judges that score the image, with a newline between; null or absent for all."""

IMAGE_LISTS, TEXTS = ("siblings", "references"), ("metadata", "questions", "without_adjectives")
OWN_NEEDS = ("image", "prompt")
"""What every table of images has."""
ALL_NEEDS = (*OWN_NEEDS, *IMAGE_LISTS, *TEXTS)
"""What a scorer may need."""
Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]
"""Positions of rows."""
KEY_DIGITS = 32
BATCH_ROWS = 65_536
PROMPT_FACTOR, CONTEXT_FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
"""Odd numbers that keep an image's digest, its prompt's and its context's apart in their sum."""


def check_images(images: pa.Table, needs: Collection[str], scorer: str) -> None:
    """Check that a table of images has what a scorer needs.

    Raises:
        ConfigError: A column is missing that the scorer needs.
        SnapshotError: A row has no digest, prompt_id or place.
    """
    names = [*REQUIRED.names, *(need for need in needs if need not in OWN_NEEDS)]
    if missing := [name for name in names if name not in images.column_names]:
        raise ConfigError(
            f"the scorer {scorer} needs {', '.join(missing)}, which these images do not have",
            "leave the scorer out, or use a suite that has them",
        )
    for name in ("image_sha256", "prompt_id", "shard"):
        if nulls := images[name].null_count:
            raise SnapshotError(f"{nulls:,} of {images.num_rows:,} images to score have no {name}")


def contexts(images: pa.Table, needs: Collection[str]) -> pa.Array:
    """Return for each image 32 hex digits of everything beside it and its prompt that a score depends on.

    Args:
        images: Rows of IMAGES_SCHEMA.
        needs: What the scorer needs.

    Returns:
        One text for each image; "" if the scorer needs nothing else.
    """
    names = [name for name in (*IMAGE_LISTS, *TEXTS) if name in needs]
    if not names:
        return pa.repeat("", images.num_rows)
    texts = [_joined(images[name]) if name in IMAGE_LISTS else images[name] for name in names]
    parts = [pc.fill_null(pc.cast(text, pa.large_string()), "") for text in texts]
    whole = parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, "\x1f")
    encoded = pa.chunked_array(whole).combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole
    encoded = encoded.dictionary_encode()
    label = ",".join(names).encode()
    digests = [
        hashlib.sha256(label + b"\0" + text.encode()).hexdigest()[:KEY_DIGITS]
        for text in encoded.dictionary.to_pylist()
    ]
    return pa.array(digests, pa.string()).take(encoded.indices)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """Return the digests of each row's images as one text, in their order."""
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    places = lists.flatten()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).cast(pa.int32())
    ends = np.concatenate([[0], np.cumsum(lengths.to_numpy(zero_copy_only=False))]).astype(np.int32)
    digests = places.field("sha256") if len(places) else pa.array([], pa.string())
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(ends), pc.fill_null(digests, "")), " ")


def keys_of_images(images: pa.Table, needs: Collection[str]) -> Keys:
    """Return the key of each image's score by a scorer: 128 bits of the image, its prompt and its context.

    Args:
        images: Rows of IMAGES_SCHEMA.
        needs: What the scorer needs.

    Raises:
        SnapshotError: A digest or a prompt_id is not one.
    """
    names = [*REQUIRED.names[:2], *(name for name in (*IMAGE_LISTS, *TEXTS) if name in needs)]
    found = [
        _keys(each["image_sha256"], each["prompt_id"], contexts(each, needs))
        for each in map(pa.Table.from_batches, ([batch] for batch in images.select(names).to_batches(BATCH_ROWS)))
    ]
    return np.concatenate(found) if found else np.zeros((0, 2), np.uint64)


def keys_of_scores(scores: pa.Table) -> Keys:
    """Return the keys of scores, as `keys_of_images` does of images."""
    found = [
        _keys(batch["image_sha256"], batch["prompt_id"], batch["context"]) for batch in scores.to_batches(BATCH_ROWS)
    ]
    return np.concatenate(found) if found else np.zeros((0, 2), np.uint64)


def _keys(image_sha256: pa.Array, prompt_id: pa.Array, context: pa.Array) -> Keys:
    try:
        images, prompts = keys_of(pc.utf8_slice_codeunits(image_sha256, 0, KEY_DIGITS)), keys_of(prompt_id)
        others = np.zeros_like(images)
        has_context = pc.not_equal(context, "")
        if pc.any(has_context).as_py():
            others[has_context.to_numpy(zero_copy_only=False)] = keys_of(context.filter(has_context))
        if not len(images) == len(prompts) == len(image_sha256):
            raise ValueError("a digest has another length")
    except ValueError as error:
        raise SnapshotError(
            f"an image to score has a digest or a prompt_id that is not hexadecimal digits of the right number: {error}"
        ) from error
    keys: Keys = images + prompts * PROMPT_FACTOR + others * CONTEXT_FACTOR
    return keys


def is_judged_by(images: pa.Table, judge: str) -> Mask:
    """Return for each image whether a judge scores it.

    Args:
        images: Rows of IMAGES_SCHEMA, perhaps with the column JUDGES.
        judge: The judge's name.
    """
    if JUDGES not in images.column_names:
        return np.ones(images.num_rows, np.bool_)
    encoded = images[JUDGES].cast(pa.string()).combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    wanted = pa.array([judge in text.split("\n") for text in names], pa.bool_()).take(encoded.indices)
    found: Mask = pc.fill_null(wanted, fill_value=True).to_numpy(zero_copy_only=False)
    return found


def first_of_each(keys: Keys) -> Mask:
    """Return which keys are the first of their kind."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    in_order = keys[order]
    repeats = np.zeros(len(keys), np.bool_)
    repeats[1:] = (in_order[1:] == in_order[:-1]).all(axis=1)
    is_first = np.ones(len(keys), np.bool_)
    is_first[order] = ~repeats  # lexsort is stable: the first of equal keys comes first
    return is_first


def places_in(known: Keys, wanted: Keys) -> Rows:
    """Return the position in `known` of each wanted key; -1 where it is not there."""
    order = np.lexsort((known[:, 1], known[:, 0]))
    found = places_in_sorted(known[order], wanted)
    is_there = found >= 0
    found[is_there] = order[found[is_there]]
    return found
