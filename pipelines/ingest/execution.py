"""The ingest stage: plans units of the sources, reads them on Ray Data, commits them to the table.

Invariants: every source row becomes exactly one table row; a shard exists only once a row points to it; a
committed unit is never read again; the shard bytes of a unit are the same whoever writes them, whenever.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import IngestConfig
from pipelines.dataset.errors import unwrap
from pipelines.dataset.ipc import from_ipc
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import TEST, VALIDATION
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import Row
from pipelines.ingest.committer import Committer
from pipelines.ingest.drop_budget import DropBudget, check_drop_budget
from pipelines.ingest.pair_shards import WriteShards, write_unit
from pipelines.ingest.policy import Policy, apply_policy, is_applied
from pipelines.progress import ProgressBar, quiet_ray_data
from pipelines.resources import Demand, total_of
from pipelines.sources.files import list_files, split_of_file
from pipelines.sources.reader import reader_of
from pipelines.sources.unit import SourceUnit, UnitSettings
from pipelines.units.waiting import wait_for, wait_until_placed

__all__ = ["check_drop_budget", "ingest", "is_up_to_date", "pending_of", "plan_units", "write_unit"]

T = TypeVar("T")
Write = Callable[[Sequence[SourceUnit], IngestConfig, Storage, Callable[[str], None]], Generator[Row]]
"""Yields a row of `WriteShards` for each unit, in order; reports what it waits for with the last argument."""

FOOTER_READERS = 16
CPUS_A_TASK = 0.66  # three on two CPUs: while one waits for disk, network or scheduler, another works
MAX_UNITS_A_TASK = 8  # what a lost worker has to do again
MAX_TABLE_FILES = 200  # every unit adds one to the table, and every question opens each: 2 ms apiece


def plan_units(config: IngestConfig) -> list[SourceUnit]:
    """Plan the units of all sources, held-out ones first; reads only directory listings, parquet footers and JSON.

    This way a prompt that one source holds out is known before another source's training rows claim it.
    """
    settings = UnitSettings(config.max_shard_bytes, config.image_check)
    units: list[SourceUnit] = []
    for source_config in config.sources:
        reader = reader_of(source_config.format)
        files = list_files(source_config.path, reader.suffixes)
        with ThreadPoolExecutor(FOOTER_READERS) as readers:
            planned = readers.map(
                lambda file, reader=reader, given=source_config: reader.units(given, file, settings), files
            )
            units += [unit for found in planned for unit in found]
    return sorted(units, key=lambda unit: not _is_held_out(unit))


def _is_held_out(unit: SourceUnit) -> bool:
    split = split_of_file(unit.file.uri) if unit.source.split == "auto" else unit.source.split
    return split in (VALIDATION, TEST)


def pending_of(planned: Sequence[SourceUnit], storage: Storage) -> list[SourceUnit]:
    """Return the units that are not in the table yet."""
    units = {unit.id: unit for unit in planned}
    return [units[identity] for identity in pairs_table(storage).uncommitted(list(units))]


def is_up_to_date(config: IngestConfig, storage: Storage, planned: Sequence[SourceUnit]) -> bool:
    """Return whether the table has every planned unit, and every row follows the policy."""
    table = pairs_table(storage)
    return table.version is not None and not pending_of(planned, storage) and is_applied(Policy.of(config), table)


def ingest(config: IngestConfig, storage: Storage, planned: Sequence[SourceUnit] | None = None) -> None:
    """Bring the table up to date with the sources and the policy. Needs a running Ray.

    Args:
        config: The section `ingest`, with sources and policy.
        storage: The data set's storage.
        planned: The result of `plan_units`, if it is known, so that the sources are not listed again.

    Raises:
        SourceError: A source is missing or unreadable.
        DropBudgetExceeded: More than `max_drop_ratio` of the rows were quarantined.
        ClusterError: No node has the resources of a reading task, and none joined in time.
    """
    quiet_ray_data()
    bring_up_to_date(config, storage, planned, _write_on_ray)


def bring_up_to_date(
    config: IngestConfig, storage: Storage, planned: Sequence[SourceUnit] | None, write: Write
) -> None:
    """Ingest the output of `write`, wherever it reads the units; see `ingest`."""
    units = _mark_known(pending_of(plan_units(config) if planned is None else planned, storage), storage)
    apply_policy(Policy.of(config), pairs_table(storage))
    if units:
        storage.check_writable()
        try:
            _commit_units(write, units, config, storage)
        except Exception as error:
            raise unwrap(error) or error from error
        if len(pairs_table(storage).files()) > MAX_TABLE_FILES:
            pairs_table(storage).merge_files()
    check_drop_budget(config, storage)


def _write_on_ray(
    units: Sequence[SourceUnit], config: IngestConfig, storage: Storage, say: Callable[[str], None]
) -> Generator[Row]:
    import ray

    at_once = int(total_of("CPU", config.resources) / CPUS_A_TASK)
    tasks = [
        pa.table({"unit": [unit.to_json() for unit in task], "storage": [storage.url] * len(task)})
        for task in group_units(units, max(at_once, 1))
    ]
    dataset = ray.data.from_arrow(tasks).map_batches(
        WriteShards(), batch_size=None, num_cpus=CPUS_A_TASK, resources=dict(config.resources) or None
    )
    dataset.context.execution_options.preserve_order = True  # the first of two equal pairs is always the same
    dataset.context.target_max_block_size = 1  # a unit goes on by itself as soon as it is written
    # Nothing is fetched ahead: a unit is handed out, to be committed, as soon as it is written.
    written: Any = iter(dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"))
    with contextlib.closing(written):  # ends the execution also where this ends early
        reader = Demand("CPU", config.resources)
        way_out = "add such a node, or leave `ingest.resources` out"
        wait_until_placed(reader, wait_for("ingest", reader, timeout_s=None, way_out=way_out, say=say))
        for batch in written:
            yield from batch.to_pylist()


def group_units(units: Sequence[T], at_once: int) -> list[Sequence[T]]:
    """Group units, in order, into tasks that process them one after the other: many at first, single ones at the end.

    Ray Data takes 0.1 to 0.2 s to notice that a task has ended, which can be as long as a unit. To save that time and
    still let the workers end together, a task takes half of a fair share of the remaining units (guided
    self-scheduling).
    """
    tasks, start = [], 0
    while start < len(units):
        size = min(max((len(units) - start) // (2 * at_once), 1), MAX_UNITS_A_TASK)
        tasks.append(units[start : start + size])
        start += size
    return tasks


def _mark_known(units: list[SourceUnit], storage: Storage) -> list[SourceUnit]:
    """Mark each unit whose file has rows of an earlier state in the table: these are not added again."""
    if not units:
        return units
    known: set[str] = set()
    for batch in pairs_table(storage).batches(["source_uri"]):
        known.update(pc.unique(batch["source_uri"]).to_pylist())
    return [replace(unit, known=unit.file.uri in known) for unit in units]


def _commit_units(write: Write, units: list[SourceUnit], config: IngestConfig, storage: Storage) -> None:
    committer = Committer(pairs_table(storage), Policy.of(config))
    budget = DropBudget(config, storage, units)
    planned = {unit.id: unit for unit in units}
    with (
        ProgressBar("ingest", len(units), "units") as progress,
        contextlib.closing(write(units, config, storage, progress.say)) as written,
    ):
        for unit in written:
            rows = committer.append(unit["unit_id"], from_ipc(unit["rows"]))
            budget.add(planned[unit["unit_id"]], rows)
            statuses = Counter(rows["status"].to_pylist())
            progress.advance(
                1, rows=rows.num_rows, size=budget.stored_bytes(rows), note=budget.note(), statuses=statuses
            )
            if budget.is_exceeded:
                break  # more than the limit already, whatever the rest holds
