"""Faults in every stage of a run, at seeded moments, and what must come of them.

A stage runs as the installed command in a process of its own, on a copy of a storage on which the stages before it are
done. A fault comes at a moment of the stage's usual time. Then either the command has ended well, or it has ended with
an error that names the cause; in both cases the same command again ends well, and what the stage has made is what an
undisturbed one makes.
"""

import contextlib
import hashlib
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from command import DEADLINE_S, Command
from factories import photo_pairs, write_parquet
from s3_faults import Fault as S3Fault
from s3_faults import FaultyProxy

from pipelines.dataset.layout import (
    LATENTS,
    SAMPLES,
    TEXT,
    fingerprints,
    latents_table,
    pairs_table,
    samples_table,
    text_table,
)
from pipelines.dataset.storage import PATIENCE, Storage

OUTAGE = (S3Fault.SLOW_DOWN, S3Fault.RESET_UPLOAD, S3Fault.RESET_DOWNLOAD)
STAGES = ("ingest", "encode", "train", "export", "evaluate")
WITH_WORKERS = ("ingest", "encode", "train", "evaluate")
KINDS = {
    "driver killed": STAGES,
    "driver stopped": STAGES,
    "worker killed": WITH_WORKERS,
    "node killed": WITH_WORKERS,
    "head killed": WITH_WORKERS,
    "disk full": STAGES,
    "memory short": WITH_WORKERS,
    "storage away": STAGES,
    "storage gone": STAGES,
}
"""Each kind of fault, and the stages that can meet it: the others have no process of Ray."""
NUM_FAULTS = sum(map(len, KINDS.values()))
NAMED = {
    "driver killed": (),
    "driver stopped": ("stopped by SIGTERM",),
    "worker killed": ("TrainingError", "EncodingError", "ClusterError"),
    "node killed": ("TrainingError", "EncodingError", "ClusterError"),
    "head killed": ("ClusterError",),
    "disk full": ("No space left on device", "no space left"),
    "memory short": ("memory", "Memory"),
    "storage away": ("StorageError",),  # before it has answered once, nobody waits
    "storage gone": ("StorageError",),
}
"""What an ended command says of a fault; one of these."""
AWAY_S = 20.0
PATIENCE_S = 5.0  # of a run whose storage does not come back
NUM_NODES, CPUS_A_NODE = 3, 2  # beside a head without CPUs; training has two workers, so that one node can be lost
QUICK = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        seed: What all else follows from.
        stage: In which stage.
        kind: One of KINDS.
        ratio: Of the stage's usual time, when it comes.
    """

    seed: int
    stage: str
    kind: str
    ratio: float

    @staticmethod
    def of(seed: int) -> "Fault":
        """The fault of a seed: as many seeds after each other as there are pairs of stage and kind have each once."""
        pairs = [(stage, kind) for kind, stages in KINDS.items() for stage in stages]
        chance = random.Random(seed)
        stage, kind = pairs[seed % len(pairs)]
        return Fault(seed, stage, kind, chance.uniform(0.05, 0.95))


class Course:
    """An undisturbed run: a copy of its storage before each stage, how long each took, what each made."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        rows = photo_pairs(48, num_prompts=6, num_damaged=2)
        write_parquet(folder / "data" / "pairs.parquet", rows, row_group_size=8)
        train = {"num_workers": 2, "global_batch_size": 8, "micro_batch_size": 2, "max_steps": 8, "precision": "fp32"}
        train |= {"learning_rate": 1e-4, "checkpoint_every": 2, "validate_every": 4, "max_failures": 3}
        source = {"format": "pickapic", "path": str(folder / "data" / "*.parquet")}
        settings = {
            "name": "small",
            "ingest": {"sources": [source], "validation_ratio": 0.3, "max_drop_ratio": 0.2, "max_shard_bytes": 65536},
            "encode": {"model": str(model), "resolution": 64, "batch_size": 8},
            "train": train,
            "evaluate": {"num_samples": 2, "num_inference_steps": 2, "batch_size": 2},
        }
        storage = folder / "undisturbed"
        self.config = folder / "small.yaml"
        self.config.write_text(yaml.safe_dump(settings | {"storage": str(storage)}))
        storage.mkdir()
        self.seconds: dict[str, float] = {}
        self.made: dict[str, Any] = {}
        for stage in STAGES:
            shutil.copytree(storage, folder / f"before-{stage}")
            started = time.monotonic()
            with self._command(stage, storage) as command:
                assert command.wait() == 0, command.errors
            self.seconds[stage] = time.monotonic() - started
            self.made[stage] = contents(stage, Storage(str(storage)))

    def _command(self, stage: str, storage: Path | str, environment: dict[str, str] | None = None) -> Command:
        return Command(stage, self.config, "-o", f"storage={storage}", environment=environment)

    def suffer(self, fault: Fault, place: Path) -> tuple[int, str]:
        """Let a stage meet a fault on this disk; its exit code and what it said."""
        shutil.copytree(self.folder / f"before-{fault.stage}", place, dirs_exist_ok=True)
        environment = {"RAY_memory_usage_threshold": "0.01"} if fault.kind == "memory short" else {}
        with contextlib.ExitStack() as around:
            nodes: Nodes | None = None
            if fault.kind == "disk full":
                around.enter_context(filled(place, fault))
            elif fault.kind in ("node killed", "head killed"):
                nodes = around.enter_context(Nodes())
                environment = {"RAY_ADDRESS": nodes.address}
            command = around.enter_context(self._command(fault.stage, place, environment))
            command.sleep(self.seconds[fault.stage] * fault.ratio)
            chance = random.Random(fault.seed)
            if fault.kind in ("driver killed", "driver stopped"):
                command.process.send_signal(signal.SIGKILL if fault.kind == "driver killed" else signal.SIGTERM)
            elif fault.kind == "worker killed":
                command.kill_one("ray::", chance)
            elif nodes is not None:
                nodes.kill_one(chance) if fault.kind == "node killed" else nodes.kill_head()
            return command.wait(), command.errors

    def suffer_outage(self, fault: Fault, url: str, proxy: FaultyProxy) -> tuple[int, str]:
        """Let a stage meet an outage of its object store, in front of which the proxy is."""
        before, storage = self.folder / f"before-{fault.stage}", Storage(url)
        for file in sorted(before.rglob("*")):
            if file.is_file():
                storage.write(str(file.relative_to(before)), file.read_bytes())
        environment = {"AWS_ENDPOINT_URL": proxy.url}
        is_gone = fault.kind == "storage gone"
        if is_gone:
            environment |= {PATIENCE: str(PATIENCE_S)}
        with self._command(fault.stage, url, environment) as command:
            command.sleep(self.seconds[fault.stage] * fault.ratio)
            proxy.follow(*OUTAGE, seed=fault.seed)
            command.sleep(DEADLINE_S if is_gone else AWAY_S)
            assert not is_gone or command.process.poll() is not None, "it waits longer than it was told to"
            proxy.follow()
            return command.wait(), command.errors

    def again(self, stage: str, place: Path | str) -> tuple[int, str]:
        """The same command, undisturbed."""
        with self._command(stage, place) as command:
            return command.wait(), command.errors


class Nodes:
    """A Ray cluster of several nodes on this machine, in processes of their own; a context manager."""

    def __enter__(self) -> "Nodes":
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20, "_system_config": QUICK}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [
            self._cluster.add_node(num_cpus=CPUS_A_NODE, object_store_memory=100 << 20) for _ in range(NUM_NODES)
        ]
        self.address: str = self._cluster.address
        return self

    def kill_one(self, chance: random.Random) -> None:
        """SIGKILL what Ray runs on a node other than the head; its workers end by themselves, as orphans do."""
        self._kill(chance.choice(self._nodes))

    def kill_head(self) -> None:
        """SIGKILL what Ray runs on the head."""
        self._kill(self._cluster.head_node)

    def _kill(self, node: Any) -> None:
        for each in [info.process for infos in node.all_processes.values() for info in infos]:
            each.kill()

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()


@contextlib.contextmanager
def filled(place: Path, fault: Fault) -> Iterator[None]:
    """The place on a file system of its own with next to no room; room again afterwards."""
    before = place.with_name(f"{place.name}-before")
    place.rename(before)
    place.mkdir()
    used = sum(file.stat().st_size for file in before.rglob("*") if file.is_file())
    room = random.Random(fault.seed).randrange(64 << 10, 256 << 10)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * used + (8 << 20)}", "tmpfs", place], check=True)
    try:
        shutil.copytree(before, place, dirs_exist_ok=True)
        ballast = place / "ballast"
        free = shutil.disk_usage(place).free
        ballast.write_bytes(bytes(max(0, free - room)))
        yield
        ballast.unlink()
        shutil.rmtree(before)
        shutil.copytree(place, before)
    finally:
        subprocess.run(["umount", "-l", place], check=True)
        place.rmdir()
        before.rename(place)


def contents(stage: str, storage: Storage) -> Any:
    """What a stage has made, without what follows from the moment at which it was made."""
    if stage == "ingest":
        return _table(pairs_table(storage), storage)
    if stage == "encode":
        latents, text = fingerprints(storage, LATENTS), fingerprints(storage, TEXT)
        return [_table(latents_table(storage, each), storage) for each in latents] + [
            _table(text_table(storage, each), storage) for each in text
        ]
    if stage == "train":
        details = json.loads(storage.read("runs/small/stages/train.json"))["details"]
        return details["digest"], _digests(storage, details["checkpoint"])
    if stage == "export":
        return _digests(storage, "runs/small/model")
    samples = [_table(samples_table(storage, each), storage) for each in fingerprints(storage, SAMPLES)]
    return samples, _digests(storage, "runs/small/evaluation")


def _table(table: Any, storage: Storage) -> Any:
    rows = sorted(table.read().to_pylist(), key=lambda row: json.dumps(row, sort_keys=True, default=str))
    shards = sorted({row["shard"] for row in rows if row["shard"]})
    return rows, {shard: hashlib.sha256(storage.read(shard)).hexdigest() for shard in shards}


def _digests(storage: Storage, folder: str) -> dict[str, str]:
    names = [name for name in storage.names(folder) if name.endswith((".safetensors", ".png", "results.json"))]
    assert names
    return {name.removeprefix(folder): hashlib.sha256(storage.read(name)).hexdigest() for name in names}
