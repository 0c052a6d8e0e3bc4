"""`mapo run --every`: repeat a run at an interval, where there is no scheduler."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from orchestration import api
from orchestration.cluster.signals import Interruption
from orchestration.commands.options import parse_duration
from orchestration.config import RunConfig
from orchestration.driver.runner import MAX_MESSAGE
from orchestration.run.context import Say
from pipelines.dataset.errors import ClusterError, ConfigError

SHORTEST = timedelta(seconds=1)


def run_every(text: str, load: Callable[[], RunConfig], say: Say) -> None:
    """Run at an interval until stopped.

    The configuration is read again for each run. A failed run is reported and retried at the next time; a wrong
    configuration ends the loop.

    Args:
        text: The time between two starts, as given to `--every`.
        load: Reads the configuration.
        say: Shows a line to the user.

    Raises:
        ConfigError: The time or the configuration is wrong.
        ClusterError: The cluster's head is lost, and Ray with it.
        Stopped: The run was asked to stop.
    """
    every = parse_duration(text, "--every")
    if every < SHORTEST:
        raise ConfigError(f"--every {text}: too short", "give at least 1s, for example 6h")
    while True:
        started = time.monotonic()
        try:
            api.run(load(), say=say, takes_signals=True)
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
