"""An ingest that is killed at a seeded point and started again; for tests/pipelines/test_crash.py.

Each run has a Ray of its own. Killed is the driver, a worker or the raylet, at a commit or when so many shards are
there, whole or half written.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.config import IngestConfig
from pipelines.dataset.layout import SHARDS
from pipelines.dataset.storage import Storage

DEADLINE_S = 120
VICTIMS = ("driver before a commit", "driver after a commit", "driver", "worker", "raylet")

DRIVER = """
import os, signal, sys
import ray
from pipelines.config import IngestConfig
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.ingest import ingest

config, storage = IngestConfig.model_validate_json(sys.argv[1]), Storage(sys.argv[2])
victim, commits = sys.argv[3], int(sys.argv[4])
commit, done = Table._commit, []

def killed_beside_a_commit(table, unit, *more, **options):
    if victim == "driver before a commit" and len(done) == commits:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(table, unit, *more, **options)
    done.append(unit)
    if victim == "driver after a commit" and len(done) > commits:
        os.kill(os.getpid(), signal.SIGKILL)

Table._commit = killed_beside_a_commit
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         object_store_memory=100 << 20)
print("ready", flush=True)
ingest(config, storage)
ray.shutdown()
os._exit(0)
"""


@dataclass(frozen=True)
class Kill:
    """What is killed, and when.

    Args:
        victim: One of `VICTIMS`.
        moment: Commits that are done, or shards that are there.
        delay_s: After that moment.
    """

    victim: str
    moment: int
    delay_s: float

    @staticmethod
    def of(seed: int, num_units: int) -> "Kill":
        """The kill of a seed; five seeds after each other have every victim once."""
        chance, victim = random.Random(seed), VICTIMS[seed % len(VICTIMS)]
        moment, delay_s = chance.randrange(num_units), chance.random() * 0.02
        if "commit" not in victim:
            moment = min(moment, num_units - 4)  # with its last shards it may end before it is killed
        return Kill(victim, moment, delay_s)


def run_to_the_end(config: IngestConfig, storage: Storage, environment: dict[str, str]) -> None:
    """An ingest that nobody disturbs."""
    with _Driver(config, storage, Kill("nobody", 0, 0.0), environment) as driver:
        assert driver.process.wait(DEADLINE_S) == 0


def run_killed(config: IngestConfig, storage: Storage, kill: Kill, environment: dict[str, str]) -> int:
    """An ingest that is killed; its exit code: a lost worker is made good by Ray, all else ends it."""
    with _Driver(config, storage, kill, environment) as driver:
        if kill.victim in ("driver", "worker", "raylet"):
            folder = Path(storage.path()) / SHARDS if storage.is_local else None
            count = (lambda: len(list(folder.glob("*")))) if folder else (lambda: len(storage.names(SHARDS)))
            driver.wait_until(lambda: count() > kill.moment)
            time.sleep(kill.delay_s)
            driver.kill(kill.victim)
        return driver.process.wait(DEADLINE_S)


class _Driver:
    """A driver with the Ray that it started; all of it is gone afterwards."""

    def __init__(self, config: IngestConfig, storage: Storage, kill: Kill, environment: dict[str, str]) -> None:
        arguments = [config.model_dump_json(), storage.url, kill.victim, str(kill.moment)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **environment},
        )  # fmt: skip

    def __enter__(self) -> "_Driver":
        assert self.process.stdout
        assert self.process.stdout.readline() == b"ready\n"
        self._family = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Until it is so, or the driver has ended."""
        while self.process.poll() is None and not is_so():
            time.sleep(0.002)

    def kill(self, victim: str) -> None:
        """SIGKILL; nothing if there is none of them any more."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self._family += family
            if victim == "driver":
                self.process.kill()
                return
            named = {each.pid: " ".join(each.cmdline()[:1]) for each in family}
            wanted = "raylet" if victim == "raylet" else "ray::"
            for pid in [pid for pid, name in named.items() if wanted in name.rsplit("/", 1)[-1]][:1]:
                os.kill(pid, signal.SIGKILL)
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()
        for each in self._family:
            if each.is_running():  # by pid and start time: never somebody else's
                each.kill()
        psutil.wait_procs(self._family, timeout=10)
