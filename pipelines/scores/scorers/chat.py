"""A client of servers that speak OpenAI's chat protocol: one image and one text in, one text out.

What the model said is final; what the server failed to do is transient. Light: neither torch nor transformers.
"""

import base64
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import urllib3

from pipelines.dataset.errors import ConfigError
from pipelines.dataset.secrets import MASK, has_credentials, redact
from pipelines.dataset.values import JsonObject
from pipelines.scores.scorers.result import Failure

NOT_THIS_IMAGE = (400, 413, 415, 422)
"""Statuses by which a server refuses this very request: asking again would change nothing."""
REFUSALS = ("content_policy_violation", "content_filter")
"""Codes of an error that is a refusal."""
FIRST_DELAY_S, MAX_DELAY_S = 0.5, 30.0
MAX_UNANSWERED = 16
"""After so many images in a row without an answer, the rest are not sent any more."""
MAX_ANSWER_BYTES = 4 * 2**20
MAX_TOLD = 160


@dataclass(frozen=True)
class Server:
    """A server, and how to treat it.

    Args:
        url: The base of its API, which ends with `/v1` for most.
        model: The name of the model on it.
        key_variable: The environment variable that holds its key; without one no key is sent.
        timeout_s: Longest time of one request.
        max_retries: Further tries after 429, 5xx and broken connections.
        concurrency: Most requests at once, from this process.
    """

    url: str
    model: str
    key_variable: str
    timeout_s: float
    max_retries: int
    concurrency: int


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Args:
        text: The text.
        is_cut: Whether it ends because the limit of tokens was reached.
        first_tokens: Log-probabilities of the likeliest first tokens by their text; None if the server gives none.
    """

    text: str
    is_cut: bool = False
    first_tokens: tuple[tuple[str, float], ...] | None = None


class Chat:
    """Sends images with texts; safe to use from several threads."""

    def __init__(self, server: Server) -> None:
        check_url(server.url)
        self._server = server
        self._pool = urllib3.PoolManager(maxsize=server.concurrency, block=True, retries=False)
        self._lock, self._num_unanswered = threading.Lock(), 0

    def ask(self, png: bytes, text: str, **settings: Any) -> Answer | Failure:
        """Return what the model says about an image.

        Args:
            png: The image.
            text: The text that follows it.
            settings: Further members of the request, such as `max_tokens`.
        """
        with self._lock:
            has_given_up = self._num_unanswered >= MAX_UNANSWERED
        if has_given_up:
            return Failure(f"{self._server.url} left {MAX_UNANSWERED} images in a row unanswered", transient=True)
        found = self._ask(request_of(self._server.model, png, text, settings))
        with self._lock:
            is_unanswered = isinstance(found, Failure) and found.transient
            self._num_unanswered = self._num_unanswered + 1 if is_unanswered else 0
        return found

    def _ask(self, body: JsonObject) -> Answer | Failure:
        data = json.dumps(body).encode()
        for attempt in range(self._server.max_retries + 1):
            status, answer, wait_s = self._post(data)
            if status is not None and status != 429 and status < 500:
                break
            if status is None and wait_s is None:
                break
            if attempt < self._server.max_retries:
                time.sleep(min(MAX_DELAY_S, wait_s or FIRST_DELAY_S * 2**attempt))
        if status == 200:
            return parse_answer(answer)
        return failure_of(status, answer)

    def _post(self, data: bytes) -> tuple[int | None, str, float | None]:
        """Return the status, the body, and how long to wait before another try.

        Without a status the body is the reason; such a request may be tried again only if there is a time to wait.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self._server.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        timeout_s = self._server.timeout_s
        try:
            response = self._pool.request(
                "POST", f"{self._server.url.rstrip('/')}/chat/completions", body=data, headers=headers,
                timeout=urllib3.Timeout(total=timeout_s), preload_content=False, redirect=False,
            )  # fmt: skip
            body = _read(response, timeout_s)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if is_timeout(error):
                return None, f"no answer within {timeout_s:g} s", None
            return None, f"no connection: {type(error).__name__}: {error}", FIRST_DELAY_S
        return response.status, body.replace(key, MASK) if key else body, _retry_after(response.headers)


def is_timeout(error: Exception) -> bool:
    """Return whether a request took too long; urllib3 counts a refused connection as such, and it is none."""
    is_refused = isinstance(error, urllib3.exceptions.NewConnectionError)
    return isinstance(error, urllib3.exceptions.TimeoutError | TimeoutError) and not is_refused


def check_url(url: str) -> None:
    """Check the base of a server's API.

    Raises:
        ConfigError: It is none, or holds a password or a key.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{redact(url)!r} is not the URL of a server", "write it as http://HOST:8000/v1")
    if has_credentials(url):
        raise ConfigError(
            f"the URL {redact(url)} holds credentials, which would be stored with the scores",
            "give the key in an environment variable: `key_variable`",
        )


def request_of(model: str, png: bytes, text: str, settings: Mapping[str, Any]) -> JsonObject:
    """Return a request about one image: greedy, the image first."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}}
    content = [image, {"type": "text", "text": text}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0.0, **settings}


def _read(response: Any, timeout_s: float) -> str:
    """Read a body; a server that sends it drop by drop has no more time than any other."""
    end, parts, num_bytes = time.monotonic() + timeout_s, [], 0
    is_whole = False
    try:
        while part := response.read1(65_536):  # what there is; `stream` waits for all of it
            parts.append(part)
            num_bytes += len(part)
            if time.monotonic() > end:
                raise TimeoutError
            if num_bytes > MAX_ANSWER_BYTES:
                raise OSError(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
        is_whole = True
    finally:
        response.release_conn() if is_whole else response.close()
    return b"".join(parts).decode(errors="replace")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def failure_of(status: int | None, body: str) -> Failure:
    """Return the failure that stands for an HTTP error, or for no answer at all."""
    if status is None:
        return Failure(told(body), transient=True)
    code = _member(body, "error", "code") or _member(body, "error", "type")
    if code in REFUSALS:
        return Failure(f"the server refused: {told(body)}")
    reason = f"the server answered HTTP {status}: {told(body)}" if body else f"the server answered HTTP {status}"
    return Failure(reason, transient=status not in NOT_THIS_IMAGE)


def parse_answer(body: str) -> Answer | Failure:
    """Return the answer in the body of a response.

    A body that is not of the protocol is the server's fault, and transient.
    """
    choice = _member(body, "choices", 0)
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        return Failure(f"the server's answer has no choice: {told(body)}", transient=True)
    message, ending = choice["message"], choice.get("finish_reason")
    if message.get("refusal"):
        return Failure(f"the model refused: {told(str(message['refusal']))}")
    if ending == "content_filter":
        return Failure("the server's content filter removed the answer")
    return Answer(str(message.get("content") or ""), ending == "length", _first_tokens(choice))


def _first_tokens(choice: Mapping[str, Any]) -> tuple[tuple[str, float], ...] | None:
    try:
        likeliest = choice["logprobs"]["content"][0]["top_logprobs"]
        return tuple((str(each["token"]), float(each["logprob"])) for each in likeliest) or None
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _member(body: str, *path: str | int) -> Any:
    """Return a member of a JSON text by its path; None without one."""
    try:
        found = json.loads(body)
        for each in path:
            found = found[each]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return found


def told(text: str) -> str:
    """Return a text on one line, shortened and with every secret masked."""
    line = " ".join(redact(text).split())
    return line if len(line) <= MAX_TOLD else f"{line[:MAX_TOLD]}..."
