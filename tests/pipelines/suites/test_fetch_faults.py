"""Servers and disks that fail while prompts are fetched: one error, soon, and nothing left behind."""

import dataclasses
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.dataset.errors import ModelError, StorageError
from pipelines.suites import prompt_files
from pipelines.suites.prompt_files import fetch_set
from pipelines.suites.prompt_sets import PROMPT_SETS

NAME = "pickapic-v2-test"
Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], list[str]]]:
    """Serve Pick-a-Pic's list by a function; returns the paths that are asked for."""
    servers = []

    def start(answer: Answer) -> list[str]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                answer(self)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        known = PROMPT_SETS[NAME]
        layout = dataclasses.replace(known.layouts[0], url=f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setitem(PROMPT_SETS, NAME, dataclasses.replace(known, layouts=(layout,)))
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def head(handler: BaseHTTPRequestHandler, status: int, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def test_a_busy_server_is_asked_three_times_and_not_waited_for_as_long_as_it_likes(
    serve: Callable[[Answer], list[str]],
) -> None:
    asked = serve(lambda handler: head(handler, 429, Retry_After="3600", Content_Length="0"))
    started = time.monotonic()
    with pytest.raises(ModelError, match="HTTP 429"):
        fetch_set(NAME)
    assert len(asked) == 3
    assert time.monotonic() - started < 5


def test_a_server_that_stalls_or_drips_is_given_up(
    serve: Callable[[Answer], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_files, "TIMEOUT_S", 0.3)

    def drip(handler: BaseHTTPRequestHandler) -> None:
        head(handler, 200, Content_Length="100000")
        for _ in range(20):
            handler.wfile.write(b"x")
            time.sleep(0.1)

    asked = serve(drip)
    started = time.monotonic()
    with pytest.raises(ModelError, match="cannot fetch"):
        fetch_set(NAME)
    assert len(asked) == 3
    assert time.monotonic() - started < 4


def test_an_endless_answer_does_not_fill_the_memory(
    serve: Callable[[Answer], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_files, "MAX_BYTES", 1_000_000)
    sent = []

    def flood(handler: BaseHTTPRequestHandler) -> None:
        head(handler, 200)
        for _ in range(100):
            handler.wfile.write(b"x" * 500_000)
            sent.append(1)

    asked = serve(flood)
    with pytest.raises(ModelError, match="more than 1,000,000 bytes"):
        fetch_set(NAME)
    assert len(asked) == 1
    assert len(sent) < 100


def test_redirects_are_followed_a_few_times(serve: Callable[[Answer], list[str]]) -> None:
    asked = serve(lambda handler: head(handler, 302, Location=handler.path, Content_Length="0"))
    with pytest.raises(ModelError, match="too many redirects"):
        fetch_set(NAME)
    assert len(asked) < 20


def _rows() -> Path:
    folder = Path(__file__).parents[3].parent / "shared" / "benchmarks" / NAME
    if not folder.is_dir():
        pytest.skip("needs ../shared/benchmarks")
    return folder


def test_a_full_disk_is_said_and_nothing_is_left(cache: Path) -> None:
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1][1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*File too large") as found:
            fetch_set(NAME, _rows())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert "MAPO_CACHE" in str(found.value.hint)
    assert list((cache / "prompts").iterdir()) == []


def test_a_cache_that_is_no_folder_is_said(cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write .*Not a directory"):
        fetch_set(NAME, _rows())
