"""A client of Ray's dashboard: its address, its credentials, and Ray's own client with deadlines."""

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import aiohttp
from ray.job_submission import JobSubmissionClient

from pipelines.dataset.errors import ConfigError
from pipelines.dataset.secrets import has_credentials

CONNECT_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 15
WORK_TIMEOUT_S = 60  # for requests that send data: Ray itself waits 30 s for the head's agent when a job is submitted
KEEPALIVE_S = (15, 5, 3)  # seconds of silence before the first probe, between probes, and probes before giving up
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
HEADERS_VARIABLE = "RAY_JOB_HEADERS"
ADDRESS_HINT = "give `--address http://HOST:8265`: Ray's dashboard listens on port 8265 by default, its GCS on 6379"
TOKEN_HINT = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH for a file that holds it; "
    f"headers for a proxy go into {HEADERS_VARIABLE}, as JSON"
)


def resolve_address(given: str | None) -> str:
    """Return the dashboard's URL: the given one, or the environment's, as `ray job` does.

    Raises:
        ConfigError: There is none, or it is not an address of a dashboard.
    """
    found = given or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    if not found:
        raise ConfigError(f"no cluster is given: set --address or {' or '.join(ADDRESS_VARIABLES)}", ADDRESS_HINT)
    if found.startswith("ray://"):
        raise ConfigError(f"{found} is an address of Ray Client, which cannot submit jobs", ADDRESS_HINT)
    if has_credentials(found):
        raise ConfigError("there are credentials in the address", TOKEN_HINT)
    return found.rstrip("/") if "://" in found or found == "auto" else f"http://{found.rstrip('/')}"


def job_headers() -> dict[str, str]:
    """Return headers for a proxy in front of the dashboard, from the variable that `ray job` reads too.

    Raises:
        ConfigError: The variable is not a JSON object of strings.
    """
    try:
        headers = json.loads(os.environ.get(HEADERS_VARIABLE) or "{}")
    except ValueError:
        headers = None
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise ConfigError(
            f"{HEADERS_VARIABLE} is not a JSON object of header names and values",
            'for example \'{"X-Team": "vision"}\'',
        )
    return headers


class Refused(Exception):
    """An answer other than 200.

    Args:
        status: The HTTP status.
        text: The body of the answer, often a traceback.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status, self.text = status, text

    def __str__(self) -> str:
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return f"HTTP {self.status}: {lines[-1] if lines else 'no reason given'}"


class RayClient(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with timeouts, which it does not have itself, and with refusals as `Refused` instead of text."""

    def _do_request(self, method: str, endpoint: str, **settings: Any) -> Any:
        answer_s = ANSWER_TIMEOUT_S if method == "GET" else WORK_TIMEOUT_S
        settings.setdefault("timeout", (CONNECT_TIMEOUT_S, answer_s))
        return super()._do_request(method, endpoint, **settings)

    def _raise_error(self, r: Any) -> None:
        raise Refused(r.status_code, r.text)

    async def follow(self, job_id: str) -> AsyncGenerator[str]:
        """Yield a job's log from its beginning until the server ends it; a broken connection is an OSError."""
        url = f"{self._address}/api/jobs/{job_id}/logs/tail"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        session = aiohttp.ClientSession(cookies=self._cookies, headers=self._headers, timeout=timeout, trust_env=True)
        async with session:
            trusted = True if self._ssl_context is None else self._ssl_context
            connecting = session.ws_connect(url, ssl=trusted)
            log = await asyncio.wait_for(connecting, ANSWER_TIMEOUT_S)
            _keep_alive(log.get_extra_info("socket"))
            async for message in log:
                if message.type == aiohttp.WSMsgType.ERROR:
                    raise ConnectionError(f"the connection broke: {log.exception()}")
                yield message.data
            if log.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
                raise ConnectionError("the connection broke")


def _keep_alive(connection: socket.socket | None) -> None:
    """Let the kernel notice when the other side is gone: Ray's proxy does not answer pings."""
    if connection is None or not hasattr(socket, "TCP_KEEPIDLE"):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    for name, value in zip(names, KEEPALIVE_S, strict=True):
        connection.setsockopt(socket.IPPROTO_TCP, name, value)


def ray_client(address: str) -> RayClient:
    """Connect a client to this address; errors are Ray's own."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    for name in ("dashboard_sdk", "job.sdk"):  # they set their own levels
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    trusted = os.environ.get("REQUESTS_CA_BUNDLE") or True
    with _variable(ADDRESS_VARIABLES[0], address):  # Ray's client prefers its variables to what it is given
        return RayClient(address, headers=job_headers(), verify=trusted)


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of this process's environment during the block."""
    kept = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if kept is not None:
            os.environ[name] = kept


def reason_of(error: BaseException) -> str:
    """Return the innermost message about a failed connection; requests and urllib3 wrap it four times."""
    inner = error
    for _ in range(8):
        cause = getattr(inner, "reason", None) or inner.__cause__ or inner.__context__
        if not isinstance(cause, BaseException):
            break
        inner = cause
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return str(text).splitlines()[0]
