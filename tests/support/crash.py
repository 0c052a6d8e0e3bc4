"""A stage that is killed at a seeded point and started again; for the crash matrices of ingest, encode and scores.

Each run has a Ray of its own. Killed is the driver, a worker, an actor or a node, at a commit or when so many shards
(of scores, commits) are there, whole or half written.
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

from pipelines.dataset.storage import Storage

DEADLINE_S = 400
NUM_NODES, CPUS_A_NODE = 2, 2  # beside the head
INGEST_VICTIMS = ("driver before a commit", "driver after a commit", "driver", "worker", "raylet")
ENCODE_VICTIMS = ("driver before a commit", "driver after a commit", "driver", "actor", "node")
SURVIVED = ("worker", "actor", "node")
"""Their loss is made good by Ray; all else ends the run."""

COMMITS = """
import logging, os, signal, sys
import ray
from pipelines.config import EncodeConfig, IngestConfig
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.encode.execution import encode
from pipelines.ingest.execution import ingest

victim, commits, watched = sys.argv[3], int(sys.argv[4]), sys.argv[5]
commit, done = Table._commit, []

def killed_beside_a_commit(table, unit, *more, **options):
    if not watched in table.uri:
        return commit(table, unit, *more, **options)
    if victim == "driver before a commit" and len(done) == commits:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(table, unit, *more, **options)
    done.append(unit)
    if victim == "driver after a commit" and len(done) > commits:
        os.kill(os.getpid(), signal.SIGKILL)

Table._commit = killed_beside_a_commit
"""
INGEST = (
    COMMITS
    + """
config, storage = IngestConfig.model_validate_json(sys.argv[1]), Storage(sys.argv[2])
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         object_store_memory=100 << 20)
print("ready", flush=True)
ingest(config, storage)
ray.shutdown()
os._exit(0)
"""
)
CLUSTER = (
    f"nodes = {[CPUS_A_NODE] * NUM_NODES}"
    + """
from ray.cluster_utils import Cluster

quick = {"health_check_period_ms": 500, "health_check_timeout_ms": 500, "health_check_failure_threshold": 3,
         "health_check_initial_delay_ms": 0}
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20, "_system_config": quick})
for num_cpus in nodes:  # one may be lost
    cluster.add_node(num_cpus=num_cpus, object_store_memory=100 << 20)
ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
print("ready", flush=True)
"""
)
ENCODE = (
    COMMITS
    + """
config, storage = EncodeConfig.model_validate_json(sys.argv[1]), Storage(sys.argv[2])
"""
    + CLUSTER
    + """
encode(config, storage)
os._exit(0)
"""
)
SCORE = (
    COMMITS
    + """
import json
import pyarrow.parquet as pq
from pipelines.config import ScorerEntry
from pipelines.scores import plan
from pipelines.scores.execution import score
from pipelines.scores.judges import prepare_judges
from pipelines.units.workers import Workers

given, storage = json.loads(sys.argv[1]), Storage(sys.argv[2])
plan.IMAGES_A_UNIT = given["images_a_unit"]
entries = [ScorerEntry.model_validate(each) for each in given["scorers"]]
"""
    + CLUSTER
    + """
judges = prepare_judges(entries, storage)
score(storage, judges, pq.read_table(given["images"]), Workers("evaluate", num_workers=2, device="cpu"))
os._exit(0)
"""
)


@dataclass(frozen=True)
class Job:
    """What runs: a driver's code, its configuration as JSON, and the folder of the shards that it writes."""

    code: str
    config: str
    folder: str
    table: str
    """The end of the URI of the table whose commits count."""
    pattern: str = "*.tar*"
    """Of the files in the folder, whole or half written, that count."""


@dataclass(frozen=True)
class Kill:
    """What is killed, and when.

    Args:
        victim: What is killed.
        moment: Commits that are done, or shards that are there.
        delay_s: After that moment.
    """

    victim: str
    moment: int
    delay_s: float

    @staticmethod
    def of(seed: int, num_units: int, victims: tuple[str, ...]) -> "Kill":
        """The kill of a seed; as many seeds after each other as there are victims have each of them once."""
        chance, victim = random.Random(seed), victims[seed % len(victims)]
        moment, delay_s = chance.randrange(num_units), chance.random() * 0.02
        if "commit" not in victim:
            moment = min(moment, num_units - 4)  # with its last shards it may end before it is killed
        return Kill(victim, moment, delay_s)


def run_to_the_end(job: Job, storage: Storage, environment: dict[str, str]) -> None:
    """A run that nobody disturbs."""
    with _Driver(job, storage, Kill("nobody", 0, 0.0), environment) as driver:
        assert driver.process.wait(DEADLINE_S) == 0


def run_killed(job: Job, storage: Storage, kill: Kill, environment: dict[str, str]) -> int:
    """A run that is killed, or loses a part of itself; its exit code."""
    with _Driver(job, storage, kill, environment) as driver:
        if "commit" not in kill.victim:
            folder = Path(storage.path()) / job.folder if storage.is_local else None
            count = (
                (lambda: len(list(folder.glob(job.pattern)))) if folder else (lambda: len(storage.names(job.folder)))
            )
            driver.wait_until(lambda: count() > kill.moment)
            time.sleep(kill.delay_s)
            driver.kill(kill.victim)
        return driver.process.wait(DEADLINE_S)


class _Driver:
    """A driver with the Ray that it started; all of it is gone afterwards."""

    def __init__(self, job: Job, storage: Storage, kill: Kill, environment: dict[str, str]) -> None:
        arguments = [job.config, storage.url, kill.victim, str(kill.moment), job.table]
        self.process = subprocess.Popen(
            [sys.executable, "-c", job.code, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **environment},
        )  # fmt: skip

    def __enter__(self) -> "_Driver":
        assert self.process.stdout
        self._family: list[psutil.Process] = []
        if self.process.stdout.readline() != b"ready\n":
            self.__exit__()
            raise AssertionError("the driver did not start")
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
            family.sort(key=psutil.Process.create_time)
            names = {each.pid: " ".join(each.cmdline()[:1]).rsplit("/", 1)[-1] for each in family}
            wanted = {"worker": "ray::", "actor": "ray::MapWorker"}.get(victim, "raylet")
            found = [pid for pid, name in names.items() if wanted in name]
            for pid in found[-1:] if victim == "node" else found[:1]:  # the first node is the head
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
