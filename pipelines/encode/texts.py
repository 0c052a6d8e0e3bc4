"""Writes the text embeddings of a unit of distinct prompts as one shard."""

import time

import pyarrow as pa
import torch

from pipelines.config import EncodeConfig
from pipelines.dataset.layout import TEXT, TEXT_SCHEMA
from pipelines.dataset.pair import NULL_PROMPT_ID, Reason
from pipelines.dataset.storage import Storage
from pipelines.encode.actor import EncodeActor
from pipelines.encode.encoders import Embedded, TextEncoder
from pipelines.encode.fingerprint import text_fingerprint
from pipelines.encode.tensor_file import pack
from pipelines.units.actor import BatchSize, Device, check_same_model
from pipelines.units.shard import UnitShard
from pipelines.units.stats import Effort


class WriteTexts(EncodeActor):
    """Embed the prompts of one unit and write their shard; the only place that writes text embeddings.

    In:       A unit's prompts.      Out: its table rows, in the unit's order, and its cost.
    Runs as:  Ray Data actor, one GPU or CPU, called for several units at once: one is embedded while another is
              written. The embeddings of two units in memory (0.3 GB each for SDXL in float16).
    Retry:    safe: name and bytes follow from the unit alone.
    Drops:    nothing: an embedding that is not finite is a quarantined row.
    Raises:   ModelError (with the first unit: see `unwrap`), StorageError, EncodingError.
    """

    def describe(self, rows: pa.Table) -> str:
        """Describe the work on a unit, for an error."""
        return f"encoding {rows.num_rows:,} prompts"

    def new_writer(self) -> "TextWriter":
        """Load the text encoders."""
        check_same_model(self._fingerprint, text_fingerprint(self._config), self._config.model)
        encoder = TextEncoder(self._config.source, prompt_chunks=self._config.prompt_chunks)
        return TextWriter(self._config, self._storage, self._fingerprint, encoder, self._num_threads)


class TextWriter:
    """Writes units of one configuration; `write` may be called from several threads at once.

    Args:
        config: The section `encode`.
        storage: The storage of the embeddings.
        fingerprint: The fingerprint, which names the folder.
        encoder: The text encoders.
        num_threads: Number of torch threads.
    """

    def __init__(
        self, config: EncodeConfig, storage: Storage, fingerprint: str, encoder: TextEncoder, num_threads: int = 1
    ) -> None:
        self._storage, self._fingerprint, self._encoder = storage, fingerprint, encoder
        self._dtype = getattr(torch, config.dtype)
        self._batch_size = BatchSize(config.batch_size)
        self._device = Device(num_threads)

    def write(self, unit: str, rows: pa.Table) -> tuple[pa.Table, Effort]:
        """Write the shard of a unit; return one row per prompt, in order, and the unit's cost."""
        effort = Effort()
        named = dict(zip(rows["prompt_id"].to_pylist(), rows["prompt"].to_pylist(), strict=True))
        embeddings = self._device.run(lambda: self._embed(named, effort), effort)
        name = f"{TEXT}/{self._fingerprint}/{unit}.tar"
        with UnitShard(self._storage, name, unit, TEXT_SCHEMA, effort) as shard:
            with effort.measured("pack", time.thread_time):
                for prompt_id, embedded in embeddings.items():
                    _write_prompt(prompt_id, embedded, shard)
            return shard.publish(), effort

    def _embed(self, named: dict[str, str], effort: Effort) -> dict[str, Embedded]:
        """Embed every prompt, in order and in the stored type; the null conditioning is made separately."""
        found: dict[str, Embedded] = {}
        with effort.measured("encode"):
            if NULL_PROMPT_ID in named:
                found[NULL_PROMPT_ID] = self._stored(self._encoder.null())
            prompts = [(identity, prompt) for identity, prompt in named.items() if identity != NULL_PROMPT_ID]
            while prompts:
                batch = prompts[: self._batch_size.size]
                if (embedded := self._pass([prompt for _, prompt in batch])) is not None:
                    found |= {identity: self._stored(each) for (identity, _), each in zip(batch, embedded, strict=True)}
                    prompts = prompts[len(batch) :]
        effort.batch_size = self._batch_size.size
        return {identity: found[identity] for identity in named}

    def _pass(self, prompts: list[str]) -> list[Embedded] | None:
        """Run one pass; return None if there is not enough memory for so many prompts."""
        return self._batch_size.attempt(
            lambda: self._encoder(prompts), len(prompts), "embed even one prompt", "use machines with more memory"
        )

    def _stored(self, embedded: Embedded) -> Embedded:
        # Copies, for a view would hold its whole batch.
        return embedded.map(lambda tensor: tensor.to(self._dtype, copy=True).contiguous())


def _write_prompt(prompt_id: str, embedded: Embedded, shard: UnitShard) -> None:
    row = {"prompt_id": prompt_id, "num_tokens": embedded.num_tokens}
    if all(bool(torch.isfinite(tensor).all()) for tensor in embedded.tensors.values()):
        shard.keep(row, f"{prompt_id}.safetensors", pack(embedded.tensors))
    else:
        shard.quarantine(row, Reason.NON_FINITE)
