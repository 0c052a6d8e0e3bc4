"""`mapo stop`: stop a run cleanly."""

import argparse

from orchestration.commands.logs import connect
from orchestration.commands.options import CONFIGURED, Command, Option, parse_duration, say


def _stop(options: argparse.Namespace) -> None:
    from orchestration.config import load_config
    from orchestration.jobs.stop import stop_run

    timeout = parse_duration(options.timeout, "--timeout")
    config = load_config(options.config, options.overrides)
    jobs = connect(options.address) if options.address else None
    stop_run(config, jobs, timeout_s=timeout.total_seconds(), say=say)


COMMANDS = (
    Command(
        "stop",
        "stop a run cleanly, so that it can be resumed",
        _stop,
        (
            *CONFIGURED,
            Option("--address", "let Ray end the run's job here if the run does not stop by itself", metavar="URL"),
            Option(
                "--timeout",
                "how long the run may take to stop, including a last checkpoint: 90s, 5m, 1h",
                metavar="TIME",
                default="5m",
            ),
        ),
    ),
)
