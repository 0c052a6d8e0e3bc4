"""`mapo data`: describe a data set, verify it, remove rows, reclaim space, export it."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta

from orchestration.commands.options import JSON, Command, Option, parse_duration, place, say, say_json

SHORTEST_GRACE = timedelta(hours=1)


@contextlib.contextmanager
def _cluster() -> Iterator[bool]:
    """Connect to the cluster of RAY_ADDRESS, and yield whether there is one; start none."""
    if not os.environ.get("RAY_ADDRESS"):
        yield False
        return
    from orchestration.cluster.connect import attached

    with attached():
        yield True


def _show(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.accounting import as_text
    from pipelines.maintenance.describe import describe_dataset

    described = describe_dataset(Storage(options.storage))
    if options.json:
        say_json(described.to_json())
    else:
        say(as_text(described))


def _verify(options: argparse.Namespace) -> None:
    from pipelines.dataset.errors import ShardCorrupt
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.verify import committed_shards, verify

    storage = Storage(options.storage)
    shards = committed_shards(storage)
    with _cluster() as on_cluster:
        differences = verify(storage, shards, on_cluster=on_cluster)
    for line in differences:
        say(line)
    if differences:
        raise ShardCorrupt(
            f"{len(differences):,} difference{'s' if len(differences) > 1 else ''} "
            f"in the {len(shards):,} shards of {storage.url}",
            "restore these objects from a copy; ingesting the same sources with the same settings into an empty "
            "storage writes the same bytes again",
        )
    say(f"{len(shards):,} shards, {sum(shard.num_bytes for shard in shards):,} bytes: all match their digests")


def _remove(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.remove import parse_condition, remove

    conditions = [parse_condition(text) for text in options.where]
    removed = remove(Storage(options.storage), conditions, dry_run=options.dry_run)
    verb = "would be removed" if options.dry_run else "removed"
    parts = ", ".join(f"{count:,} {status}" for status, count in sorted(removed.rows.items()))
    what = f"{removed.num_pairs:,} pairs" + (f", {removed.num_singles:,} single images" if removed.num_singles else "")
    say(f"{removed.num_rows:,} rows of {what} {verb}" + (f": {parts}" if parts else ""))
    if removed.num_rows and not options.dry_run:
        say("run `mapo data compact` and, after the grace period, `mapo data gc` to free their bytes")


def _compact(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.compact import compact

    with _cluster() as on_cluster:
        for done in compact(Storage(options.storage), on_cluster=on_cluster):
            line = f"{done.what}: {done.num_rewritten:,} shards rewritten"
            line += f", {done.bytes_before:,} → {done.bytes_after:,} bytes" if done.num_rewritten else ""
            line += f", {done.rows_deleted:,} rows deleted" if done.rows_deleted else ""
            say(f"{line}; {done.files_before:,} → {done.files_after:,} files of the table")
    say("run `mapo data gc` after the grace period to delete the objects that were replaced")


def _gc(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.gc import delete_garbage, find_garbage

    grace, storage = grace_period(options.grace, options.force), Storage(options.storage)
    garbage = find_garbage(storage, grace)
    deleted = garbage if options.dry_run else delete_garbage(storage, garbage)
    num_objects = num_bytes = 0
    for each in deleted:
        num_objects, num_bytes = num_objects + 1, num_bytes + each.num_bytes
        say(f"{each.name}  {each.num_bytes:,}")
    say(f"{num_objects:,} objects, {num_bytes:,} bytes {'would be deleted' if options.dry_run else 'deleted'}")


def grace_period(text: str, force: bool = False) -> timedelta:
    """Parse `--grace`.

    Raises:
        ConfigError: It is not a duration, or too short for running writers.
    """
    from pipelines.dataset.errors import ConfigError

    grace = parse_duration(text, "--grace")
    if grace < SHORTEST_GRACE and not force:
        raise ConfigError(
            f"--grace {text} is below 1h: a running ingest has shards on the storage that are not committed yet",
            "wait, or add `--force` if nothing else uses this storage",
        )
    return grace


def _history(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.history import as_text, history

    entries = history(Storage(options.storage), max(0, options.limit) or None)
    if options.json:
        say_json([asdict(entry) for entry in entries])
    else:
        say(as_text(entries))


def _export(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.export import export_parquet

    done = export_parquet(Storage(options.storage), options.parquet, images=options.images)
    what = f"{done.num_pairs:,} pairs" + (f", {done.num_singles:,} single images" if done.num_singles else "")
    say(f"{what} in {done.num_files:,} files, {done.num_bytes:,} bytes: {options.parquet}")


STORAGE = Option("STORAGE", "path or fsspec URL", type=place)
COMMANDS = (
    Command("data show", "show the snapshot, rows by status, shards and bytes", _show, (STORAGE, JSON)),
    Command("data verify", "check every committed byte against its digest", _verify, (STORAGE,)),
    Command(
        "data remove",
        "remove pairs or single images, with all their rows; `compact` and `gc` then free their bytes",
        _remove,
        (
            STORAGE,
            Option(
                "--where",
                "key=HEX, prompt=TEXT, prompt~REGEX, user=ID, source=FORMAT or source=URI; a row must meet all",
                metavar="CONDITION",
                is_required=True,
                is_repeated=True,
            ),
            Option("--dry-run", "only count"),
        ),
    ),
    Command(
        "data compact",
        "rewrite shards without the bytes that no row references, and merge the tables' small files",
        _compact,
        (STORAGE,),
    ),
    Command(
        "data gc",
        "delete objects that no live version references",
        _gc,
        (
            STORAGE,
            Option(
                "--grace",
                "keep objects younger than this, and versions that were in use since: 90m, 12h, 7d",
                metavar="TIME",
                default="7d",
            ),
            Option("--force", "allow a grace period below 1h; nothing else may be using the storage"),
            Option("--dry-run", "only list"),
        ),
    ),
    Command(
        "data history",
        "list versions of the table: when, what, which units, which runs need it",
        _history,
        (
            STORAGE,
            Option("--limit", "how many of the newest to list, 0 for all", metavar="N", type=int, default=20),
            JSON,
        ),
    ),
    Command(
        "data export",
        "export the kept pairs and single images as plain parquet",
        _export,
        (
            STORAGE,
            Option(
                "--parquet",
                "new file (.parquet) or folder, path or fsspec URL",
                metavar="TARGET",
                type=place,
                is_required=True,
            ),
            Option("--images", "with image bytes, as a Pick-a-Pic source; single images as a `judged` source"),
        ),
    ),
)
