"""The only place that commits samples: each sample has one row, also if several runs draw the same ones at once."""

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import StorageError
from pipelines.dataset.table import Commit, Table

MAX_CONFLICTS = 200  # commits of others that may come first, one after the other
MAX_TABLE_FILES = 64  # each commit adds one; readers open them all


class SampleCommitter:
    """Commits units on top of a version whose rows are known not to hold any of their samples.

    Of several runs that want the same samples, each plans by itself, and their units may overlap without being equal.
    A row that another run has committed since the plan wins, and the bytes that were drawn again are never pointed to.

    Args:
        table: The table of one fingerprint.
        version: Its version before the units were planned.
    """

    def __init__(self, table: Table, version: int | None) -> None:
        self._table, self._version = table, version
        self._has_others = False

    def append(self, unit: str, rows: pa.Table) -> pa.Table:
        """Commit the rows of a unit that no other writer has committed; return them.

        Raises:
            StorageError: The commit failed.
        """
        for _ in range(MAX_CONFLICTS):
            version = self._table.version
            # What others committed may be among the rows of every later unit as well.
            self._has_others |= version != self._version
            if self._has_others:
                rows = self._without_known(rows)
            landed = self._table.append_on(version, unit, rows)
            if landed is Commit.DONE:
                self._version = 0 if version is None else version + 1
            if landed is not Commit.CONFLICT:
                return rows
        raise StorageError(
            f"cannot commit unit {unit} to {self._table.uri}: {MAX_CONFLICTS} other commits came first",
            "let the other runs that draw the same samples finish, then rerun this one",
        )

    def finish(self) -> None:
        """Merge the table's files if there are many."""
        if len(self._table.files()) > MAX_TABLE_FILES:
            self._table.merge_files()

    def _without_known(self, rows: pa.Table) -> pa.Table:
        """Return the rows whose samples are not in the table."""
        known = self._table.read(["sample_key"], pc.field("sample_key").isin(rows["sample_key"].combine_chunks()))
        return rows.filter(pc.invert(pc.is_in(rows["sample_key"], known["sample_key"].combine_chunks())))
