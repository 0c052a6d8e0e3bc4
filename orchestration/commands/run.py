"""`mapo run`: bring every stage of a run up to date, once or again and again."""

import argparse
from typing import TYPE_CHECKING

from orchestration.commands.options import CONFIGURED, EXIT_FAILED, Command, Option, load, say, say_json
from pipelines.dataset.errors import ConfigError

if TYPE_CHECKING:
    from orchestration.config import RunConfig


def _run(options: argparse.Namespace) -> int:
    from orchestration import api
    from orchestration.commands.every import run_every

    def load_again() -> "RunConfig":
        return load(options)

    if options.json and not options.dry_run:
        raise ConfigError("--json is for --dry-run", "`mapo status --json` describes a run as JSON")
    if options.dry_run:
        plan = api.plan(load(options))
        if options.json:
            say_json(plan.to_json())
        else:
            say("\n".join(plan.lines()))
        return EXIT_FAILED if plan.is_blocked else 0
    if options.every is None:
        api.run(load(options), say=say, takes_signals=True)
    else:
        run_every(options.every, load_again, say)
    return 0


COMMANDS = (
    Command(
        "run",
        "run all stages; skip what is up to date",
        _run,
        (
            *CONFIGURED,
            Option("--dry-run", "only print the plan: the stages, and the work of each"),
            Option("--json", "with --dry-run: the plan as JSON"),
            Option("--every", "run again and again, with this much time between starts: 90m, 6h, 7d", metavar="TIME"),
        ),
    ),
)
