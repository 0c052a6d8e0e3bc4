"""History: lists what happened to the table of pairs, one entry per version."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow.parquet as pq

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import PAIRS
from pipelines.dataset.storage import Storage
from pipelines.dataset.versions import Version, versions
from pipelines.maintenance.gc import lineage_versions, pinned_versions

READERS = 16


@dataclass(frozen=True)
class HistoryEntry:
    """One version of the table of pairs."""

    version: int
    time: str
    """Time of the commit, UTC, to the second."""
    operation: str
    rows: dict[str, int]
    """Added rows by status; empty for a version that changed rows instead."""
    num_rows: int | None
    """Number of added rows, also known after the files are deleted; None for a version that changed rows."""
    units: list[str]
    runs: list[str]
    """Runs that are pinned to the version."""
    rounds: list[str]
    """Rounds in the lineage of models that read the version, such as `photos round 1`."""


def history(storage: Storage, limit: int | None = None) -> list[HistoryEntry]:
    """List the versions, newest first.

    Args:
        storage: The data set's storage.
        limit: The number of newest versions to list; None for all.

    Raises:
        SnapshotError: There is no data set.
    """
    found = versions(storage.child(PAIRS))
    if not found:
        raise SnapshotError(
            f"there is no data set at {storage.url}", "`mapo ingest CONFIG` creates one; is the storage URL right?"
        )
    pins, lineage = (found(storage).get(PAIRS, {}) for found in (pinned_versions, lineage_versions))
    chosen = found[::-1][:limit]
    with ThreadPoolExecutor(READERS) as readers:
        counted = list(readers.map(partial(_added, storage), chosen))
    return [
        HistoryEntry(
            version=version.number,
            time=version.time.strftime("%Y-%m-%dT%H:%M:%SZ"),
            operation=version.operation,
            rows=rows,
            num_rows=None if version.dropped else sum(num or 0 for num in version.added.values()),
            units=list(version.units),
            runs=pins.get(version.number, []),
            rounds=lineage.get(version.number, []),
        )
        for version, rows in zip(chosen, counted, strict=True)
    ]


def _added(storage: Storage, version: Version) -> dict[str, int]:
    """Count added rows by status; empty if the version rewrote files, or if `gc` has deleted them."""
    counted: Counter[str] = Counter()
    if version.dropped:
        return {}
    for file in version.added:
        try:
            with storage.fs.open(storage.path(f"{PAIRS}/{file}"), "rb") as opened:
                counted.update(pq.read_table(opened, columns=["status"])["status"].to_pylist())
        except FileNotFoundError:
            return {}
    return dict(sorted(counted.items()))


def as_text(entries: list[HistoryEntry]) -> str:
    """Return one line for each version."""
    lines = []
    for entry in entries:
        if entry.num_rows is None:
            what = "rows rewritten"
        else:
            parts = ", ".join(f"{count:,} {status}" for status, count in entry.rows.items())
            what = f"{entry.num_rows:,} rows" + (f": {parts}" if parts else "")
        line = f"{entry.version:>5}  {entry.time}  {entry.operation:<9} {what}"
        line += f"  unit {', '.join(entry.units)}" if entry.units else ""
        line += f"  pinned by {', '.join(entry.runs)}" if entry.runs else ""
        lines.append(line + (f"  lineage of {', '.join(entry.rounds)}" if entry.rounds else ""))
    return "\n".join(lines)
