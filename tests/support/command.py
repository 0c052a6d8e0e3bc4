"""`mapo` in a process of its own; whatever it has started is gone afterwards."""

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

MAPO = Path(sys.executable).with_name("mapo")
DEADLINE_S = 600


class Command:
    """A context manager around one call of the installed command, on a Ray of its own unless it is given one.

    Args:
        arguments: Of `mapo`.
        cwd: Where it runs.
        environment: Set beside this process's.
    """

    def __init__(
        self, *arguments: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None
    ) -> None:
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.output = self.errors = ""
        self._family: set[psutil.Process] = set()
        self.process = subprocess.Popen(
            [MAPO, *arguments], cwd=cwd, env=inherited | {"PYTHONWARNINGS": "ignore"} | (environment or {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Command":
        return self

    def sleep(self, seconds: float) -> None:
        """Let it work, and remember what it starts."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            self.look()
            time.sleep(0.05)

    def look(self) -> None:
        """Remember what it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family.update(psutil.Process(self.process.pid).children(recursive=True))

    def wait(self) -> int:
        """Its exit code, within the deadline."""
        self.look()
        self.output, self.errors = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL, to it alone."""
        self.process.kill()
        self.process.wait()

    def kill_one(self, name: str, chance: random.Random) -> None:
        """SIGKILL one of its processes of this name, if there is one."""
        self.look()
        found = []
        for each in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(each.cmdline()[:1])
                if name in title and "IDLE" not in title:
                    found.append(each)
        if found:
            chance.choice(sorted(found, key=lambda each: each.pid)).kill()

    def __exit__(self, *_: object) -> None:
        self.look()
        self.kill()
        for each in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(list(self._family), timeout=10)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe
            pipe.close()
