"""Remove: takes pairs and single images out of the data set; their rows stay for the accounting, without content."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import ConfigError, SnapshotError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import PAIR, PAIRS_SCHEMA, Reason, Status
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.ingest.committer import CONTENT_COLUMNS, PLACE_COLUMNS

CONDITION = re.compile(r"(\w+)(=|~)(.+)", re.DOTALL)
NAMES = ("key", "prompt", "user", "source")
FORMS = "key=HEX, prompt=TEXT, prompt~REGEX, user=ID, source=FORMAT or source=URI"
COLUMNS = [
    "pair_key", "kind", "prompt", "user_id", "source", "source_uri", "unit", "source_row", "source_pair", "status"
]  # fmt: skip
PRESENT = pc.field("reason").is_null() | (pc.field("reason") != str(Reason.REMOVED))
MAX_ROUNDS = 10  # an ingest may commit a row of the same pair while the others are removed


@dataclass(frozen=True)
class Condition:
    """One `--where`: selects rows by key, prompt, user or source.

    Args:
        name: `key`, `prompt`, `user` or `source`.
        value: The value to match; with `is_pattern` a regular expression (RE2) to search for.
        is_pattern: Whether `value` is a pattern; only for prompts.
    """

    name: str
    value: str
    is_pattern: bool = False

    def of(self, rows: pa.RecordBatch) -> pa.Array:
        """Return for each row whether the condition holds; it never does for a null."""
        if self.name == "source":
            held = pc.or_(pc.equal(rows["source"], self.value), pc.equal(rows["source_uri"], self.value))
        elif self.is_pattern:
            held = pc.match_substring_regex(rows["prompt"], self.value)
        else:
            held = pc.equal(rows[{"key": "pair_key", "prompt": "prompt", "user": "user_id"}[self.name]], self.value)
        return pc.fill_null(held, False)


def parse_condition(text: str) -> Condition:
    """Parse a `--where` of the command line.

    Raises:
        ConfigError: The condition has an unknown form, or its pattern is not a regular expression.
    """
    match = CONDITION.fullmatch(text)
    if match is None or (match[1] not in NAMES) or (match[2] == "~" and match[1] != "prompt"):
        raise ConfigError(f"--where {text}: unknown condition", f"use one of: {FORMS}")
    condition = Condition(match[1], match[3], match[2] == "~")
    if condition.name == "key" and not re.fullmatch(r"[0-9a-f]{32}", condition.value):
        raise ConfigError(f"--where {text}: a key is 32 hex digits in lower case", "`pair_key` in the table has them")
    if condition.is_pattern:
        try:
            pc.match_substring_regex(pa.array([""]), condition.value)
        except pa.ArrowInvalid as error:
            raise ConfigError(
                f"--where {text}: not a regular expression: {error}", "the syntax is RE2's: no look-around, no \\1"
            ) from error
    return condition


@dataclass(frozen=True)
class Removed:
    """The rows that were removed, or would be."""

    rows: dict[str, int]
    """Removed rows by their former status."""
    num_pairs: int
    num_singles: int = 0

    @property
    def num_rows(self) -> int:
        """Total number of rows."""
        return sum(self.rows.values())


def remove(storage: Storage, conditions: Sequence[Condition], *, dry_run: bool = False) -> Removed:
    """Remove every pair or single image with a row that meets all conditions, with all its rows, in one commit.

    A removed row is `quarantined` with the reason `removed`; its prompt, user, digests and place are cleared.

    Raises:
        SnapshotError: There is no data set.
        StorageError: The commit failed.
    """
    assert conditions, "without a condition everything would go"
    table = pairs_table(storage)
    if table.version is None:
        raise SnapshotError(
            f"there is no data set at {storage.url}", "`mapo ingest CONFIG` creates one; is the storage URL right?"
        )
    rows: Counter[str] = Counter()
    pairs: set[str] = set()
    singles: set[str] = set()
    for _ in range(MAX_ROUNDS):
        version = table.version
        found, of_pairs, of_singles = _find(table, conditions)
        if not found:
            break
        counted = _count(table, found)
        rows, pairs, singles = rows + counted, pairs | of_pairs, singles | of_singles
        if dry_run:
            break
        _revise(table, found, of_pairs | of_singles)
        if table.version == version + 1:
            break
    return Removed(dict(rows), len(pairs), len(singles))


def _find(table: Table, conditions: Sequence[Condition]) -> tuple[set[str], set[str], set[str]]:
    """Return the identities that match all conditions, and those of them that are pairs, and single images."""
    found: set[str] = set()
    pairs: set[str] = set()
    singles: set[str] = set()
    for batch in table.batches(COLUMNS, PRESENT):
        held = batch.filter(reduce(pc.and_, (condition.of(batch) for condition in conditions)))
        if held.num_rows:
            is_pair = pc.equal(pc.fill_null(held["kind"], PAIR), PAIR)
            pairs.update(held["pair_key"].filter(is_pair).drop_null().to_pylist())
            singles.update(held["pair_key"].filter(pc.invert(is_pair)).drop_null().to_pylist())
            found.update(_identities(held).to_pylist())
    return found, pairs, singles


def _identities(rows: pa.RecordBatch | pa.Table) -> pa.Array:
    """Return the identity by which rows are removed together: that of their pair or image, or of a row without one."""
    parts = [rows["unit"], *(rows[name].cast(pa.string()) for name in ("source_row", "source_pair"))]
    parts[2] = pc.fill_null(parts[2], "0")
    return pc.coalesce(rows["pair_key"], pc.binary_join_element_wise(*parts, "/"))


def _count(table: Table, found: set[str]) -> Counter[str]:
    """Count the rows to remove, by status."""
    wanted = pa.array(sorted(found), pa.string())
    counted: Counter[str] = Counter()
    for batch in table.batches(["pair_key", "unit", "source_row", "source_pair", "status"], PRESENT):
        counted.update(batch["status"].filter(pc.is_in(_identities(batch), wanted)).to_pylist())
    return counted


def _revise(table: Table, found: set[str], keys: set[str]) -> None:
    wanted = pa.array(sorted(found), pa.string())
    units = sorted({identity.split("/")[0] for identity in found - keys})
    alone = pc.field("pair_key").is_null() & pc.field("unit").isin(pa.array(units, pa.string()))
    named = pc.field("pair_key").isin(pa.array(sorted(keys), pa.string())) | alone

    def change(rows: pa.Table) -> pa.Table:
        gone = pc.is_in(_identities(rows), wanted)
        values = dict.fromkeys((*CONTENT_COLUMNS, *PLACE_COLUMNS))
        for name, value in (values | {"status": str(Status.QUARANTINED), "reason": str(Reason.REMOVED)}).items():
            column = PAIRS_SCHEMA.field(name)
            changed = pc.if_else(gone, pa.scalar(value, column.type), rows[name])
            rows = rows.set_column(rows.column_names.index(name), column, changed)
        return rows

    table.rewrite(change, named & PRESENT, name="remove")
