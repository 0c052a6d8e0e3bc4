"""The encoders of an execution: waiting for their nodes, running units through them, and the limit on drops."""

from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import DropBudgetExceeded
from pipelines.dataset.pair import Status
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.units.lazy import actor_by_name
from pipelines.units.pool import Pool, WrittenUnit, demand_of, run_units
from pipelines.units.waiting import Wait, wait_for


def wait_for_encoder(kind: str, config: EncodeConfig, say: Callable[[str], None]) -> Wait:
    """Return the wait for a node that an encoder can run on."""
    way_out = "add such a node"
    if config.device == "gpu":
        way_out += ", or set `encode.device: cpu`"
    if config.resources:
        way_out += ", or leave `encode.resources` out"
    way_out += "; `encode.start_timeout_s` allows a longer wait"
    return wait_for(f"encode {kind}", demand_of(config), timeout_s=config.start_timeout_s, way_out=way_out, say=say)


def encode_units(
    kind: str, config: EncodeConfig, storage: Storage, fingerprint: str, pool: Pool, dataset: Any
) -> Generator[WrittenUnit]:
    """Yield each unit as soon as it is encoded, for the caller to commit. Closing the generator ends the execution.

    Args:
        kind: `text` or `latents`.
        config: The section `encode`.
        storage: The storage of pairs and shards.
        fingerprint: Fingerprint of the model and the settings, from the driver.
        pool: The actors.
        dataset: The units, from `units_dataset` or `UnitFeed.dataset`.
    """
    return run_units(actor_class(kind), (config, storage, fingerprint, pool.num_threads), pool, dataset)


def actor_class(kind: str) -> Callable[[pa.Table], pa.Table]:
    """Return the class of the actors of `text` or of `latents`; the driver does not load torch for it."""
    places = {"text": "pipelines.encode.texts:WriteTexts", "latents": "pipelines.encode.latents:WriteLatents"}
    return actor_by_name(places[kind])


def check_dropped(kind: str, item: str, table: Table, config: EncodeConfig) -> None:
    """Check the rows of a table against the limit of quarantined rows.

    Args:
        kind: `text` or `latents`.
        item: The item of a row: `prompt` or `pair`.
        table: The table of the encoding.
        config: The section `encode`, with the limit.

    Raises:
        DropBudgetExceeded: More are quarantined; the message has the numbers and the most common reason.
    """
    rows = table.read(["status", "reason"])
    dropped = rows.filter(pc.equal(rows["status"], str(Status.QUARANTINED)))
    if dropped.num_rows <= config.max_drop_ratio * rows.num_rows:
        return
    (reason, times), *_ = Counter(dropped["reason"].to_pylist()).most_common(1)
    raise DropBudgetExceeded(
        f"encode ({kind}) dropped {dropped.num_rows:,} of {rows.num_rows:,} {item}s "
        f"({dropped.num_rows / rows.num_rows:.1%}, limit {config.max_drop_ratio:.1%}).\n"
        f"Most common reason: {reason} ({times:,}).",
        "numbers that are not finite come from damaged weights, or overflow the stored type: "
        "set `encode.dtype` to bfloat16 or float32, or `encode.vae` to another VAE; "
        "raise `encode.max_drop_ratio` to accept them",
    )
