"""`mapo ingest`, `encode`, `train`, `export`, `evaluate`, ...: bring one stage of a run up to date."""

import argparse
from collections.abc import Callable

from orchestration.commands.options import CONFIGURED, Command, load, say
from orchestration.stages.registry import REPORT, STAGES


def _stage(name: str) -> Callable[[argparse.Namespace], None]:
    def run(options: argparse.Namespace) -> None:
        from orchestration import api

        api.stage(name, load(options), say=say, takes_signals=True)

    return run


COMMANDS = tuple(
    Command(stage.name, stage.help, _stage(stage.name), CONFIGURED)
    for stage in STAGES.values()
    if stage.name != REPORT  # its command works at any time, on whatever there is
)
