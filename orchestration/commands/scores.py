"""`mapo scores`: bring scores that another environment made."""

import argparse
from pathlib import Path

from orchestration.commands.options import Command, Option, place, say


def _import(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.scores.foreign import read_foreign
    from pipelines.scores.imported import foreign_judge
    from pipelines.scores.imports import import_scores

    file = read_foreign(Path(options.file).expanduser())
    scorer, fingerprint = file.named(options.scorer, options.fingerprint)
    judge = foreign_judge(
        scorer, fingerprint, scale=options.scale, higher_is_better=not options.lower_is_better, licence=options.licence,
        description=options.description,
    )  # fmt: skip
    done = import_scores(file, Storage(options.storage), judge)
    failed = f", {done.num_failed:,} of them failed" if done.num_failed else ""
    say(f"{judge.name}@{judge.fingerprint}: {done.num_new:,} new scores{failed}; {done.num_known:,} were there")


COMMANDS = (
    Command(
        "scores import",
        "check scores that another environment made, and add those that are not there",
        _import,
        (
            Option("FILE", "scores as .parquet or .jsonl, with the columns of a table of scores"),
            Option("STORAGE", "the storage of the scored images", type=place),
            Option("--scorer", "the scorer's name, unless a column says it", "NAME"),
            Option("--fingerprint", "what shaped the scores: code, weights, versions; unless a column says it", "TEXT"),
            Option("--scale", "unit and usual range of the scores", "TEXT", default=""),
            Option("--lower-is-better", "a lower score is better"),
            Option("--licence", "licence of the scorer's weights", "TEXT", default="not stated"),
            Option("--description", "what the scorer measures", "TEXT", default=""),
        ),
    ),
)
