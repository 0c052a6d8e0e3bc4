"""Garbage-collect: deletes old objects that no live version of a table references.

It keeps the newest version of each table, every version that was the newest at some moment of the grace period, and
every version that a run is pinned to. Of versions that are only part of a model's lineage it keeps the rows, which tell
what the model was trained on, but not the bytes that they point to. Objects younger than the grace period stay even if
nothing references them: a running ingest has written shards that it has not committed yet.
"""

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pyarrow.dataset as ds
from pyarrow.fs import FSSpecHandler, PyFileSystem

from pipelines.dataset.errors import SnapshotError, StorageError
from pipelines.dataset.layout import LATENTS, PAIRS, RUNS, SAMPLES, SCORES, TEXT, fingerprints
from pipelines.dataset.storage import UNFINISHED, Storage
from pipelines.dataset.values import JsonObject
from pipelines.dataset.versions import LOG, Version, files_of, versions

DATASET = "dataset"
READERS = 16
ROUND = re.compile(r"rounds/\d+\.json")
MODEL_LINEAGE = "model/lineage.json"
TRAIN_RECORD = "stages/train.json"
TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")  # what fsspec's file systems call it

Pins = dict[str, dict[int, list[str]]]
"""Table -> version -> the runs or rounds that need it."""


@dataclass(frozen=True)
class StoredObject:
    """An object below the data set's folder."""

    name: str
    num_bytes: int
    modified: float
    """Modification time in seconds since 1970, by the storage's clock."""


def find_garbage(storage: Storage, grace: timedelta) -> list[StoredObject]:
    """List the objects that may be deleted, by name.

    Raises:
        SnapshotError: There is no data set.
        StorageError: A record of what is needed cannot be read, so nothing is known to be garbage.
    """
    objects = stored_objects(storage)  # first: what is written from now on is not in it
    newest = time.time() - grace.total_seconds()
    pins, lineage = pinned_versions(storage), lineage_versions(storage)
    needed: set[str] = set()
    for table in tables(storage):
        told = lineage.get(table, {})
        needed |= _needed(storage, table, pins.get(table, {}), told, datetime.fromtimestamp(newest, UTC))
    return [each for each in objects if each.modified < newest and each.name not in needed and _is_ours(each.name)]


def delete_garbage(storage: Storage, garbage: Iterable[StoredObject]) -> Iterator[StoredObject]:
    """Delete objects one after the other; yield each deleted one. An object that was rewritten meanwhile stays."""
    for each in garbage:
        info = _info(storage, each.name)
        if info is not None and _modified(info) == each.modified:
            storage.delete(each.name)
            yield each


def tables(storage: Storage) -> list[str]:
    """List the folders of all tables.

    Raises:
        SnapshotError: There is no data set.
    """
    if not storage.names(f"{PAIRS}/{LOG}"):
        raise SnapshotError(
            f"there is no data set at {storage.url}", "`mapo ingest CONFIG` creates one; is the storage URL right?"
        )
    folders = (LATENTS, TEXT, SAMPLES, SCORES)
    found = [f"{folder}/{name}/table" for folder in folders for name in fingerprints(storage, folder)]
    return [PAIRS, *found]


def pinned_versions(storage: Storage) -> Pins:
    """Return for each table the versions that runs are pinned to, with the names of the runs.

    A training is pinned from its start (`snapshot.json`); a finished one by its record.

    Raises:
        StorageError: A record cannot be read.
    """
    pins: Pins = {}
    for name in storage.names(RUNS):
        run, _, file = name.removeprefix(f"{RUNS}/").partition("/")
        if file not in (TRAIN_RECORD, "snapshot.json"):
            continue
        with _readable(storage, name):
            record = json.loads(storage.read(name))
            _pin(pins, record["details"]["snapshot"] if file == TRAIN_RECORD else record, run)
    return pins


def lineage_versions(storage: Storage) -> Pins:
    """Return for each table the versions in the lineage of models, with the names of rounds, such as `photos round 1`.

    For a run these are the rounds that its last training goes back to, and those of the exported model.

    Raises:
        StorageError: A record cannot be read.
    """
    pins: Pins = {}
    found: dict[str, dict[str, str]] = {}
    for name in storage.names(RUNS):
        run, _, file = name.removeprefix(f"{RUNS}/").partition("/")
        if file in (TRAIN_RECORD, MODEL_LINEAGE) or ROUND.fullmatch(file):
            found.setdefault(run, {})[file] = name
    for run, files in found.items():
        rounds, wanted = _rounds(storage, files)
        while wanted:
            each = rounds.pop(wanted.pop(), None)
            if each is not None:
                with _readable(storage, f"{RUNS}/{run}/rounds/{int(each['round']):04d}.json"):
                    _pin(pins, each["snapshot"], f"{run} round {each['round']}")
                    wanted += [each["parent"]["key"]] if each["parent"] else []
    return pins


def _rounds(storage: Storage, files: Mapping[str, str]) -> tuple[dict[str, JsonObject], list[str]]:
    """Read the records of a run.

    Args:
        storage: The run's storage.
        files: Name in the run's folder -> name on the storage.

    Returns:
        Its rounds by key, and the keys of the last rounds of its last training and of its exported model.
    """
    rounds: dict[str, JsonObject] = {}
    ends: list[str] = []
    for file, name in files.items():
        with _readable(storage, name):
            record = json.loads(storage.read(name))
            if file == MODEL_LINEAGE:
                whole = {each["key"]: each for each in record["rounds"] if not each.get("is_lost")}
                rounds |= whole
                ends += whole
            elif file == TRAIN_RECORD:
                ends.append(record.get("key", ""))
            else:
                rounds[record["key"]] = record
    return rounds, ends


@contextlib.contextmanager
def _readable(storage: Storage, name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"cannot tell which versions {storage.uri(name)} needs: {error!r}", "repair or delete the run's folder"
        ) from error


def _pin(pins: Pins, snapshot: JsonObject, who: str) -> None:
    versions_of = {
        PAIRS: snapshot["pairs_version"],
        f"{LATENTS}/{snapshot['latents_fingerprint']}/table": snapshot["latents_version"],
        f"{TEXT}/{snapshot['text_fingerprint']}/table": snapshot["text_version"],
    }
    for table, version in versions_of.items():
        names = pins.setdefault(table, {}).setdefault(int(version), [])
        if who not in names:
            names.append(who)


def _needed(storage: Storage, table: str, pins: Iterable[int], told: Iterable[int], newest: datetime) -> set[str]:
    """Return the files of wanted versions, the shards that these reference, and the files of versions in `told`."""
    history = versions(storage.child(table))
    if not history:
        return set()
    current = history[-1].number
    wanted = {current, *pins, *_recent(history, newest)}
    needed: set[str] = set()
    rows_alone: set[str] = set()
    for number, files in files_of(history, wanted | set(told)):
        found = {f"{table}/{file}" for file in files}
        if number not in wanted:
            rows_alone |= found
            continue
        if number == current and (missing := found - set(storage.names(table))):
            raise StorageError(
                f"{len(missing):,} of {len(found):,} files of version {number} of the table {storage.uri(table)} are "
                f"missing, such as {min(missing)}",
                "restore them from a copy; until then gc deletes nothing",
            )
        needed |= found
    present = sorted(file for file in needed if storage.exists(file))
    return needed | rows_alone | _shards_in(storage, present)


def _recent(history: list[Version], newest: datetime) -> Iterator[int]:
    """Yield the versions that were the newest at some moment after `newest`."""
    for version, successor in pairwise(history):
        if successor.time > newest:
            yield version.number


def _shards_in(storage: Storage, files: list[str]) -> set[str]:
    filesystem = PyFileSystem(FSSpecHandler(storage.fs))

    def shards(file: str) -> list[str]:
        rows = ds.dataset(storage.path(file), filesystem=filesystem, format="parquet")
        if "shard" not in rows.schema.names:  # scores point to nothing
            return []
        return list(rows.to_table(["shard"])["shard"].drop_null().unique().to_pylist())

    with ThreadPoolExecutor(READERS) as readers:
        return {shard for found in readers.map(shards, files) for shard in found}


def _is_ours(name: str) -> bool:
    """Return whether an object is of a kind that rows reference; others are not mapo's to delete."""
    folder, _, file = name.rpartition("/")
    if UNFINISHED.fullmatch(file):
        return True
    return f"/{LOG}" not in folder and file.endswith((".tar", ".parquet"))


def stored_objects(storage: Storage) -> list[StoredObject]:
    """List every object below the data set's folder, including unfinished ones, by name."""
    prefix = storage.path().rstrip("/") + "/"
    try:
        found: dict[str, JsonObject] = storage.fs.find(storage.path(DATASET), detail=True)
    except OSError as error:
        raise StorageError(f"cannot list {storage.uri(DATASET)}: {error}", "check the path and credentials") from error
    objects = [
        StoredObject(path.removeprefix(prefix), int(info["size"] or 0), _modified(info)) for path, info in found.items()
    ]
    return sorted(objects, key=lambda each: each.name)


def _info(storage: Storage, name: str) -> JsonObject | None:
    try:
        return dict(storage.fs.info(storage.path(name)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot look up {storage.uri(name)}: {error}", "run it again") from error


def _modified(info: JsonObject) -> float:
    value = next((info[name] for name in TIMES if info.get(name) is not None), None)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(value) if value is not None else time.time()  # of unknown age: never old enough
