"""Delta tables: append a unit once, pin a version, read columns.

A unit of work is a Delta application transaction: `append` writes its rows and marks the unit in one commit, and
`is_committed` looks for the mark. Of several writers of one unit exactly one wins. Objects that no committed
row points to do not exist for readers.
"""

import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError

from pipelines.dataset.errors import SnapshotError, StorageError
from pipelines.dataset.storage import PLACE_HINT, Storage, patience_s

MAX_COMMIT_RETRIES = 50  # other writers' commits that may land first
MAX_ATTEMPTS = 6  # whole commits: of several writers that create the table at once, all but one are refused
MAX_REQUESTS = 100  # of one question to an object store that does not answer, while there is patience
MAX_REVISIONS = 30  # whole changes of rows: each commit of another writer refuses one
MARK = "mapo.commit"  # in the log, a number drawn for each commit: whose it is, when its answer was lost
MARK_DEPTH = 100  # commits of others that may have landed on top of it meanwhile
NAME_OF_COMMIT = "mapo"  # what `rewrite` adds to the log of the table
MAX_FIRST_WAIT_S = 0.2  # doubled at each attempt, drawn at random: 3 s on average in all
# delta-rs deletes the log behind a checkpoint after 30 days otherwise, and pinned versions with it.
CONFIGURATION: dict[str, str | None] = {"delta.logRetentionDuration": "interval 5200 weeks"}


class Commit(Enum):
    """The outcome of a commit on top of a given version."""

    DONE = "done"
    ALREADY_DONE = "already done"  # the unit was committed before
    CONFLICT = "conflict"  # another commit came first: look at it, then try again


def storage_options(url: str) -> dict[str, str]:
    """Return the options that delta-rs needs in addition to the environment, which it reads itself."""
    options = {}
    if "://" in url and (patience := patience_s()):
        options = {"max_retries": str(MAX_REQUESTS), "retry_timeout": f"{patience:.0f}s"}
    if url.startswith(("s3://", "s3a://")) and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["allow_http"] = "true"
    return options


class Table:
    """One Delta table below a storage; opened when first used, and updated before each query.

    Args:
        storage: The storage of the table's folder.
        name: The folder.
        schema: Columns and types of its rows.
        version: Pin this version: reads always see it, and appends are refused.
    """

    def __init__(self, storage: Storage, name: str, schema: pa.Schema, version: int | None = None) -> None:
        self._storage = storage
        self._name = name
        self._pinned = version
        self._table: DeltaTable | None = None
        self.schema = schema

    @property
    def uri(self) -> str:
        """The table's URL, for other readers of Delta tables."""
        return self._storage.uri(self._name)

    def _open(self) -> DeltaTable | None:
        try:
            if self._table is None:
                if self._storage.is_local and not self._storage.exists(f"{self._name}/_delta_log"):
                    raise TableNotFoundError  # delta-rs would make the folder
                self._table = DeltaTable(self.uri, version=self._pinned, storage_options=storage_options(self.uri))
            elif self._pinned is None:
                self._table.update_incremental()
        except TableNotFoundError:
            if self._pinned is not None:
                raise self._no_such_version() from None
            return None
        except (DeltaError, OSError) as error:
            if self._pinned is not None and (self._newest() or 0) < self._pinned:
                raise self._no_such_version() from error
            raise StorageError(f"cannot read the table {self.uri}: {_one_line(error)}", PLACE_HINT) from error
        return self._table

    def _newest(self) -> int | None:
        return Table(self._storage, self._name, self.schema).version

    def _no_such_version(self) -> SnapshotError:
        return SnapshotError(
            f"there is no version {self._pinned} of the table {self.uri}", "was the data set deleted and created again?"
        )

    @property
    def version(self) -> int | None:
        """The newest version (or the pinned one); None before the first commit."""
        table = self._open()
        return None if table is None else table.version()

    def is_committed(self, unit: str) -> bool:
        """Return whether this unit's rows are in the table."""
        return not self.uncommitted([unit])

    def uncommitted(self, units: list[str]) -> list[str]:
        """Return those of `units` that are not in the table, in their order."""
        table = self._open()
        try:
            return units if table is None else [u for u in units if table.transaction_version(u) is None]
        except (DeltaError, OSError) as error:
            raise StorageError(f"cannot read the table {self.uri}: {_one_line(error)}", PLACE_HINT) from error

    def append(self, unit: str, rows: pa.Table) -> bool:
        """Commit the rows of a unit, once.

        Returns:
            True if this call committed them; False if the unit was already in the table.

        Raises:
            StorageError: The commit failed for another reason.
        """
        assert self._pinned is None, "a pinned table is read-only"
        rows = rows.select(self.schema.names).cast(self.schema)
        mark = uuid.uuid4().hex
        for attempt in range(MAX_ATTEMPTS):
            if self.is_committed(unit):  # by another writer, or by us and the answer was lost
                return attempt > 0 and self._is_marked(mark)
            try:
                self._commit(unit, rows, mark)
            except (DeltaError, OSError) as error:
                refused = error
                time.sleep(random.uniform(0, MAX_FIRST_WAIT_S * 2**attempt))  # noqa: S311
            else:
                return True
        if self.is_committed(unit):
            return self._is_marked(mark)
        raise StorageError(f"cannot commit unit {unit} to {self.uri}: {_one_line(refused)}", PLACE_HINT) from refused

    def append_on(self, version: int | None, unit: str, rows: pa.Table) -> Commit:
        """Commit the rows of a unit if `version`, on which they were judged, is still the newest.

        Raises:
            StorageError: The commit failed for another reason.
        """
        assert self._pinned is None, "a pinned table is read-only"
        rows = rows.select(self.schema.names).cast(self.schema)
        if self.is_committed(unit):
            return Commit.ALREADY_DONE
        if self.version != version:
            return Commit.CONFLICT
        try:
            self._commit(unit, rows, mark := uuid.uuid4().hex, max_retries=0)
        except (DeltaError, OSError) as error:
            if self.is_committed(unit):  # by another writer, or by us and the answer was lost
                return Commit.DONE if self._is_marked(mark) else Commit.ALREADY_DONE
            if self.version != version:
                return Commit.CONFLICT
            raise StorageError(f"cannot commit unit {unit} to {self.uri}: {_one_line(error)}", PLACE_HINT) from error
        return Commit.DONE

    def rewrite(self, change: Callable[[pa.Table], pa.Table], where: ds.Expression, *, name: str) -> int:
        """Rewrite the units that have rows meeting a condition, in one commit; return the number of rows rewritten.

        Rows go through Arrow. delta-rs's own update and merge leave files with another string type behind, which
        Arrow cannot filter.

        Args:
            change: Maps all rows of these units to their new rows; called again after another writer's commit.
            where: Rows that must change; none of them may be left afterwards.
            name: Name of the commit in the table's history.

        Raises:
            StorageError: The commit failed, or lost to others `MAX_REVISIONS` times.
        """
        assert self._pinned is None, "a pinned table is read-only"
        for attempt in range(MAX_REVISIONS):
            units = pc.unique(self.read(["unit"], where)["unit"]).to_pylist()
            if not units:
                return 0
            assert self._table is not None
            rows = change(self.read(None, pc.field("unit").isin(units)))
            listed = ", ".join(f"'{unit}'" for unit in sorted(units))
            try:
                write_deltalake(
                    self._table,
                    rows.select(self.schema.names).cast(self.schema),
                    mode="overwrite",
                    schema_mode=self._schema_mode(),
                    predicate=f"unit IN ({listed})",
                    storage_options=storage_options(self.uri),
                    commit_properties=CommitProperties(custom_metadata={NAME_OF_COMMIT: name}, max_commit_retries=0),
                )
            except (DeltaError, OSError) as error:
                refused = error
                self._table = None  # a refused commit may leave it in an older state
                time.sleep(random.uniform(0, MAX_FIRST_WAIT_S * min(attempt + 1, 8)))  # noqa: S311
            else:
                return int(rows.num_rows)
        raise StorageError(
            f"cannot change {self.uri} ({name}): refused {MAX_REVISIONS} times, last with: {_one_line(refused)}",
            "other writers committed first each time: let the ingest finish, then run the command again",
        ) from refused

    def merge_files(self) -> tuple[int, int]:
        """Merge the table's small files into fewer; return their number before and after. Rows do not change.

        Other writers have precedence: if one of them changes the same files meanwhile, nothing is merged.
        """
        assert self._pinned is None, "a pinned table is read-only"
        before = len(self.files())
        table = self._open()
        if table is None or before < 2:
            return before, before
        try:
            table.optimize.compact()
        except (DeltaError, OSError):
            self._table = None
        return before, len(self.files())

    def _schema_mode(self) -> Literal["merge"] | None:
        """Add the columns that an older table does not have; additional columns of a newer one are null in our rows."""
        assert self._table is not None
        return None if set(self.schema.names) == {field.name for field in self._table.schema().fields} else "merge"

    def _is_marked(self, mark: str) -> bool:
        """Return whether one of the newest commits has this mark, whatever answer its writer got."""
        table = self._open()
        try:
            return table is not None and any(commit.get(MARK) == mark for commit in table.history(MARK_DEPTH))
        except (DeltaError, OSError) as error:
            raise StorageError(f"cannot read the table {self.uri}: {_one_line(error)}", PLACE_HINT) from error

    def _commit(self, unit: str, rows: pa.Table, mark: str, max_retries: int = MAX_COMMIT_RETRIES) -> None:
        """Commit on top of the version in which `is_committed` did not find the unit.

        delta-rs refuses a transaction only if it landed after the version that the commit starts from. So the table
        is not reopened here, and the commit that creates a table is not retried: its writer must be the creator.
        """
        is_new = self._table is None
        write_deltalake(
            self.uri if self._table is None else self._table,
            rows,
            mode="error" if is_new else "append",
            schema_mode=None if is_new else self._schema_mode(),
            configuration=CONFIGURATION if is_new else None,
            storage_options=storage_options(self.uri),
            commit_properties=CommitProperties(
                app_transactions=[Transaction(unit, 1)],
                custom_metadata={MARK: mark},
                max_commit_retries=0 if is_new else max_retries,
            ),
        )

    def read(self, columns: list[str] | None = None, where: ds.Expression | None = None) -> pa.Table:
        """Read rows of the newest (or pinned) version; an empty table before the first commit."""
        names = columns or self.schema.names
        schema = pa.schema([self.schema.field(name) for name in names])
        return pa.Table.from_batches(self.batches(names, where), schema)

    def batches(self, columns: list[str], where: ds.Expression | None = None) -> Iterator[pa.RecordBatch]:
        """Read the same rows a batch at a time, so that not all are in memory at once."""
        table = self._open()
        if table is None:
            return
        try:
            yield from self._dataset(table).to_batches(columns=columns, filter=where)
        except (DeltaError, OSError, pa.ArrowException) as error:
            raise StorageError(f"cannot read the table {self.uri}: {_one_line(error)}", PLACE_HINT) from error

    def dataset(self) -> Any:
        """Return the newest (or pinned) version as an Arrow data set, which DuckDB, Polars and pyarrow query.

        Raises:
            SnapshotError: Nothing was ever committed.
        """
        table = self._open()
        if table is None:
            raise SnapshotError(
                f"there is no table at {self.uri}", "`mapo ingest CONFIG` creates one; is the storage URL right?"
            )
        return self._dataset(table)

    def count_rows(self, where: ds.Expression | None = None) -> int:
        """Count rows; without a condition only the table's log is read."""
        table = self._open()
        if table is None:
            return 0
        counted = pc.sum(pa.table(table.get_add_actions())["num_records"]).as_py()
        return int(counted or 0) if where is None else int(self._dataset(table).count_rows(filter=where))

    def may_have_null(self, column: str) -> bool:
        """Return whether some row may have no value, as far as the statistics of the table's files tell."""
        table = self._open()
        if table is None:
            return False
        files = pa.table(table.get_add_actions(flatten=True))
        name = f"null_count.{column}"
        if name not in files.column_names or files[name].null_count:
            return bool(files.num_rows)
        return bool(pc.any(pc.greater(files[name], 0)).as_py())

    def files(self) -> frozenset[str]:
        """Return the names of the parquet files that make up the newest (or pinned) version."""
        table = self._open()
        return frozenset() if table is None else frozenset(pa.table(table.get_add_actions())["path"].to_pylist())

    def batches_of(
        self, files: frozenset[str], columns: list[str], where: ds.Expression | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Read the rows of these files only: those appended since the version that had the others."""
        table = self._open()
        if table is None or not files:
            return
        whole = self._dataset(table)
        parts = [part for part in whole.get_fragments() if part.path.rsplit("/", 1)[-1] in files]
        found = ds.FileSystemDataset(parts, whole.schema, whole.format, whole.filesystem)
        yield from found.to_batches(columns=columns, filter=where)

    def _dataset(self, table: DeltaTable) -> Any:
        """Return the rows with every column of the schema: one that an older table does not have is null."""
        found = table.to_pyarrow_dataset()
        absent = [field for field in self.schema if field.name not in found.schema.names]
        parts = [_without_null_bounds(part, found.format) for part in found.get_fragments()]
        return ds.FileSystemDataset(parts, pa.schema([*found.schema, *absent]), found.format, found.filesystem)


def _without_null_bounds(part: Any, file_format: Any) -> Any:
    """Return a file without its statistics if these bound a column by null, which Arrow takes for "never null".

    delta-rs states such bounds for files written before the table had the column.
    """
    if "null[" not in str(part.partition_expression):
        return part
    return file_format.make_fragment(part.path, part.filesystem)


def _one_line(error: BaseException) -> str:
    """Return a message of delta-rs without its colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()) or type(error).__name__
