"""The page of a session of votes, on loopback alone: a random token in the URL, and the Host header is checked.

The token keeps other users of the machine out; the Host header keeps out a page elsewhere whose name was pointed at
this address. Nothing that is served says which model is on which side.
"""

import hmac
import json
import logging
import secrets
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from orchestration.votes.voting import CHOICES, Voting
from pipelines.dataset.errors import ConfigError, MapoError

HERE = "127.0.0.1"
FILES = {"": ("vote.html", "text/html; charset=utf-8"), "vote.js": ("vote.js", "text/javascript; charset=utf-8"),
         "vote.css": ("vote.css", "text/css; charset=utf-8")}  # fmt: skip
MAX_BODY = 1024  # bytes
TIMEOUT_S = 30
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

log = logging.getLogger(__name__)


class VoteServer(ThreadingHTTPServer):
    """Serves one session; `finished` is set by the page's last button.

    Args:
        voting: The session.
        port: The port; 0 for any that is free.

    Raises:
        ConfigError: The port is taken, or may not be used.
    """

    daemon_threads = True

    def __init__(self, voting: Voting, port: int = 0) -> None:
        self.voting = voting
        self.token = secrets.token_urlsafe(24)
        self.finished = threading.Event()
        try:
            super().__init__((HERE, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "no such port"
            raise ConfigError(
                f"cannot listen on port {port}: {reason}", "leave --port out for any free port"
            ) from error

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet about a browser that went away, such as from an image that it loads ahead."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """The address of the page, with the token."""
        return f"http://{HERE}:{self.server_port}/{self.token}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """What a Host header may say."""
        return f"{HERE}:{self.server_port}", f"localhost:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: VoteServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "mapo", ""
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        """Answer a request for the page, its state or an image."""
        path = self._path()
        if path is None:
            return
        if path in FILES:
            name, kind = FILES[path]
            self._send(HTTPStatus.OK, Path(__file__).with_name(name).read_bytes(), kind)
        elif path == "state":
            self._send_state()
        elif path.startswith("image/"):
            self._send_image(path)
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """Record a vote, take one back, or end the session."""
        path = self._path()
        if path is None:
            return
        body = self._body()
        if body is None or self.headers.get("Origin", f"http://{self.headers['Host']}") not in self._origins():
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        try:
            self._act(path, body)
        except MapoError as error:
            log.error("the vote does not count: %s", error)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR)

    def _act(self, path: str, body: Mapping[str, object]) -> None:
        position, choice = body.get("position"), body.get("choice")
        if path == "vote" and isinstance(position, int) and choice in CHOICES:
            is_done = self.server.voting.vote(position, str(choice))
        elif path == "undo":
            is_done = self.server.voting.undo()
        elif path == "finish":
            self.server.finished.set()
            is_done = True
        else:
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        self._send_state(HTTPStatus.OK if is_done else HTTPStatus.CONFLICT)

    def _path(self) -> str | None:
        """Return the path after the token; refuse a request from elsewhere, and return None."""
        if self.headers.get("Host") not in self.server.hosts:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
            return None
        token, slash, path = self.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        if not slash:  # the page names its files relative to itself
            self._send(HTTPStatus.PERMANENT_REDIRECT, b"", "text/plain", Location=f"/{token}/")
            return None
        return path

    def _body(self) -> Mapping[str, object] | None:
        """Return the JSON object of a request; None if it is not one, or too long."""
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 <= length <= MAX_BODY or self.headers.get_content_type() != "application/json":
                return None
            found = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _origins(self) -> tuple[str, ...]:
        return tuple(f"http://{host}" for host in self.server.hosts)

    def _send_state(self, status: HTTPStatus = HTTPStatus.OK) -> None:
        state = json.dumps(asdict(self.server.voting.shown()), ensure_ascii=False).encode()
        self._send(status, state, "application/json")

    def _send_image(self, path: str) -> None:
        _, position, side, *rest = (*path.split("/"), "", "")
        try:
            image = None if any(rest) else self.server.voting.image(int(position), side)
        except ValueError:
            image = None
        except MapoError as error:
            log.error("an image is not shown: %s", error)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        if image is None:
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            self._send(HTTPStatus.OK, image, "image/png")

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # a body may not have been read
        self._send(status, status.phrase.encode(), "text/plain")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, **more: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS, **more}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep quiet: the token is in every line."""
