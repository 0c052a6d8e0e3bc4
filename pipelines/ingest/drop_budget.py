"""The drop budget: how many rows were quarantined, for which reasons, and whether that is too many."""

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import IngestConfig
from pipelines.dataset.errors import DropBudgetExceeded
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import Reason, Status
from pipelines.dataset.storage import Storage
from pipelines.sources.unit import SourceUnit

# Who removes pairs wants them gone: that is no fault of the data.
DROPPED = (pc.field("status") == str(Status.QUARANTINED)) & (pc.field("reason") != str(Reason.REMOVED))
SHOWN_REASONS = 3


class DropBudget:
    """Counts drops during an ingest, and tells when the limit is exceeded whatever the remaining rows are.

    Args:
        config: The section `ingest`.
        storage: The data set's storage, whose rows count as well.
        units: The units to read. A unit of unknown size is assumed to have as many rows per byte as the others.
    """

    def __init__(self, config: IngestConfig, storage: Storage, units: list[SourceUnit]) -> None:
        table = pairs_table(storage)
        self._limit = config.max_drop_ratio
        self._rows_before = table.count_rows()
        again = pa.array({unit.file.uri for unit in units if unit.known}, pa.string())  # what they have now counts
        self._dropped = table.count_rows(DROPPED & ~pc.field("source_uri").isin(again))
        self._planned = sum(unit.num_rows for unit in units)
        self._unknown_bytes = sum(unit.file.size for unit in units if not unit.num_rows)
        self._unknown_read_bytes = self._unknown_rows = 0
        self._reasons: Counter[str] = Counter()

    def add(self, unit: SourceUnit, rows: pa.Table) -> None:
        """Count the rows of a committed unit."""
        dropped = rows.filter(pc.equal(rows["status"], str(Status.QUARANTINED)))["reason"].to_pylist()
        self._reasons.update(reason for reason in dropped if reason != Reason.REMOVED)
        if not unit.num_rows:
            self._unknown_read_bytes += unit.file.size
            self._unknown_rows += rows.num_rows

    @property
    def is_exceeded(self) -> bool:
        """Whether the drops so far exceed the limit for all rows, read or still to be read."""
        unknown = 0.0
        if self._unknown_bytes:
            if not self._unknown_read_bytes:
                return False
            unknown = self._unknown_rows * self._unknown_bytes / self._unknown_read_bytes
        total = self._rows_before + self._planned + unknown
        return self._dropped + self._reasons.total() > self._limit * total

    def note(self) -> str:
        """Describe the drops of this run, for the progress line."""
        if not self._reasons:
            return ""
        shown = ", ".join(f"{reason} {count:,}" for reason, count in self._reasons.most_common(SHOWN_REASONS))
        return f"dropped {self._reasons.total():,} ({shown})"

    @staticmethod
    def stored_bytes(rows: pa.Table) -> int:
        """Return the bytes of the images that the rows point to."""
        return sum(int(pc.sum(rows[name]).as_py() or 0) for name in ("length_0", "length_1"))


def check_drop_budget(config: IngestConfig, storage: Storage) -> None:
    """Fail if more of the table's rows are quarantined than the configuration allows.

    Raises:
        DropBudgetExceeded: More are; the message has the numbers, the place and the most common reason.
    """
    table = pairs_table(storage)
    num_rows = table.count_rows()
    if table.count_rows(DROPPED) <= config.max_drop_ratio * num_rows:
        return
    dropped = _still_dropped(table.read(["reason", "source_uri", "source_row", "source_pair"], DROPPED), storage)
    if dropped.num_rows <= config.max_drop_ratio * num_rows:
        return
    (reason, times), *_ = Counter(dropped["reason"].to_pylist()).most_common(1)
    (place, there), *_ = Counter(dropped["source_uri"].to_pylist()).most_common(1)
    raise DropBudgetExceeded(
        f"ingest dropped {dropped.num_rows:,} of {num_rows:,} rows "
        f"({dropped.num_rows / num_rows:.1%}, limit {config.max_drop_ratio:.1%}), {there:,} of them in {place}.\n"
        f"Most common reason: {reason} ({times:,}).",
        f"`mapo data show {storage.url} --json` lists the reasons; raise `ingest.max_drop_ratio` to accept them",
    )


def _still_dropped(dropped: pa.Table, storage: Storage) -> pa.Table:
    """Return the rows that no later state of their file has fixed."""
    place = ["source_uri", "source_row", "source_pair"]
    files = pc.unique(dropped["source_uri"])
    usable = (pc.field("status") != str(Status.QUARANTINED)) & pc.field("source_uri").isin(files)
    mended = pairs_table(storage).read(place, usable)
    return dropped.join(mended, place, join_type="left anti")
