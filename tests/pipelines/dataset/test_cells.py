"""Image cells: whatever they name is fetched with limits or has its own reason; nothing private is reached."""

import base64
import http.server
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import encoded, picture

from pipelines.config import SourceConfig
from pipelines.dataset import storage as storage_module
from pipelines.dataset.errors import SourceError
from pipelines.dataset.pair import Reason
from pipelines.dataset.shard import write_shard
from pipelines.dataset.storage import Storage
from pipelines.sources import urls
from pipelines.sources.cells import Cells
from pipelines.sources.unit import SourceFile
from pipelines.sources.urls import UrlLimits, fetch_url

IMAGE = encoded(picture(np.random.default_rng(0), 32, 32))
LIMITS = UrlLimits(timeout_s=0.3, max_bytes=10_000, allow_private=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "root" / "deep").mkdir(parents=True)
    (tmp_path / "root" / "deep" / "a.jpg").write_bytes(IMAGE)
    (tmp_path / "root" / "with space.jpg").write_bytes(IMAGE)
    (tmp_path / "secret.jpg").write_bytes(IMAGE)
    return tmp_path / "root"


def cells(folder: Path, **options: Any) -> Cells:
    file = SourceFile(f"file://{folder}/pairs.jsonl", 0, "")
    return Cells(SourceConfig(format="jsonl", path=str(folder), **options), file)


def test_bytes_structs_paths_and_data_uris_give_the_same_image(folder: Path) -> None:
    read = cells(folder).read
    text = base64.b64encode(IMAGE).decode()
    for cell in (
        IMAGE, {"bytes": IMAGE, "path": "gone.jpg"}, {"bytes": None, "path": b"deep/a.jpg"}, {"path": "deep/a.jpg"},
        {"bytes": text}, "deep/a.jpg", "./deep/../deep/a.jpg", "with space.jpg", f"{folder}/deep/a.jpg",
        f"data:image/jpeg;base64,{text}", text,
    ):  # fmt: skip
        assert read(cell) == IMAGE
    assert read(None) is None
    assert read({"bytes": None, "path": None}) is None


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("../secret.jpg", Reason.IMAGE_OUTSIDE), ("deep/../../secret.jpg", Reason.IMAGE_OUTSIDE),
        ("/etc/passwd", Reason.IMAGE_OUTSIDE), ("..", Reason.IMAGE_OUTSIDE), ("a\0b.jpg", Reason.IMAGE_OUTSIDE),
        ("gone.jpg", Reason.MISSING_IMAGE), ("deep", Reason.MISSING_IMAGE), ("deep/a.jpg/b.jpg", Reason.MISSING_IMAGE),
        ("https://example.com/a.jpg", Reason.URL_NOT_ALLOWED), ("file:///etc/passwd", Reason.URL_NOT_ALLOWED),
        (7, Reason.NOT_AN_IMAGE), ([1], Reason.NOT_AN_IMAGE), ("data:image/png;base64,@@", Reason.NOT_AN_IMAGE),
        (b"x" * 6000, Reason.IMAGE_TOO_LARGE), ({"bytes": "no base64!"}, Reason.NOT_AN_IMAGE),
        ({"bytes": b"x" * 6000}, Reason.IMAGE_TOO_LARGE), ({"bytes": [255, 216]}, Reason.NOT_AN_IMAGE),
        ("B" * 300, Reason.MISSING_IMAGE), ("a/" * 600 + "a.jpg", Reason.MISSING_IMAGE),
        ("\ud800.jpg", Reason.MISSING_IMAGE),  # a lone surrogate, as JSON can hold it
    ],
    ids=ascii,
)  # fmt: skip
def test_what_gives_no_image_has_its_own_reason(folder: Path, cell: object, reason: Reason) -> None:
    assert cells(folder, max_image_bytes=5000).read(cell) is reason


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "local:///etc/passwd",
        "tar://a::s3://b",
        "zip://x",
        "ftp://h/a",
        "s3://b::file:///etc/passwd",
    ],
)
def test_an_address_never_reads_this_machines_files(folder: Path, url: str) -> None:
    assert cells(folder, allow_urls=True).read(url) is Reason.URL_NOT_ALLOWED


def test_members_of_tars_are_found_by_name(folder: Path) -> None:
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            info = tarfile.TarInfo(f"images/{number}.jpg")
            info.size = len(IMAGE) + number
            tar.addfile(info, BytesIO(IMAGE + b"\0" * number))
    read = cells(folder, images=f"{folder}/*.tar").read
    assert read("images/0.jpg") == IMAGE
    assert read("images/1.jpg") == IMAGE + b"\0"
    assert read("images/2.jpg") is Reason.MISSING_IMAGE
    with pytest.raises(SourceError, match=r"no file matches .*/none-\*\.tar"):
        cells(folder, images=f"{folder}/none-*.tar").read("a.jpg")


def test_a_name_that_two_tars_have_is_an_error_and_never_a_guess(folder: Path) -> None:
    for number in range(2):
        write_shard(folder / f"{number}.tar", [("README", b"1"), (f"{number}.jpg", IMAGE), ("same.jpg", IMAGE)])
    read = cells(folder, images=f"{folder}/*.tar").read
    assert (read("0.jpg"), read("1.jpg")) == (IMAGE, IMAGE)
    with pytest.raises(SourceError, match=r"same\.jpg is in both .*/0\.tar and .*/1\.tar"):
        read("same.jpg")


@pytest.mark.parametrize("cut", [True, False])
def test_image_tars_that_are_cut_or_damaged_are_named_before_an_image_is_missed(folder: Path, cut: bool) -> None:
    members, _, _ = write_shard(folder / "a.tar", [(f"{i}.jpg", IMAGE) for i in range(3)])
    data, header = (folder / "a.tar").read_bytes(), members[1].offset - 512
    (folder / "a.tar").write_bytes(data[:header] if cut else data[:header] + b"\xff" * 512 + data[header + 512 :])
    with pytest.raises(SourceError, match=r"cannot read .*a\.tar: not a complete tar"):
        cells(folder, images=f"{folder}/a.tar").read("0.jpg")


def test_images_on_object_storage_are_read_by_path_by_address_and_out_of_tars(
    s3_storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    write_shard(folder / "a.tar", [("in/tar.jpg", IMAGE)])
    s3_storage.write("deep/a b.jpg", IMAGE)
    s3_storage.upload("a.tar", folder / "a.tar")
    read = cells(folder, images=s3_storage.url, allow_urls=True).read
    assert read("deep/a b.jpg") == read(f"{s3_storage.url}/deep/a b.jpg") == IMAGE
    gone = ("gone.jpg", "deep", f"{s3_storage.url}/gone.jpg", "s3://no-such-bucket-at-all/a.jpg")
    assert {read(cell) for cell in gone} == {Reason.MISSING_IMAGE}
    assert read("../a.jpg") is Reason.IMAGE_OUTSIDE
    assert cells(folder, images=f"{s3_storage.url}/*.tar").read("in/tar.jpg") == IMAGE
    assert cells(folder, images=s3_storage.url).read(f"{s3_storage.url}/a.tar") is Reason.URL_NOT_ALLOWED

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.0)
    S3FileSystem.clear_instance_cache()
    with pytest.raises(SourceError, match=r"cannot look up s3://.*/gone\.jpg: .*127\.0\.0\.1:9"):
        cells(folder, images=s3_storage.url).read("gone.jpg")


class Site(http.server.BaseHTTPRequestHandler):
    """Answers by path; counts what it was asked."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        answer: Callable[[], None] = getattr(self, self.path.strip("/").split("?")[0].split("/")[0])
        answer()

    def _send(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def image(self) -> None:
        self._send(200, IMAGE)

    def cut(self) -> None:
        self._send(200, IMAGE[:100], length=len(IMAGE))

    def large(self) -> None:
        self._send(200, b"x" * 20_000)

    def gone(self) -> None:
        self._send(404)

    def forbidden(self) -> None:
        self._send(403)

    def busy(self) -> None:
        self._send(503 if len(self.asked) < 3 else 200, b"" if len(self.asked) < 3 else IMAGE)

    def down(self) -> None:
        self._send(500)

    def loop(self) -> None:
        self._send(302, Location="/loop")

    def moved(self) -> None:
        self._send(301, Location="/image")

    def inside(self) -> None:
        self._send(302, Location="http://169.254.169.254/latest/meta-data")

    def nowhere(self) -> None:
        self._send(302, Location="http://[::1")

    def files(self) -> None:
        self._send(302, Location="file:///etc/passwd")

    def stalled(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x")
        self.wfile.flush()
        self.server.stopping.wait(5)  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(urls, "FIRST_WAIT_S", 0.0)
    Site.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.stopping = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.stopping.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "wanted", "attempts"),
    [
        ("image", IMAGE, 1), ("image?a=b&c", IMAGE, 1), ("moved", IMAGE, 2), ("busy", IMAGE, 3),
        ("cut", Reason.UNREACHABLE_IMAGE, 4), ("stalled", Reason.UNREACHABLE_IMAGE, 4),
        ("down", Reason.UNREACHABLE_IMAGE, 4), ("large", Reason.IMAGE_TOO_LARGE, 1), ("gone", Reason.MISSING_IMAGE, 1),
        ("forbidden", Reason.UNREACHABLE_IMAGE, 1), ("loop", Reason.UNREACHABLE_IMAGE, 6),
        ("nowhere", Reason.UNREACHABLE_IMAGE, 1),
        ("files", Reason.URL_NOT_ALLOWED, 1),
    ],
)  # fmt: skip
def test_an_address_gives_its_image_or_a_reason_within_its_limits(
    site: str, path: str, wanted: object, attempts: int
) -> None:
    assert fetch_url(f"{site}/{path}", LIMITS) == wanted
    assert len(Site.asked) == attempts


def test_a_private_address_is_not_reached_directly_or_by_a_redirect(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = UrlLimits(0.5, 10_000, allow_private=False)
    port = site.rsplit(":", 1)[1]
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "10.0.0.1", "192.168.0.1", "169.254.169.254",
                 "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[fd00::1]", "2130706433"):  # fmt: skip
        assert fetch_url(f"http://{host}:{port}/image", limits) is Reason.URL_NOT_ALLOWED, host
    assert Site.asked == []
    checked, real = [], urls.checked_address

    def only_the_first_is_allowed(host: str, port: int, allow_private: bool) -> str:
        checked.append(host)
        return real(host, port, allow_private or len(checked) == 1)

    monkeypatch.setattr(urls, "checked_address", only_the_first_is_allowed)
    assert fetch_url(f"{site}/inside", limits) is Reason.URL_NOT_ALLOWED
    assert checked == ["127.0.0.1", "169.254.169.254"]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "2130706433", "0x7f.1", "0.0.0.0", "10.0.0.1", "100.64.0.1", "169.254.169.254", "224.0.0.1",
        "255.255.255.255", "[::1]", "[::]", "[::ffff:10.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]", "[2001:0:7f00:1::]", "[fc00::1]", "[ff02::1]", "user:word@127.0.0.1", "localhost",
    ],
)  # fmt: skip
def test_no_way_to_write_a_private_address_is_followed(host: str) -> None:
    assert fetch_url(f"http://{host}/a.jpg", UrlLimits(0.3, 1000, allow_private=False)) is Reason.URL_NOT_ALLOWED


def test_the_connection_goes_to_the_address_that_was_checked(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to another address the second time must not be resolved a second time."""
    resolved = []
    real = socket.getaddrinfo

    def rebinding(host: str, *args: Any, **options: Any) -> Any:
        if host == "images.example":
            resolved.append(host)
            assert len(resolved) == 1, "resolved again"
            host = "127.0.0.1"
        return real(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    port = site.rsplit(":", 1)[1]
    assert fetch_url(f"http://images.example:{port}/image", LIMITS) == IMAGE


def test_nobody_there_is_unreachable_and_allowed_sources_go_through(site: str, folder: Path) -> None:
    assert fetch_url("http://127.0.0.1:9/a.jpg", LIMITS) is Reason.UNREACHABLE_IMAGE
    assert fetch_url("http://[broken", LIMITS) is Reason.UNREACHABLE_IMAGE
    assert cells(folder, allow_urls=True).read(f"{site}/image") is Reason.URL_NOT_ALLOWED
    assert cells(folder, allow_urls=True, allow_private_urls=True).read(f"{site}/image") == IMAGE
