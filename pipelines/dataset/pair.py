"""The pair and the single image: their keys, label, status, and their row in the table.

A pair is one prompt and two images in a fixed order (image_0, image_1). `label_0` is the probability that
image_0 is preferred; chosen and rejected exist only after the label is applied. A single image is image_0 alone, with
`label_0` 1 (good) or 0 (bad).
"""

import hashlib

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.status import JUDGED as JUDGED
from pipelines.dataset.status import KINDS as KINDS
from pipelines.dataset.status import PAIR as PAIR
from pipelines.dataset.status import PRIOR as PRIOR
from pipelines.dataset.status import Reason as Reason
from pipelines.dataset.status import Status as Status

TRAIN, VALIDATION, TEST = "train", "validation", "test"

PAIRS_SCHEMA = pa.schema(
    [
        ("pair_key", pa.string()),  # null where prompt or images cannot be read
        ("prompt", pa.string()),
        ("prompt_id", pa.string()),
        ("label_0", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("split", pa.string()),
        ("source_split", pa.string()),  # the source's own; null where the prompt's hash decides
        ("source", pa.string()),
        ("source_uri", pa.string()),
        ("source_row", pa.int64()),
        ("source_pair", pa.int32()),  # which of the row's pairs, where a row ranks several images
        ("user_id", pa.string()),
        ("unit", pa.string()),
        ("image_0_sha256", pa.string()),
        ("image_1_sha256", pa.string()),
        ("mirrored", pa.bool_()),  # image 0 has the larger digest: equal pairs are compared from the other side
        ("width_0", pa.int32()),
        ("height_0", pa.int32()),
        ("width_1", pa.int32()),
        ("height_1", pa.int32()),
        ("orientation_0", pa.int8()),  # EXIF, 1..8; the bytes are as they came
        ("orientation_1", pa.int8()),
        ("mode_0", pa.string()),  # of the pixels, as Pillow calls it
        ("mode_1", pa.string()),
        ("shard", pa.string()),  # relative to the storage; null where no image bytes are kept
        ("shard_bytes", pa.int64()),
        ("shard_sha256", pa.string()),
        ("offset_0", pa.int64()),
        ("length_0", pa.int64()),
        ("offset_1", pa.int64()),
        ("length_1", pa.int64()),
        ("kind", pa.string()),  # null or PAIR, else a single image: JUDGED or PRIOR
        ("weight", pa.float64()),  # of the row's loss, > 0; null is 1
    ]
)


def pair_key(prompt: str, image_0_sha256: str, image_1_sha256: str) -> str:
    """Return 32 hex digits that name a pair: a hash of the prompt and both images' bytes.

    The order of the two images does not matter, so that a pair listed the other way round is seen as the same.

    Args:
        prompt: The prompt exactly as in the source; never normalised.
        image_0_sha256: Hex digest of one image's bytes.
        image_1_sha256: Hex digest of the other's.
    """
    return _key(b"mapo-pair-1", prompt, *sorted((image_0_sha256, image_1_sha256)))


def single_key(prompt: str, image_sha256: str) -> str:
    """Return 32 hex digits that name a single image: a hash of the prompt and the image's bytes.

    No pair has the same key: the hash also covers that there is one image. Whether the image is good, bad or of a
    class does not matter, so that one image with two verdicts is noticed.

    Args:
        prompt: The prompt exactly as in the source; never normalised.
        image_sha256: Hex digest of the image's bytes.
    """
    return _key(b"mapo-single-1", prompt, image_sha256)


def _key(domain: bytes, prompt: str, *images: str) -> str:
    encoded = prompt.encode()
    digest = hashlib.sha256(domain)
    digest.update(len(encoded).to_bytes(8, "big"))
    digest.update(encoded)
    for image in images:
        digest.update(bytes.fromhex(image))
    return digest.hexdigest()[:32]


def of_kind(*kinds: str) -> pc.Expression:
    """Return the condition for table rows of these kinds; a row without a kind is a pair."""
    return pc.coalesce(pc.field("kind"), PAIR).isin(kinds)


def prompt_id(prompt: str) -> str:
    """Return 32 hex digits that name a prompt: a hash of its UTF-8 bytes."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


NULL_PROMPT_ID = "0" * 32
"""Id of the null conditioning, which replaces dropped prompts and is not the embedding of any prompt."""
EMPTY_PROMPT_ID = prompt_id("")
"""Id of the embedding of "", which is stored if a training needs it; no kept pair has that prompt."""


def split_of(prompt_identifier: str, validation_ratio: float) -> str:
    """Return the split of a prompt, which follows from its hash, so that no prompt is in two splits.

    Args:
        prompt_identifier: From `prompt_id`.
        validation_ratio: Share of prompts held out, 0..1.
    """
    return VALIDATION if prompt_identifier < split_border(validation_ratio) else TRAIN


def split_border(validation_ratio: float) -> str:
    """Return the first prompt_id that is not held out: hex digits of one length compare as the numbers they are."""
    return f"{min(int(validation_ratio * 2**64), 2**64 - 1):016x}"
