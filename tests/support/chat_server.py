"""A server that speaks OpenAI's chat protocol and does what words of the text say, in a process of its own.

`chat_server.py PORT LOG [--die-after COUNT]`: each request is a line of LOG. The grade follows from the pixels.
"""

import argparse
import base64
import io
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

options = argparse.ArgumentParser()
options.add_argument("port", type=int)
options.add_argument("log", type=Path)
options.add_argument("--die-after", type=int, default=10**9)
given = options.parse_args()
lock, asked, inside = threading.Lock(), dict[str, int](), dict[str, int]()
"""How often each image was asked for, and how many requests with each text are being answered."""


def grade(png: bytes) -> float:
    """1 for black to 5 for white."""
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return round(1 + 4 * float(np.asarray(image).mean()) / 255, 3)


def answer(text: str, number: float, count: int) -> tuple[int, Any, dict[str, str]]:
    """Return status, body and headers."""
    fine = choice(f"It is **fine**.\nFinal Score: {number}")
    words = {
        "garbage": (200, choice("A lovely picture, ten of ten!"), {}),
        "beyond": (200, choice("Final Score: 45"), {}),
        "refusing": (200, choice(None, refusal="I cannot look at this."), {}),
        "filtered": (200, choice("", finish_reason="content_filter"), {}),
        "endless": (200, choice("Let me think and think", finish_reason="length"), {}),
        "policy": (400, {"error": {"code": "content_policy_violation", "message": "no"}}, {}),
        "too-large": (413, {"error": {"message": "too large"}}, {}),
        "no-json": (200, "<html>a proxy</html>", {}),
        "broken": (500, {"error": {"message": "CUDA out of memory"}}, {}),
        "locked": (401, {"error": {"message": "no such key: KEY"}}, {}),
        "busy": (429, {}, {"Retry-After": "0"}) if count < 3 else (200, fine, {}),
        "flaky": (503, {}, {}) if count < 2 else (200, fine, {}),
        "likely": (200, choice("Yes", tokens={"Yes": -0.5, " yes": -2.0, "No": -1.5, "Maybe": -3.0}), {}),
        "neither": (200, choice("Maybe", tokens={"Maybe": -0.1}), {}),
    }
    return next((found for word, found in words.items() if word in text), (200, fine, {}))


def choice(content: str | None, *, refusal: str | None = None, finish_reason: str = "stop", tokens: Any = None) -> Any:
    """Return a body of the protocol."""
    found: dict[str, Any] = {"message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
    if refusal:
        found["message"]["refusal"] = refusal
    if tokens:
        likeliest = [{"token": token, "logprob": logprob} for token, logprob in tokens.items()]
        found["logprobs"] = {"content": [{"top_logprobs": likeliest}]}
    return {"choices": [found]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = body["messages"][0]["content"]
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        number, key = grade(base64.b64decode(data)), self.headers.get("Authorization")
        with lock:
            inside[text["text"]] = inside.get(text["text"], 0) + 1
            asked[data] = asked.get(data, 0) + 1
            count = asked[data]
            line = {
                "grade": number,
                "text": text["text"],
                "key": key,
                "inside": inside[text["text"]],
                "path": self.path,
            }
            line |= {name: each for name, each in body.items() if name != "messages"}
            with given.log.open("a") as opened:
                opened.write(json.dumps(line) + "\n")
            if sum(asked.values()) > given.die_after:
                os._exit(1)
        try:
            if "slow" in text["text"]:
                time.sleep(4)
            if "careful" in text["text"]:
                time.sleep(0.05)
            status, found, headers = answer(text["text"], number, count)
        finally:
            with lock:
                inside[text["text"]] -= 1
        out = (found if isinstance(found, str) else json.dumps(found)).replace("KEY", str(key)).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(out))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(out)


ThreadingHTTPServer.request_queue_size = 64
ThreadingHTTPServer(("127.0.0.1", given.port), Handler).serve_forever()
