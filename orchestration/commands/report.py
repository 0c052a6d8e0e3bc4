"""`mapo report`: write a run's page and the index of runs."""

import argparse

from orchestration.commands.options import CONFIGURED, Command, load, say


def _report(options: argparse.Namespace) -> None:
    from orchestration.report.writer import report_now

    report_now(load(options), config_file=options.config, say=say)


COMMANDS = (
    Command("report", "write the run's page and the index of runs, from their current state", _report, CONFIGURED),
)
