"""SIGKILL to ranks of a training at seeded moments, and whether two trainings ended with the same bits."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

from training.export import read_weights
from training.launch import TrainingResult, train
from training.spec import TrainSpec

MOMENTS = 10  # files that are seen before a kill: one checkpoint is about eight of them, with unfinished ones


class Killer:
    """SIGKILL to one rank, several times in a run, each once so many new checkpoint files, whole or not, are seen."""

    def __init__(self, spec: TrainSpec, seed: int, num_kills: int) -> None:
        self._spec, self._num_kills, self._chance = spec, num_kills, random.Random(seed)
        self.killed: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while len(self.killed) < self._num_kills and not self._ended.is_set():
            if self._wait_for_start(len(self.killed) + 1):
                self._kill_once()

    def _wait_for_start(self, number: int) -> bool:
        """Until the workers have been started so often and stepped."""
        file = f"{self._spec.folder}/progress.json"
        while not self._ended.wait(0.02):
            if self._spec.storage.exists(file) and json.loads(self._spec.storage.read(file))["starts"] == number:
                return True
        return False

    def _kill_once(self) -> None:
        folder = Path(self._spec.storage.path(self._spec.checkpoints))
        moment, delay_s, rank = self._chance.randrange(MOMENTS), self._chance.random() * 0.05, self._chance.randrange(2)
        old, seen = {str(file) for file in folder.rglob("*")}, set()
        while not self._ended.wait(0.001):
            seen.update(str(file) for file in folder.rglob("*") if str(file) not in old)
            if len(seen) > moment:
                time.sleep(delay_s)
                pid = pid_of(self._spec, rank)
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)
                return

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def pid_of(spec: TrainSpec, rank: int) -> int:
    return int(json.loads(spec.storage.read(f"{spec.folder}/progress.json"))["workers"][rank]["pid"])


def check_killed_run(spec: TrainSpec, undisturbed: tuple[TrainSpec, TrainingResult], seed: int, num_kills: int) -> None:
    """Train with so many kills, and hold what comes out against the same training without one."""
    with Killer(spec, seed, num_kills) as killer:
        trained = train(spec, lambda progress: None)
    assert len(killer.killed) == num_kills, "the run ended before"
    assert trained.starts == num_kills + 1
    steps = list(range(1, spec.config.max_steps + 1))
    assert [step["step"] for step in trained.history["steps"]] == steps, "none twice, none missed"
    expected_spec, expected = undisturbed
    assert trained.digest == expected.digest, "the same pairs at the same steps"
    for kind in ("raw", "ema"):
        wanted = read_weights(expected_spec.storage, expected.checkpoint, kind)
        found = read_weights(spec.storage, trained.checkpoint, kind)
        assert wanted.keys() == found.keys()
        assert all(wanted[name].tobytes() == found[name].tobytes() for name in wanted)
