"""The stage `encode`: from pair shards to latents and text embeddings; the tables record what is encoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestration.run.context import Outcome, Run
from orchestration.stages.stage import Look, digest
from pipelines.dataset.base_text import embedding_sizes
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.model_files import read_config
from pipelines.dataset.pair import EMPTY_PROMPT_ID
from pipelines.maintenance.describe import describe_encoding

if TYPE_CHECKING:
    from pipelines.config import EncodeConfig

VAE_FACTOR, LATENT_CHANNELS = 8, 4
CHUNK_LENGTH, EMBEDDING_SIZES = 77, (2048, 1280)  # SDXL's
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def look(run: Run) -> Look:
    """Compare the kept pairs and their prompts with what is encoded under the fingerprints."""
    version = pairs_table(run.storage).version
    if version is None:
        return Look(waits_for="ingest")
    prints = fingerprints(run)
    return Look(
        digest(*prints, version),
        is_done(run, version, prints),
        lambda: _encode(run, version, prints),
        amount=lambda: estimate(run, 0),
    )


def fingerprints(run: Run) -> tuple[str, str]:
    """Return the fingerprints of the latents and of the text embeddings."""
    from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint

    assert run.config.encode
    return latents_fingerprint(run.config.encode), text_fingerprint(run.config.encode)


def is_done(run: Run, version: int, prints: tuple[str, str]) -> bool:
    """Return whether all kept pairs and their prompts are encoded.

    The tables are read only if one has changed since a run last found everything encoded.

    Args:
        run: The run.
        version: Version of the table of pairs.
        prints: See `fingerprints`.
    """
    from pipelines.encode.plan import is_encoded

    assert run.config.encode
    record = run.journal.record("encode")
    if record is not None and record.details.get("versions") == versions(run, version, prints):
        return True
    return is_encoded(run.config.encode, run.storage, include_empty_prompt=run.config.wants_empty_prompt)


def versions(run: Run, version: int, prints: tuple[str, str]) -> list[Any]:
    """Return which version of the pairs was encoded, under which fingerprints, and the versions of their tables."""
    latents, text = prints
    tables = latents_table(run.storage, latents), text_table(run.storage, text)
    empty_prompt = [EMPTY_PROMPT_ID] if run.config.wants_empty_prompt else []
    return [version, latents, text, *(table.version for table in tables), *empty_prompt]


def _encode(run: Run, version: int, prints: tuple[str, str]) -> Outcome:
    """Encode what is missing, and write a contact sheet to check the result.

    Encoding alongside ingest is finished first, because it holds devices. Pairs that others commit meanwhile may not be
    encoded, so the record names the version that was looked at.
    """
    from orchestration.stages.contact_sheet import write_contact_sheet
    from pipelines.encode.execution import encode

    config = run.config.encode
    assert config
    rest = run.ahead.finish()
    done = encode(config, run.storage, include_empty_prompt=run.config.wants_empty_prompt)
    done["latents"] = done["latents"] or rest
    speed = {kind: each and each.to_json() for kind, each in done.items()}
    latents, text = prints
    facts = describe_encoding(run.storage, latents, text)
    contact = write_contact_sheet(config, run.storage, run.folder)
    summary = f"{facts.pairs:,} pairs, {facts.prompts:,} prompts"
    if facts.truncated_prompts:
        summary += (
            f", {facts.truncated_prompts:,} of them truncated to {facts.max_tokens} tokens (the longest has "
            f"{facts.longest_prompt:,}; raise `encode.prompt_chunks` to encode more)"
        )
    details = {"latents": latents, "text": text, "speed": speed, "contact": contact}
    details["versions"] = versions(run, version, prints)
    return Outcome(summary, details)


def estimate(run: Run, rows: int) -> Mapping[str, int]:
    """Count the shards, pairs and prompts that are not encoded, and the bytes that they will take."""
    from pipelines.encode.plan import pending

    config = run.config.encode
    assert config
    pairs = prompts = shards = 0
    if pairs_table(run.storage).version is not None:
        todo = pending(config, run.storage, include_empty_prompt=run.config.wants_empty_prompt)
        pairs, prompts = (sum(unit.rows.num_rows for unit in units) for units in (todo.latents, todo.texts))
        shards = len(todo.latents)
    work = {"shards": shards, "pairs": pairs + rows, "latent_bytes": (pairs + rows) * _latent_bytes(config)}
    return work | ({} if rows else {"prompts": prompts, "text_bytes": prompts * _text_bytes(config)})


def _latent_bytes(config: EncodeConfig) -> int:
    """Return the bytes of the latents of one pair of a full-size bucket; nearly those of every bucket."""
    channels, side = LATENT_CHANNELS, config.resolution // VAE_FACTOR
    if config.source.is_fetched():
        channels = int(read_config(config.source.vae_folder() / "config.json").get("latent_channels", channels))
    num_latents = 4 if config.flips else 2
    return num_latents * channels * side * side * DTYPE_BYTES[config.dtype]


def _text_bytes(config: EncodeConfig) -> int:
    """Return the bytes of the embedding of one prompt, in all its chunks."""
    per_token, pooled = EMBEDDING_SIZES
    if config.source.is_fetched():
        per_token, pooled = embedding_sizes(config.source.folder())
    return (config.prompt_chunks * CHUNK_LENGTH * per_token + pooled) * DTYPE_BYTES[config.dtype]
