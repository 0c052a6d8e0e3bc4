"""The server of the page of votes, against clients that misbehave and a journal that was tampered with."""

import hashlib
import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration.votes.server import VoteServer
from orchestration.votes.voting import Voting
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.storage import Storage
from pipelines.scores.vote_journal import VoteJournal
from pipelines.scores.votes import Ballot, ImagePlace, Session

SESSION = Session("5e" * 16, "prompts@1", ("a", "b"), ("0" * 32, "1" * 32), 0)
IMAGE = bytes(range(256)) * 40_000  # larger than the buffers of a socket


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VoteServer]:
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "shard").write_bytes(IMAGE)
    place = ImagePlace("shard", 0, len(IMAGE), hashlib.sha256(IMAGE).hexdigest())
    ballots = [Ballot(f"{number:032x}", f"prompt {number}", 0, (place, place)) for number in range(3)]
    journal = VoteJournal(tmp_path / "votes.jsonl", SESSION)
    server = VoteServer(Voting(ballots, journal, Storage(str(tmp_path / "storage"))))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    journal.close()


def ask(server: VoteServer, path: str, body: bytes | None = None) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    try:
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def test_a_browser_that_goes_away_leaves_nothing_on_the_terminal(
    server: VoteServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Closing the tab, or loading the page again, breaks off the images that are under way."""
    head = f"GET /{server.token}/image/0/1 HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
    for sent in (head + "\r\n", head, "GET /"):
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.sendall(sent.encode())
            if sent.endswith("\r\n\r\n"):
                assert client.recv(1000).startswith(b"HTTP/1.1 200")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close means reset
    _wait_for_requests()
    assert capfd.readouterr().err == ""
    assert ask(server, f"/{server.token}/image/1/2")[1] == IMAGE


def _wait_for_requests() -> None:
    """Wait until no thread answers a request."""
    end = time.monotonic() + 20
    while any("process_request" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < end, "a request is never answered"
        time.sleep(0.01)


def test_the_address_without_its_last_slash_leads_to_the_page(server: VoteServer) -> None:
    """The page names its files relative to itself, so that it would be blank there."""
    status, _, headers = ask(server, f"/{server.token}")
    assert (status, headers["Location"]) == (308, f"/{server.token}/")
    assert ask(server, headers["Location"])[0] == 200
    assert ask(server, "/another")[0] == 404


@pytest.mark.parametrize("body", [b"[" * 1000, b'{"a":' * 150, b"\xff", b"3", b"", b"{}" * 600])
def test_a_body_that_is_no_object_is_refused(
    body: bytes, server: VoteServer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ask(server, f"/{server.token}/vote", body)[0] == 403
    assert capfd.readouterr().err == ""


LINE = {"ballot": "a/0", "value": 1.0, "left": 0, "time": "2026-11-30T22:00:00Z"}


@pytest.mark.parametrize(
    "line",
    [
        {"undo": ["a/0"]},
        {"undo": None},
        {**LINE, "ballot": ["a/0"]},
        {**LINE, "ballot": 3},
        {**LINE, "value": 5.0},
        {**LINE, "value": "1"},
        {**LINE, "value": float("nan")},
        {**LINE, "left": 2},
        {**LINE, "time": None},
        "[" * 5000,
    ],
)
def test_a_line_that_is_no_vote_is_named(line: Any, tmp_path: Path) -> None:
    """A vote of 5 would be a score of 5 for one image and of -4 for the other."""
    file = tmp_path / "votes.jsonl"
    VoteJournal(file, SESSION).close()
    with file.open("a") as journal:
        journal.write(json.dumps(LINE) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(ConfigError, match="line 3 is none of its lines"):
        VoteJournal(file, SESSION)


def test_every_vote_of_the_page_is_read_back(server: VoteServer, tmp_path: Path) -> None:
    for position, choice in enumerate(("1", "0", "s")):
        body = json.dumps({"position": position, "choice": choice}).encode()
        assert ask(server, f"/{server.token}/vote", body)[0] == 200
    lines = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()[1:]]
    server.voting._journal.close()
    journal = VoteJournal(tmp_path / "votes.jsonl", SESSION)
    assert [vote.value for vote in journal.votes] == [line["value"] for line in lines]
    journal.close()
