"""A server of weights that falls silent ends a fetch in one error."""

import dataclasses
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.dataset.errors import ModelError
from pipelines.scores import downloads
from pipelines.scores.parts import PARTS


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that sends nothing for `/none`, and half of what it states for others."""
    is_over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/none":
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b"x" * 50)
                self.wfile.flush()
            is_over.wait(30)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    is_over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("path", ["/none", "/half"])
def test_a_silent_server_is_given_up(path: str, silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT_S", 0.2)
    name, file = next((name, file) for name, part in PARTS.items() for file in part.files if file.url)
    with pytest.raises(ModelError, match=f"cannot fetch .* of {name} from http.*[Tt]imed out") as found:
        downloads.bring(name, dataclasses.replace(file, url=silent + path), tmp_path, "imagereward")
    assert "--from FOLDER" in str(found.value.hint)
