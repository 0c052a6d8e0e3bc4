"""The encode stage: missing latents and text embeddings are encoded on Ray Data actors and committed.

Invariants: items with a row under the fingerprint are never encoded again; a shard exists only once a row points to it;
a distinct prompt is embedded once, a distinct image of a shard once; the bytes of a unit are the same every time.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import LATENTS, TEXT, latents_table, text_table
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.dataset.values import JsonObject
from pipelines.encode.fingerprint import fingerprint_of, note_parts
from pipelines.encode.plan import Pending, check_settings, pending, with_absolute_paths
from pipelines.encode.workers import check_dropped, encode_units, wait_for_encoder
from pipelines.progress import ProgressBar
from pipelines.units.pool import demand_of, divide_cluster, units_dataset
from pipelines.units.stats import Speed, Tally, count_dropped
from pipelines.units.unit import Unit
from pipelines.units.waiting import wait_until_placed


def encode(config: EncodeConfig, storage: Storage, *, include_empty_prompt: bool = False) -> dict[str, Speed | None]:
    """Bring latents and text embeddings up to date with the kept pairs. Needs a running Ray.

    Args:
        config: The section `encode`.
        storage: The data set's storage.
        include_empty_prompt: Whether to embed "" in addition to the prompts.

    Returns:
        For `text` and `latents`, what was encoded and how fast; None if nothing was missing.

    Raises:
        ModelError: The model is missing, damaged or not supported.
        ConfigError: The model cannot be run with these settings.
        SnapshotError: There are no kept pairs.
        DropBudgetExceeded: More than `max_drop_ratio` of the rows were quarantined.
        EncodingError: There is not enough memory for even one image, or a unit repeatedly kills its actor.
        ClusterError: No node has the resources of an encoder, and none joined in time.
    """
    config = with_absolute_paths(config)
    todo = pending(config, storage, include_empty_prompt=include_empty_prompt)
    if not todo.num_kept:
        raise SnapshotError(
            f"there are no kept pairs in {storage.uri('dataset/pairs')}, so there is nothing to encode",
            "run `mapo ingest` first; `mapo data show` lists why rows were not kept",
        )
    check_settings(config)
    if not todo.is_empty:
        storage.check_writable()
    return {stage.kind: stage.run() for stage in _stages(config, storage, todo)}


def _stages(config: EncodeConfig, storage: Storage, todo: Pending) -> Iterator["_Stage"]:
    """Yield text, then latents: text is quick, and a wrong text encoder should show before hours of images."""
    table = text_table(storage, fingerprint_of(todo.text_parts))
    yield _Stage("text", "prompt", todo.texts, table, TEXT, todo.text_parts, config, storage)
    table = latents_table(storage, fingerprint_of(todo.latents_parts))
    yield _Stage("latents", "pair", todo.latents, table, LATENTS, todo.latents_parts, config, storage)


@dataclass(frozen=True)
class _Stage:
    """One of the two executions: units in, committed rows out."""

    kind: str
    item: str
    units: list[Unit]
    table: Table
    folder: str
    parts: JsonObject
    config: EncodeConfig
    storage: Storage

    def run(self) -> Speed | None:
        """Encode and commit the units, then check the result against the limit of quarantined rows."""
        speed = self._encode() if self.units else None
        check_dropped(self.kind, self.item, self.table, self.config)
        return speed

    def _encode(self) -> Speed | None:
        note_parts(self.storage, self.folder, self.parts)
        num_planned = sum(unit.rows.num_rows for unit in self.units)
        max_dropped = self._max_dropped(num_planned)
        pool = divide_cluster(self.config, len(self.units))
        tally = Tally(f"encode {self.kind}", self.config.batch_size, pool.most)
        fingerprint, dataset = fingerprint_of(self.parts), units_dataset(self.units)
        done = encode_units(self.kind, self.config, self.storage, fingerprint, pool, dataset)
        with ProgressBar(f"encode {self.kind}", num_planned, f"{self.item}s") as progress, contextlib.closing(done):
            wait = wait_for_encoder(self.kind, self.config, progress.say)
            wait_until_placed(demand_of(self.config), wait, count=pool.first)
            for unit, rows, effort in done:
                self.table.append(unit, rows)
                progress.say(tally.add(rows, effort))
                progress.advance(rows.num_rows)
                if tally.num_dropped > max_dropped:
                    break  # without the rest: nothing in it could lower the drops
        return tally.take()

    def _max_dropped(self, num_planned: int) -> float:
        """Return how many of the planned rows may be quarantined, given those of earlier runs."""
        rows = self.table.read(["status"])
        return self.config.max_drop_ratio * float(rows.num_rows + num_planned) - count_dropped(rows)
