"""One unit of distinct prompts to one shard of text embeddings."""

from collections.abc import Iterator

import pyarrow as pa
import torch

from pipelines.config import EncodeConfig
from pipelines.dataset.layout import TEXT, TEXT_SCHEMA
from pipelines.dataset.pair import NULL_PROMPT_ID, Reason
from pipelines.dataset.storage import Storage
from pipelines.encoders import Embedded, TextEncoder
from pipelines.fingerprint import text_fingerprint
from pipelines.latents import check_same_model, use_threads
from pipelines.unit_shard import UnitShard, from_ipc, pack, to_ipc


class WriteTexts:
    """Embed the prompts of one unit and write their shard; the only place that writes text embeddings.

    In:       A unit's prompts.      Out: its table rows, in the unit's order.
    Runs as:  Ray Data actor, one GPU or CPU; one batch of embeddings in memory.
    Retry:    safe: name and bytes follow from the unit alone.
    Drops:    nothing: what is not finite is a quarantined row.
    Raises:   ModelError (with the first unit: see `unwrap`), StorageError.
    """

    def __init__(self, config: EncodeConfig, storage: Storage, fingerprint: str, num_threads: int) -> None:
        self._config, self._storage, self._fingerprint = config, storage, fingerprint
        self._num_threads = num_threads
        self._encoder: TextEncoder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One unit in, one out."""
        if self._encoder is None:
            check_same_model(self._fingerprint, text_fingerprint(self._config), self._config.model)
            use_threads(self._num_threads)
            self._encoder = TextEncoder(self._config.model)
        (unit,) = batch.to_pylist()
        rows = write_texts(
            unit["unit_id"], from_ipc(unit["rows"]), self._config, self._storage, self._fingerprint, self._encoder
        )
        return pa.table({"unit_id": [unit["unit_id"]], "rows": [to_ipc(rows)]})


def write_texts(
    unit: str, prompts: pa.Table, config: EncodeConfig, storage: Storage, fingerprint: str, encoder: TextEncoder
) -> pa.Table:
    """Write the shard of a unit; returns one row for every prompt, in order."""
    dtype = getattr(torch, config.dtype)
    with UnitShard(storage, f"{TEXT}/{fingerprint}/{unit}.tar", unit, TEXT_SCHEMA) as shard:
        for prompt_id, embedded in _embed(prompts, config.batch_size, encoder):
            row = {"prompt_id": prompt_id, "num_tokens": embedded.num_tokens}
            tensors = {
                "prompt_embeds": embedded.prompt_embeds.to(dtype, copy=True).contiguous(),
                "pooled_prompt_embeds": embedded.pooled_prompt_embeds.to(dtype, copy=True).contiguous(),
            }
            if all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                shard.keep(row, prompt_id, pack(tensors))
            else:
                shard.quarantine(row, Reason.NON_FINITE)
        return shard.publish()


def _embed(prompts: pa.Table, batch_size: int, encoder: TextEncoder) -> Iterator[tuple[str, Embedded]]:
    """Every prompt with its embedding, in order; the null conditioning is no prompt and goes alone."""
    named = list(zip(prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist(), strict=True))
    for identity, _ in named[:1]:
        if identity == NULL_PROMPT_ID:
            yield identity, encoder.null()
            named = named[1:]
    for start in range(0, len(named), batch_size):
        part = named[start : start + batch_size]
        identities, texts = [identity for identity, _ in part], [text for _, text in part]
        yield from zip(identities, encoder(texts), strict=True)
