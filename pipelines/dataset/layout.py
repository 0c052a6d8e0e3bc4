"""The layout of a storage, and the tables of encodings, samples and scores.

See the Contract in docs/reference/storage.md.
"""

import pyarrow as pa

from pipelines.dataset.pair import PAIRS_SCHEMA
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table

PAIRS = "dataset/pairs"
SHARDS = "dataset/shards"
LATENTS = "dataset/latents"
TEXT = "dataset/text"
SAMPLES = "dataset/samples"
SCORES = "dataset/scores"
CACHE = "cache"
RUNS = "runs"

UNFLIPPED, FLIPPED = ("latents", "time_ids"), ("flipped", "flipped_time_ids")
"""Prefixes of an image's tensors and metadata in its pair's member of latents; the side follows."""

LATENTS_SCHEMA = pa.schema(
    [
        ("pair_key", pa.string()),
        ("status", pa.string()),  # kept, or quarantined with a reason
        ("reason", pa.string()),
        ("bucket_height", pa.int32()),  # pixels
        ("bucket_width", pa.int32()),
        ("unit", pa.string()),
        ("shard", pa.string()),  # relative to the storage
        ("shard_bytes", pa.int64()),
        ("shard_sha256", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("sha256", pa.string()),  # of the member's payload
        ("crc32", pa.int64()),  # of the same, for training; null in rows of before 2026-11-27
    ]
)
"""One row for every pair that was encoded under one fingerprint."""

TEXT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),  # NULL_PROMPT_ID for the null conditioning
        ("status", pa.string()),
        ("reason", pa.string()),
        ("num_tokens", pa.int32()),  # of the longer tokenizer, before truncation to 77
        ("unit", pa.string()),
        ("shard", pa.string()),
        ("shard_bytes", pa.int64()),
        ("shard_sha256", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("sha256", pa.string()),
        ("crc32", pa.int64()),
    ]
)
"""One row for every distinct prompt that was embedded under one fingerprint."""

SAMPLES_SCHEMA = pa.schema(
    [
        ("sample_key", pa.string()),  # 32 hex digits of everything that shapes the sample
        ("text", pa.string()),  # what was drawn: the prefix of the variant, then the prompt
        ("prompt", pa.string()),  # the bare prompt, which pairs and scores have
        ("prompt_id", pa.string()),  # of the bare prompt
        ("variant", pa.string()),
        ("index", pa.int32()),  # of the images of this prompt and variant, from 0
        ("seed", pa.int64()),  # of the sample's own noise
        ("status", pa.string()),  # kept, or quarantined with a reason
        ("reason", pa.string()),
        ("unit", pa.string()),
        ("shard", pa.string()),  # relative to the storage
        ("shard_bytes", pa.int64()),
        ("shard_sha256", pa.string()),
        ("offset", pa.int64()),  # of the PNG
        ("length", pa.int64()),
        ("sha256", pa.string()),
        ("crc32", pa.int64()),
        ("width", pa.int32()),  # pixels
        ("height", pa.int32()),
    ]
)
"""One row for every sample that was drawn under one fingerprint."""

SCORES_SCHEMA = pa.schema(
    [
        ("image_sha256", pa.string()),  # of the image's bytes as they are stored
        ("prompt_id", pa.string()),
        ("context", pa.string()),  # digest of the other images that the score depends on; "" if it depends on none
        ("value", pa.float64()),  # null for a failure
        ("components", pa.string()),  # JSON object of numbers; "{}" if there are none
        ("status", pa.string()),  # scored, or failed with a reason
        ("reason", pa.string()),
        ("unit", pa.string()),
    ]
)
"""One row for every image and prompt that one scorer has scored under one fingerprint."""


def pairs_table(storage: Storage, version: int | None = None) -> Table:
    """Open the table of all source rows ever read."""
    return Table(storage, PAIRS, PAIRS_SCHEMA, version)


def latents_table(storage: Storage, fingerprint: str, version: int | None = None) -> Table:
    """Open the table of the latents made under one fingerprint."""
    return Table(storage, f"{LATENTS}/{fingerprint}/table", LATENTS_SCHEMA, version)


def text_table(storage: Storage, fingerprint: str, version: int | None = None) -> Table:
    """Open the table of the text embeddings made under one fingerprint."""
    return Table(storage, f"{TEXT}/{fingerprint}/table", TEXT_SCHEMA, version)


def samples_table(storage: Storage, fingerprint: str, version: int | None = None) -> Table:
    """Open the table of the samples drawn under one fingerprint."""
    return Table(storage, f"{SAMPLES}/{fingerprint}/table", SAMPLES_SCHEMA, version)


def scores_table(storage: Storage, scorer: str, fingerprint: str, version: int | None = None) -> Table:
    """Open the table of the scores that one scorer gave under one fingerprint."""
    return Table(storage, f"{SCORES}/{scorer}@{fingerprint}/table", SCORES_SCHEMA, version)


def fingerprints(storage: Storage, folder: str) -> list[str]:
    """List the fingerprints below LATENTS, TEXT or SAMPLES, or the `<scorer>@<fingerprint>` below SCORES, sorted."""
    return sorted({name.removeprefix(f"{folder}/").split("/")[0] for name in storage.names(folder)})
