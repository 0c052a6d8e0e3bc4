"""A Ray head by itself, in processes of its own: any number of CPUs and of GPUs that are there by name alone."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

START_S = 300.0
PORTS = ("port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")


@contextlib.contextmanager
def small_cluster(
    *, num_cpus: int, num_gpus: int = 0, autoscaling: str | None = None, **settings: str
) -> Iterator[str]:
    """A head without a dashboard; gives its address.

    Args:
        num_cpus: Of the node.
        num_gpus: Of the node.
        autoscaling: The file of an autoscaler's configuration.
        settings: Environment variables of Ray's processes.
    """
    with contextlib.ExitStack() as probes:
        opened = [probes.enter_context(socket.socket()) for _ in PORTS]
        for probe in opened:
            probe.bind(("127.0.0.1", 0))
        ports = {name: probe.getsockname()[1] for name, probe in zip(PORTS, opened, strict=True)}
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: sockets lie below, whose paths have a limit
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--include-dashboard=false", f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"]
    command += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}", f"--object-store-memory={200 << 20}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += [] if autoscaling is None else [f"--autoscaling-config={autoscaling}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment | settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_started(process, folder / "start.log")
        yield f"127.0.0.1:{ports['port']}"
    finally:
        family = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        for each in (process, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family, timeout=10)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_started(process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if "This command will now block" in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"the head did not start: {process.poll()}\n{log.read_text()[-4000:]}")
