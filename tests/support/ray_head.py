"""A Ray head with a dashboard and token authentication, in processes of its own."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
START_S = 300


@dataclass(frozen=True)
class RayHead:
    """Where it is, and what lets a client in.

    Args:
        url: Of the dashboard.
        token: Of Ray's authentication.
        address: Of its GCS, where other nodes join.
    """

    url: str
    token: str
    address: str

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of a user of this cluster; `changes` are set beside."""
        kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_HEADERS")}
        kept |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "PYTHONWARNINGS": "ignore"}
        return kept | changes

    def headers(self) -> str:
        """The same for a process that has imported Ray without authentication: what RAY_JOB_HEADERS takes."""
        return f'{{"Authorization": "Bearer {self.token}"}}'


@contextlib.contextmanager
def ray_head(num_cpus: int = 6, **environment: str) -> Iterator[RayHead]:
    """A head of so many CPUs whose jobs find the `mapo` of this Python on their PATH."""
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    address = f"127.0.0.1:{ports['port']}"
    head = RayHead(f"http://127.0.0.1:{ports['dashboard-port']}", secrets.token_hex(16), address)
    patience = {"RAY_raylet_start_wait_time_s": str(START_S)}
    settings = head.environment(PATH=f"{BIN}:{os.environ['PATH']}", **patience | environment)
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets lie below, whose paths have a limit
    command = [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true"]
    command += [f"--num-cpus={num_cpus}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--object-store-memory={200 << 20}", *(f"--{name}={port}" for name, port in ports.items())]
    with Path(folder, "start.log").open("wb") as log:
        process = subprocess.Popen(command, env=settings, stdout=log, stderr=log, start_new_session=True)
    started: list[psutil.Process] = []
    try:
        _wait_until_ready(head, process, Path(folder, "start.log"))
        yield head
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
        for each in (process, *started):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(started, timeout=10)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def other_node(head: RayHead, *, num_cpus: int = 4, **environment: str) -> Iterator[None]:
    """A second node of so many CPUs, with an environment of its own."""
    settings = head.environment(PATH=f"{BIN}:{os.environ['PATH']}", **environment)
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    command = [BIN / "ray", "start", f"--address={head.address}", "--block", "--disable-usage-stats"]
    command += [f"--num-cpus={num_cpus}", f"--temp-dir={folder}", f"--object-store-memory={200 << 20}"]
    command += ["--node-ip-address=127.0.0.1"]
    with Path(folder, "start.log").open("wb") as log:
        process = subprocess.Popen(command, env=settings, stdout=log, stderr=log, start_new_session=True)
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + START_S
        while "This command will now block" not in Path(folder, "start.log").read_text():
            assert process.poll() is None, Path(folder, "start.log").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
        for each in (process, *started):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(started, timeout=10)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(head: RayHead, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    headers = {"Authorization": f"Bearer {head.token}", "Content-Type": "application/json"}
    job = b'{"entrypoint": "true"}'  # the dashboard answers before its agent can take jobs
    request = urllib.request.Request(f"{head.url}/api/jobs/", data=job, headers=headers)
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=60):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the head did not start: {process.poll()}\n{log.read_text()[-4000:]}")


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as probes:
        opened = [probes.enter_context(socket.socket()) for _ in range(number)]
        for probe in opened:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in opened]
