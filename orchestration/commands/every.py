"""`mapo run --every`: the same run again and again, for those who have no scheduler of their own."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from orchestration.cluster.signals import Interruption
from orchestration.commands.options import parse_duration
from orchestration.config import RunConfig
from orchestration.driver.runner import MAX_MESSAGE, run_all
from orchestration.run.context import Say
from pipelines.dataset.errors import ClusterError, ConfigError

SHORTEST = timedelta(seconds=1)


def run_every(text: str, load: Callable[[], RunConfig], say: Say) -> None:
    """Run, wait until so much time after the start of that run, and run again; ends only by being stopped.

    The configuration is read anew for each run. A run that failed is told and tried again at the next time; a
    wrong configuration ends it.

    Args:
        text: The time between two starts, as `--every` has it.
        load: Reads the configuration.
        say: Where lines go.

    Raises:
        ConfigError: The time or the configuration is wrong.
        ClusterError: The cluster's head is lost, and Ray with it.
        Stopped: It was told to stop.
    """
    every = parse_duration(text, "--every")
    if every < SHORTEST:
        raise ConfigError(f"--every {text}: too short", "6h looks for new preferences four times a day")
    while True:
        started = time.monotonic()
        try:
            run_all(load(), say)
        except ConfigError:
            raise
        except Exception as error:  # whatever it is
            if isinstance(error, ClusterError) and error.ends_process:
                raise
            say(f"{type(error).__name__}: {error}"[:MAX_MESSAGE])
        left_s = every.total_seconds() - (time.monotonic() - started)
        if left_s > 0:
            due = datetime.now(UTC) + timedelta(seconds=left_s)
            say(f"next run at {due:%Y-%m-%dT%H:%M:%SZ}")
            with Interruption().armed():
                time.sleep(left_s)
