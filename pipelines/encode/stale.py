"""The error when the data of a training is not encoded: what is missing, and how existing encodings differ."""

from collections.abc import Iterator
from typing import Any

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import LATENTS, TEXT, fingerprints, latents_table, text_table
from pipelines.dataset.model_files import SDXL
from pipelines.dataset.pair import EMPTY_PROMPT_ID
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject
from pipelines.encode.fingerprint import fingerprint_of, noted_parts
from pipelines.encode.plan import Pending, pending
from pipelines.units.unit import Unit

MAX_OTHERS = 3  # that a message describes, the most alike first
DIGEST_LENGTH = 12
MISSING = "nothing"
UNSAID = {"pipeline": SDXL.pipeline_class, "flips": False, "prompt_chunks": 1}
"""Values of the parts that a fingerprint may leave out."""


def refusal(config: EncodeConfig, storage: Storage, *, include_empty_prompt: bool = False) -> SnapshotError | None:
    """Return an error that names the incomplete fingerprints, and how they differ from existing ones.

    Args:
        config: The section `encode` of the training.
        storage: The data set's storage.
        include_empty_prompt: Whether training replaces dropped prompts with the embedding of "".

    Returns:
        The error; None if nothing is missing.

    Raises:
        ModelError: The model is missing, damaged or of another family.
    """
    todo = pending(config, storage, include_empty_prompt=include_empty_prompt)
    if not todo.num_kept:
        return SnapshotError(f"there are no kept pairs in {storage.uri('dataset/pairs')}", "run `mapo ingest` first")
    lines = [
        *_missing("latents", LATENTS, "pairs", todo.latents, todo.latents_parts, storage),
        *_missing("text embeddings", TEXT, "prompts", todo.texts, todo.text_parts, storage),
    ]
    if not lines:
        return None
    if _is_only_empty(todo):
        return SnapshotError(
            'the embedding of "", which `train.null_prompt: empty` needs for dropped prompts, is not stored under the '
            f"fingerprint {fingerprint_of(todo.text_parts)}",
            "`mapo encode` with this configuration adds it and leaves the rest alone",
        )
    return SnapshotError(
        "\n".join(lines),
        "`mapo encode` with this configuration writes what is missing and keeps the others; to train on one of the "
        "others, use the settings and the model that it was made with",
    )


def _is_only_empty(todo: Pending) -> bool:
    """Return whether all that is missing is the embedding of ""."""
    return not todo.latents and [unit.rows["prompt_id"].to_pylist() for unit in todo.texts] == [[EMPTY_PROMPT_ID]]


def _missing(
    what: str, folder: str, items: str, units: list[Unit], parts: JsonObject, storage: Storage
) -> Iterator[str]:
    if not units:
        return
    name, table_of = fingerprint_of(parts), latents_table if folder == LATENTS else text_table
    num_missing, num_there = sum(unit.rows.num_rows for unit in units), table_of(storage, name).count_rows()
    total = f"{num_missing:,} {items}" if not num_there else f"{num_missing:,} of {num_missing + num_there:,} {items}"
    yield f"{total} have no {what} under the fingerprint {name}"
    others = [other for other in fingerprints(storage, folder) if other != name]
    described = [(list(differences(noted_parts(storage, folder, other), parts)), other) for other in others]
    for found, other in sorted(described, key=lambda each: (len(each[0]), each[1]))[:MAX_OTHERS]:
        count = table_of(storage, other).count_rows()
        yield f"  {other} ({count:,} {items}) differs: {'; '.join(found) or 'there is no record of how it was made'}"


def differences(then: JsonObject, now: JsonObject, inside: str = "") -> Iterator[str]:
    """Yield `key was this, is that` for every part of a fingerprint that differs; nothing if `then` is unknown."""
    if not then and not inside:
        return
    for key in sorted({*then, *now}):
        before, after = (parts.get(key, UNSAID.get(key, MISSING)) for parts in (then, now))
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{inside}{key}/")
        elif before != after:
            yield f"{inside}{key} was {_shown(before)}, is {_shown(after)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} buckets" if len(value) != 1 else f"the bucket {value[0]}"
    if isinstance(value, dict):
        return f"{len(value)} files"
    if isinstance(value, str) and len(value) == 64:  # a digest
        return f"{value[:DIGEST_LENGTH]}…"
    return str(value)
