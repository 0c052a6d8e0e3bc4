"""What many tests share: a local Ray, and a tiny SDXL pipeline."""

import hashlib
import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from pipelines.dataset.storage import Storage

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's client is imported; no test may need a network
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))  # commands hold its path
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon the end of a training is seen; 2 s
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; spinning threads starve each other
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # read by ray.init; every actor pool warns of Ray's #53727


DURATIONS = Path(__file__).with_name("durations.json")
"""Seconds of each test file, written by `make durations`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what `make durations` asks for."""
    parser.addoption("--write-durations", action="store_true", help=f"write {DURATIONS.name}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that no process of pytest-xdist is left with one at the end.

    A file that has no duration yet may be long. Within a file nothing changes.
    """
    seconds: dict[str, float] = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: seconds.get(item.nodeid.split("::")[0], math.inf), reverse=True)


class _Durations:
    """Sums the seconds of each file over all processes of pytest-xdist."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid.split("::")[0]] += report.duration  # type: ignore[assignment]

    def pytest_sessionfinish(self) -> None:
        """Keep what is known of files that did not run and are still there."""
        root = DURATIONS.parents[1]
        found = json.loads(DURATIONS.read_text()) | {file: round(each, 1) for file, each in self._seconds.items()}
        there = {
            file: each for file, each in sorted(found.items(), key=lambda kept: -kept[1]) if (root / file).exists()
        }
        DURATIONS.write_text(json.dumps(there, indent=1) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except Ray's about its own settings: creating a DataContext sets a deprecated one."""
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:ray")
    hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("suite")
    if config.getoption("--write-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Durations())


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of six CPUs, however many there are."""
    import ray

    ray.init(
        address="local",  # not one that happens to run on this machine
        num_cpus=6,
        resources={"ingest_node": 1, "encode_node": 1},
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200 * 1024 * 1024,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random SDXL pipeline for images of 64 x 64; read it, and change only copies."""
    from factories import new_pipeline

    folder = tmp_path_factory.mktemp("model") / "tiny-sdxl"
    new_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def run_python() -> Callable[[str], str]:
    """Runs code in a fresh interpreter; gives what it printed.

    It leaves as `mapo` does, without a teardown in which Arrow's threads may end it with SIGABRT.
    """

    def run(code: str) -> str:
        code += "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server in a process of its own; the environment that its clients need."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server_file = Path(__file__).parent / "support" / "atomic_s3.py"
    command = [sys.executable, server_file, "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while server.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        else:
            pytest.fail(f"the S3 server did not start: {server.poll()}")
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3_storage(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Storage:
    """A folder of a bucket of its own; the environment points to the server during the test.

    Processes started in the test inherit it. Ray's workers do not: give `s3_server` to a driver as `runtime_env`.
    """
    from s3fs import S3FileSystem

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"
    S3FileSystem().mkdir(bucket)
    return Storage(f"s3://{bucket}/runs/photos")
