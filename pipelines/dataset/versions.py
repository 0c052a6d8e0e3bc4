"""The versions of a table, from its log: when and by what each was made, and its files."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import unquote

from pipelines.dataset.errors import StorageError
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import NAME_OF_COMMIT

LOG = "_delta_log"
ENTRY = re.compile(rf"{LOG}/(\d{{20}})\.json")
READERS = 16


@dataclass(frozen=True)
class Version:
    """One commit.

    Args:
        number: The version's number, from 0.
        time: Time of the commit by its writer's clock, UTC.
        operation: `append`, `remove`, `compact`, or delta-rs's own name in lower case.
        units: Units of work that it committed.
        added: Its new files with the rows in each; None if the log does not say.
        dropped: Files that are no longer part of the table.
    """

    number: int
    time: datetime
    operation: str
    units: tuple[str, ...]
    added: dict[str, int | None] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()


def versions(table: Storage) -> list[Version]:
    """List every version of the table in this folder, oldest first; none if there is no table.

    Raises:
        StorageError: The log has a gap, so that the files of old versions are unknown.
    """
    names = sorted(name for name in table.names(LOG) if ENTRY.fullmatch(name))
    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(lambda name: _version(name, table.read(name)), names))
    if [version.number for version in found] != list(range(len(found))):
        raise StorageError(
            f"entries are missing from the log of {table.url}: it has {len(found):,} of "
            f"{found[-1].number + 1 if found else 0:,} versions",
            "something other than mapo deleted them; gc and history need the complete log",
        )
    return found


def versions_after(table: Storage, number: int) -> list[Version]:
    """List the versions after `number`, oldest first; no other entry of the log is read."""
    names = sorted(name for name in table.names(LOG) if (entry := ENTRY.fullmatch(name)) and int(entry[1]) > number)
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda name: _version(name, table.read(name)), names))


def files_of(history: Sequence[Version], wanted: Collection[int]) -> Iterator[tuple[int, frozenset[str]]]:
    """Yield the files of each wanted version, oldest first; `history` must be complete."""
    live: set[str] = set()
    for version in history:
        live = (live - version.dropped) | set(version.added)
        if version.number in wanted:
            yield version.number, frozenset(live)


def _version(name: str, data: bytes) -> Version:
    units: list[str] = []
    added: dict[str, int | None] = {}
    dropped: set[str] = set()
    info: dict[str, object] = {}
    for line in data.splitlines():
        action = json.loads(line)
        if "commitInfo" in action:
            info = action["commitInfo"]
        elif "txn" in action:
            units.append(action["txn"]["appId"])
        elif "add" in action:
            stats = json.loads(action["add"].get("stats") or "{}")
            added[unquote(action["add"]["path"])] = stats.get("numRecords")
        elif "remove" in action:
            dropped.add(unquote(action["remove"]["path"]))
    match = ENTRY.fullmatch(name)
    assert match is not None
    time = datetime.fromtimestamp(int(str(info.get("timestamp", 0))) / 1000, UTC)
    operation = str(info.get(NAME_OF_COMMIT) or ("append" if units else str(info.get("operation", "")).lower()))
    return Version(int(match[1]), time, operation, tuple(units), added, frozenset(dropped))
