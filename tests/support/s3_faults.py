"""A proxy in front of an S3 server that breaks requests as it is told: real sockets, real resets, real stalls.

A plan says which requests meet which fault. The server behind answers as it does without a proxy, so
what a client gets wrong through the proxy, it gets wrong because of a fault.
"""

import contextlib
import http.client
import json
import pickle
import random
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
CONTROL = "/-/control"  # no bucket has such a name
VOUCHERS = ("content-md5", "x-amz-checksum-crc32", "x-amz-sdk-checksum-algorithm")


class Fault(Enum):
    """What can happen to one request."""

    SLOW_DOWN = "503 SlowDown; the server never sees the request"
    RESET_DOWNLOAD = "half a body comes, then a reset"
    CUT_DOWNLOAD = "half a body comes, then the connection is closed: Content-Length said more"
    SHORT_DOWNLOAD = "half a body comes, and Content-Length says that this is all"
    STALLED_DOWNLOAD = "half a body comes, then nothing for ever"
    RESET_UPLOAD = "half a body is taken, then a reset; the server never sees the request"
    SHORT_UPLOAD = "the server gets half a body, stores it and says 200"
    FLIPPED_UPLOAD = "the server gets a body with one bit changed, stores it and says 200"
    LOST_ANSWER = "the server does what it was asked, then a reset instead of its answer"


SILENT = frozenset({Fault.SHORT_DOWNLOAD, Fault.SHORT_UPLOAD, Fault.FLIPPED_UPLOAD})
"""Faults that no layer below `Storage` can see."""


@dataclass(frozen=True)
class Request:
    """What a plan decides by.

    Args:
        method: Of HTTP.
        key: The path below the bucket; '' for the bucket itself.
        query: As it was sent.
        num_bytes: Of the body: of what is put, or of what the server has answered to a GET (0 if it refused).
    """

    method: str
    key: str
    query: str
    num_bytes: int

    @property
    def is_download(self) -> bool:
        """Whether an object's bytes are asked for."""
        return self.method == "GET" and bool(self.key) and self.num_bytes > 1

    @property
    def is_upload(self) -> bool:
        """Whether an object, or a part of one, is put."""
        return self.method == "PUT" and bool(self.key) and self.num_bytes > 1

    def can_meet(self, fault: Fault) -> bool:
        """Whether the fault makes sense for this request."""
        if fault.name.endswith("_DOWNLOAD"):
            return self.is_download
        return self.is_upload if fault.name.endswith("_UPLOAD") else True


@dataclass(frozen=True)
class Plan:
    """Which requests meet a fault.

    Args:
        faults: A request meets one that it can meet, drawn from those that happened least.
        times: How many requests, at most.
        key: Part of the key of each.
        method: Of HTTP; '' for all.
        query: Part of the query of each.
        ratio: 0..1; the probability of each.
        seed: Of all draws; the order of arrival decides which request gets which.
        max_in_a_row: Faults that one method and key meet before a request goes through.
        silent_key: Only requests with this in their key meet one of `SILENT`.
    """

    faults: tuple[Fault, ...] = ()
    times: int = 1_000_000
    key: str = ""
    method: str = ""
    query: str = ""
    ratio: float = 1.0
    seed: int = 0
    max_in_a_row: int = 1_000_000
    silent_key: str = ""

    def choices(self, request: Request) -> list[Fault]:
        """What a request may meet."""
        if self.key not in request.key or self.method not in request.method or self.query not in request.query:
            return []
        possible = [fault for fault in self.faults if request.can_meet(fault)]
        return [fault for fault in possible if fault not in SILENT or self.silent_key in request.key]


class FaultyProxy:
    """The test's side of a proxy in a process of its own: delta-rs holds Python's lock while it waits for answers.

    Args:
        url: Where clients find it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._address = (str(urlsplit(url).hostname), int(urlsplit(url).port or 0))

    def follow(self, *faults: Fault, **settings: Any) -> None:
        """Follow a `Plan` from now on, and count anew; without arguments let everything through."""
        self._tell("POST", pickle.dumps(Plan(faults, **settings)))

    @property
    def met(self) -> Counter[Fault]:
        """Faults that happened since `follow`."""
        return self._counted()[0]

    @property
    def seen(self) -> Counter[str]:
        """Requests by method since `follow`."""
        return self._counted()[1]

    @property
    def downloaded(self) -> Counter[str]:
        """Bytes of each key that were answered to GETs since `follow`; of the bucket's own, '', listings."""
        return self._counted()[2]

    def _counted(self) -> tuple[Counter[Fault], Counter[str], Counter[str]]:
        met, seen, downloaded = json.loads(self._tell("GET"))
        return Counter({Fault[name]: number for name, number in met.items()}), Counter(seen), Counter(downloaded)

    def _tell(self, method: str, body: bytes = b"") -> bytes:
        connection = http.client.HTTPConnection(*self._address, timeout=30)
        try:
            connection.request(method, CONTROL, body)
            return connection.getresponse().read()
        finally:
            connection.close()


@contextlib.contextmanager
def faulty_proxy(server_url: str) -> Iterator[FaultyProxy]:
    """A proxy in front of a server, gone at the end with everything that still hangs on it."""
    process = subprocess.Popen([sys.executable, __file__, server_url], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield FaultyProxy(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


class _Server(ThreadingHTTPServer):
    """The proxy's side: the plan, what it has done, and a thread for each connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, server_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        behind = urlsplit(server_url)
        self.behind = (str(behind.hostname), int(behind.port or 80))
        self.lock = threading.Lock()
        self.follow(Plan())

    def follow(self, plan: Plan) -> None:
        """Start a plan."""
        with self.lock:
            self.plan, self.draw, self.left = plan, random.Random(plan.seed), plan.times
            self.in_a_row: Counter[tuple[str, str]] = Counter()
            self.met: Counter[str] = Counter()
            self.seen: Counter[str] = Counter()
            self.downloaded: Counter[str] = Counter()

    def decide(self, request: Request) -> Fault | None:
        """The fault of a request, if it meets one."""
        with self.lock:
            self.seen[request.method] += 1
            if request.method == "GET":
                self.downloaded[request.key] += request.num_bytes
            choices, place = self.plan.choices(request), (request.method, request.key)
            drawn = self.draw.random() < self.plan.ratio
            if not (drawn and choices and self.left) or self.in_a_row[place] >= self.plan.max_in_a_row:
                self.in_a_row[place] = 0
                return None
            fewest = min(self.met[fault.name] for fault in choices)
            fault = self.draw.choice([fault for fault in choices if self.met[fault.name] == fewest])
            self.left -= 1
            self.in_a_row[place] += 1
            self.met[fault.name] += 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients go away in the middle, that is what this is for."""


class _Exchange(BaseHTTPRequestHandler):
    """One connection: requests in turn, each with its fault."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        if self.path == CONTROL:
            return self._control()
        num_bytes = int(self.headers.get("Content-Length") or 0)
        path = urlsplit(self.path)
        _, _, key = unquote(path.path).lstrip("/").partition("/")
        behind = self._behind(b"") if self.command == "GET" else None  # a read changes nothing, and its size decides
        if behind:
            num_bytes = len(behind[2]) if behind[0] < 300 else 0
        fault = self.server.decide(Request(self.command, key, path.query, num_bytes))
        if behind:
            return self._download(fault, *behind)
        if fault is Fault.RESET_UPLOAD:
            self.rfile.read(num_bytes // 2)
            return self._reset()
        body = self.rfile.read(num_bytes)
        if fault is Fault.SLOW_DOWN:
            return self._slow_down()
        if fault is Fault.SHORT_UPLOAD:
            body = body[: num_bytes // 2]
        if fault is Fault.FLIPPED_UPLOAD:
            body = body[:-1] + bytes([body[-1] ^ 1])
        answer = self._behind(body)
        return self._reset() if fault is Fault.LOST_ANSWER else self._answer(*answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _behind(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The answer of the server, for the body that it is to get."""
        connection = http.client.HTTPConnection(*self.server.behind, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "content-length"}
            # What vouches for the body is left out, or the server would refuse a body that a fault has changed.
            headers = {name: value for name, value in headers.items() if name.lower() not in VOUCHERS}
            connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, num_bytes: int | None = None) -> None:
        """Send an answer; `num_bytes` is what Content-Length says, if not the truth."""
        self.send_response_only(status)
        own = ("content-length", "connection", "transfer-encoding")
        told = {name.lower(): value for name, value in headers}
        for name, value in headers:
            if name.lower() not in own:
                self.send_header(name, value)
        length = told.get("content-length") if self.command == "HEAD" else str(num_bytes or len(body))
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def _control(self) -> None:
        if self.command == "POST":
            self.server.follow(pickle.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        with self.server.lock:
            counted = json.dumps([self.server.met, self.server.seen, self.server.downloaded])
        self._answer(200, [], counted.encode())

    def _slow_down(self) -> None:
        self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)

    def _download(self, fault: Fault | None, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        half = body[: len(body) // 2]
        if fault is None:
            return self._answer(status, headers, body)
        if fault is Fault.SLOW_DOWN:
            return self._slow_down()
        if fault is Fault.LOST_ANSWER:
            return self._reset()
        if fault is Fault.SHORT_DOWNLOAD:
            return self._answer(status, headers, half)
        self._answer(status, headers, half, num_bytes=len(body))
        if fault is Fault.STALLED_DOWNLOAD:
            self._wait_until_given_up()
        if fault is Fault.RESET_DOWNLOAD:
            return self._reset()
        self.close_connection = True
        return None

    def _wait_until_given_up(self) -> None:
        """Say nothing until the client closes the connection."""
        while self.connection.recv(1):
            pass

    def _reset(self) -> None:
        """Make the coming close a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing: a test's output is its own."""


if __name__ == "__main__":
    # Plans name the classes of this file as an imported module.
    from s3_faults import _Server as Server

    serving = Server(sys.argv[1])
    print(f"http://127.0.0.1:{serving.server_address[1]}", flush=True)
    serving.serve_forever()
