"""`mapo demo`: the whole run on photos that come with the package."""

import argparse

from orchestration.commands.options import OVERRIDE, Command, Option, say


def _demo(options: argparse.Namespace) -> None:
    from orchestration.demo.run import run_demo

    run_demo(options.dir, options.overrides, say)


COMMANDS = (
    Command(
        "demo",
        "run all stages on a small embedded data set; needs no GPU and no network",
        _demo,
        (Option("DIR", "where to work", default="runs/demo"), OVERRIDE),
    ),
)
