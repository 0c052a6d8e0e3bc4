"""`mapo data`: look at a data set, check it, take rows out, tidy it up."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta

from orchestration.commands.options import parse_duration

SHORTEST_GRACE = timedelta(hours=1)

NewCommand = Callable[[str, str, Callable[[argparse.Namespace], None]], argparse.ArgumentParser]


def add_data_commands(new: NewCommand) -> None:
    """Add every command below `mapo data`; each takes the storage first."""

    def command(name: str, text: str, action: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = new(name, text, action)
        added.add_argument("storage", metavar="STORAGE", help="path or fsspec URL")
        return added

    show = command("show", "snapshot, rows by status, shards, bytes", _show)
    show.add_argument("--json", action="store_true", help="as JSON")
    command("verify", "every committed byte against its digest", _verify)
    remove = command("remove", "take pairs out, with all their rows; the bytes go with `compact` and `gc`", _remove)
    remove.add_argument(
        "--where", action="append", required=True, metavar="CONDITION",
        help="key=HEX, prompt=TEXT, prompt~REGEX, user=ID, source=FORMAT or source=URI; all must hold",
    )  # fmt: skip
    remove.add_argument("--dry-run", action="store_true", help="count only")
    command("compact", "rewrite shards without what no row points to, and merge the tables' small files", _compact)
    gc = command("gc", "delete what no version in use points to", _gc)
    gc.add_argument(
        "--grace", default="7d", metavar="TIME",
        help="keep what is younger, and versions that were in use since: 90m, 12h, 7d (default: %(default)s)",
    )  # fmt: skip
    gc.add_argument("--force", action="store_true", help="allow a grace period below 1h: nothing else may be running")
    gc.add_argument("--dry-run", action="store_true", help="list only")
    history = command("history", "versions of the table: when, what, which units, which runs need it", _history)
    history.add_argument(
        "--limit", type=int, default=20, metavar="N", help="so many of the newest, 0 for all (default: %(default)s)"
    )
    history.add_argument("--json", action="store_true", help="as JSON")
    export = command("export", "the kept pairs as plain parquet", _export)
    export.add_argument(
        "--parquet", required=True, metavar="TARGET", help="new file (.parquet) or folder, path or fsspec URL"
    )
    export.add_argument("--images", action="store_true", help="with image bytes, as a Pick-a-Pic source")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _cluster() -> Iterator[bool]:
    """Whether there is a cluster to work on: the one of RAY_ADDRESS. None is started."""
    if not os.environ.get("RAY_ADDRESS"):
        yield False
        return
    from orchestration.cluster.connect import attached

    with attached():
        yield True


def _show(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.describe import as_text, describe_dataset

    described = describe_dataset(Storage(options.storage))
    _say(json.dumps(described, indent=2) if options.json else as_text(described))


def _verify(options: argparse.Namespace) -> None:
    from pipelines.dataset.errors import ShardCorrupt
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.verify import committed_shards, verify

    storage = Storage(options.storage)
    shards = committed_shards(storage)
    with _cluster() as on_cluster:
        differences = verify(storage, shards, on_cluster=on_cluster)
    for line in differences:
        _say(line)
    if differences:
        raise ShardCorrupt(
            f"{len(differences):,} difference{'s' if len(differences) > 1 else ''} "
            f"in the {len(shards):,} shards of {storage.url}",
            "put these objects back from a copy; the bytes of a pair shard follow from its source file and the "
            "settings, so that an ingest into an empty storage makes the same ones",
        )
    _say(f"{len(shards):,} shards, {sum(shard.num_bytes for shard in shards):,} bytes: all as committed")


def _remove(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.remove import parse_condition, remove

    conditions = [parse_condition(text) for text in options.where]
    removed = remove(Storage(options.storage), conditions, dry_run=options.dry_run)
    verb = "would be removed" if options.dry_run else "removed"
    parts = ", ".join(f"{count:,} {status}" for status, count in sorted(removed.rows.items()))
    _say(f"{removed.num_rows:,} rows of {removed.num_pairs:,} pairs {verb}" + (f": {parts}" if parts else ""))
    if removed.num_rows and not options.dry_run:
        _say("their bytes stay on the storage until `mapo data compact` and, after the grace period, `mapo data gc`")


def _compact(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.compact import compact

    with _cluster() as on_cluster:
        for done in compact(Storage(options.storage), on_cluster=on_cluster):
            line = f"{done.what}: {done.num_rewritten:,} shards rewritten"
            line += f", {done.bytes_before:,} → {done.bytes_after:,} bytes" if done.num_rewritten else ""
            line += f", {done.rows_deleted:,} rows deleted" if done.rows_deleted else ""
            _say(f"{line}; {done.files_before:,} → {done.files_after:,} files of the table")
    _say("what was replaced stays until `mapo data gc`, after the grace period")


def _gc(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.gc import delete_garbage, find_garbage

    grace, storage = grace_period(options.grace, options.force), Storage(options.storage)
    garbage = find_garbage(storage, grace)
    deleted = garbage if options.dry_run else delete_garbage(storage, garbage)
    num_objects = num_bytes = 0
    for each in deleted:
        num_objects, num_bytes = num_objects + 1, num_bytes + each.num_bytes
        _say(f"{each.name}  {each.num_bytes:,}")
    _say(f"{num_objects:,} objects, {num_bytes:,} bytes {'would be deleted' if options.dry_run else 'deleted'}")


def grace_period(text: str, force: bool = False) -> timedelta:
    """A `--grace` of the command line.

    Raises:
        ConfigError: It is no time, or too short for writers that are at work.
    """
    from pipelines.dataset.errors import ConfigError

    grace = parse_duration(text, "--grace")
    if grace < SHORTEST_GRACE and not force:
        raise ConfigError(
            f"--grace {text} is below 1h: an ingest that runs has shards on the storage that it has not committed yet",
            "wait, or add `--force` if nothing else uses this storage",
        )
    return grace


def _history(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.history import as_text, history

    entries = history(Storage(options.storage), max(0, options.limit) or None)
    _say(json.dumps([asdict(entry) for entry in entries], indent=2) if options.json else as_text(entries))


def _export(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.maintenance.export import export_parquet

    done = export_parquet(Storage(options.storage), options.parquet, images=options.images)
    _say(f"{done.num_pairs:,} pairs in {done.num_files:,} files, {done.num_bytes:,} bytes: {options.parquet}")
