"""`mapo lineage`: trace an exported model back to its rounds and source rows."""

import argparse
from typing import Any

from orchestration.commands.options import JSON, Command, Option, place, say, say_json

MAX_SOURCES = 20  # shown on a terminal


def _lineage(options: argparse.Namespace) -> None:
    from orchestration.rounds.record import describe_lineage

    told = describe_lineage(options.model, storage=options.storage, rows=options.rows, pair=options.pair)
    if options.json:
        say_json(told)
    else:
        say(lineage_text(told))


def lineage_text(told: dict[str, Any]) -> str:
    """Describe a lineage for a terminal."""
    lineage = told["lineage"]
    if told["pairs"] is not None:
        return "\n".join(_pair_lines(told["pairs"]))
    lines = [
        f"{lineage['run']}, round {lineage['round']} · {told['model']}",
        f"{'weights':<11} {lineage['weights']}, {lineage['checkpoint']}",
        f"{'base':<11} {lineage['base']['model']}, digest {lineage['base']['digest']}",
        f"{'data set':<11} {lineage['storage']}, version {lineage['snapshot']['pairs_version']}",
    ]
    counts = (told["trained_on"] or {}).get("rounds", {})
    lines += [_round_line(each, counts.get(str(each["round"]))) for each in lineage["rounds"]]
    if told["trained_on"] is not None:
        total = told["trained_on"]
        removed = f", {total['removed']:,} of them removed since" if total["removed"] else ""
        lines.append(f"{'trained on':<11} {total['pairs']:,} pairs{removed}")
    sources = told["sources"] or []
    lines += [_source_line(each) for each in sources[:MAX_SOURCES]]
    if len(sources) > MAX_SOURCES:
        lines.append(f"{len(sources) - MAX_SOURCES:,} more sources; `--json` lists all")
    return "\n".join([*lines, *(f"note: {note}" for note in told["notes"])])


def _round_line(record: dict[str, Any], counts: dict[str, int] | None) -> str:
    name = f"round {record['round']}"
    if record.get("is_lost"):
        return f"{name:<11} key {record['key']}: its record is missing"
    start = "the base" if record["parent"] is None else f"round {record['parent']['round']}"
    size = record["order"]["global_batch_size"]
    line = f"{name:<11} {record['finished_at']}  key {record['key']}  from {start}, version "
    line += f"{record['snapshot']['pairs_version']}, {record['step']:,} of {record['steps']:,} steps of {size:,} pairs"
    if counts is not None:
        line += f": saw {counts['trained_on']:,} of the {counts['pairs']:,} pairs of the snapshot"
        line += f", {counts['first_time']:,} for the first time" if counts["first_time"] < counts["trained_on"] else ""
    return line


def _source_line(source: dict[str, Any]) -> str:
    splits = [
        f"{split} {', '.join(f'{count:,} {status}' for status, count in sorted(statuses.items()))}"
        for split, statuses in sorted(source["rows"].items())
    ]
    read = sum(count for statuses in source["rows"].values() for count in statuses.values())
    line = f"  {source['uri']} ({source['source']}): {source['trained_on']:,} trained on of {read:,} rows read"
    line += f"; {'; '.join(splits)}" if splits else ""
    return line + (f"; {source['removed']:,} trained on and removed since" if source["removed"] else "")


def _pair_lines(pairs: list[dict[str, Any]]) -> list[str]:
    if not pairs:
        return ["no such pair in any snapshot of this model or in the current data set"]
    lines = []
    for pair in pairs:
        trained = [str(each["round"]) for each in pair["rounds"] if each["trained_on"]]
        verdict = f"trained on in round {', '.join(trained)}" if trained else "not trained on"
        lines.append(f"{pair['pair_key']}  {verdict}{'; removed since' if pair['removed'] else ''}")
        lines += [_line_of_round(each) for each in pair["rounds"]]
        lines += [f"  now  {row['source_uri']}#{row['source_row']}  {row['status']}" for row in pair["rows"]]
    return lines


def _line_of_round(found: dict[str, Any]) -> str:
    """Describe whether one round trained on a pair."""
    what = "in the snapshot, not reached" if found["in_snapshot"] else "not among the snapshot's training pairs"
    if found["trained_on"]:
        what = "trained on"
    row = ", ".join(str(found[name]) for name in ("status", "reason", "split") if found[name] is not None)
    return f"  round {found['round']}  {what}{f' ({row})' if row else ''}"


COMMANDS = (
    Command(
        "lineage",
        "show what a model was trained on: its rounds, their snapshots, and the source rows",
        _lineage,
        (
            Option("MODEL", "folder of an exported model, path or fsspec URL", type=place),
            Option("--storage", "URL of the data set, if it has moved since the training", metavar="URL", type=place),
            JSON,
            Option(
                "--rows",
                "write one row per pair that the model was trained on: new parquet file, path or URL",
                metavar="FILE",
                type=place,
            ),
            Option(
                "--pair", "tell whether the model was trained on it: a pair_key, or a row as URI#ROW", metavar="KEY"
            ),
        ),
    ),
)
