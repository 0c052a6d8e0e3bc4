"""`mapo scores vote`: a real server on loopback, votes over HTTP, a kill in between, and nothing that unblinds them."""

import contextlib
import hashlib
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from browser import chromium, needs_chromium
from noise_samples import put_samples
from safetensors.numpy import load_file, save_file

import orchestration
from orchestration.cli import main
from orchestration.config import parse_config
from orchestration.run.context import Run
from orchestration.stages.evaluate import evaluation_of
from orchestration.stages.evaluation import Cell
from orchestration.votes.ballots import Contest
from orchestration.votes.server import VoteServer
from orchestration.votes.voting import Voting
from pipelines.dataset.layout import SAMPLES, SCORES, fingerprints, scores_table
from pipelines.dataset.storage import Storage
from pipelines.samples.execution import read_samples
from pipelines.scores.vote_journal import VoteJournal
from pipelines.scores.votes import Session

PROMPTS = ["a red house", "a blue sea", "two dogs in the snow"]
MODELS = ("secretly-tuned", "plainly-untuned")
WEIGHTS = "diffusion_pytorch_model.safetensors"
BASE = Path(orchestration.__file__).parent / "demo" / "base_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose samples are there: two images of three prompts by two models."""
    folder = tmp_path_factory.mktemp("votes")
    models: list[Any] = ["base"]
    for number, name in enumerate(MODELS, 1):
        write_unet(folder / name / "unet", number)
        models.append({"name": name, "model": str(folder / name), "unet": True})
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "run.yaml").write_text(yaml.safe_dump({
        "name": "small",
        "storage": str(folder / "storage"),
        "encode": {"model": str(BASE), "resolution": 64},
        "evaluate": {"prompts": str(folder / "prompts.txt"), "images_per_prompt": 2, "models": models},
    }))  # fmt: skip
    for number, cell in enumerate(cells(folder)):
        put_samples(Storage(str(folder / "storage")), cell, number)
    return folder


def write_unet(folder: Path, number: int) -> None:
    """Write the demo's UNet with another first weight, so that its samples are its own."""
    folder.mkdir(parents=True)
    shutil.copy(BASE / "unet" / "config.json", folder)
    weights = load_file(BASE / "unet" / WEIGHTS)
    name = min(weights)
    weights[name] = weights[name] + number
    save_file(weights, folder / WEIGHTS)


def cells(folder: Path) -> list[Cell]:
    """What is drawn of both models, in the type of a CPU."""
    text = (folder / "run.yaml").read_text()
    run = Run.open(parse_config(text, ["evaluate.dtype=float32"]), lambda line: None)
    evaluation = evaluation_of(run, None, None)
    models = {model.name: model for model in evaluation.models}
    return [evaluation.cell(evaluation.suites[0], models[name]) for name in MODELS]


def samples(folder: Path) -> list[list[dict[str, Any]]]:
    """The samples of both models."""
    return [read_samples(Storage(str(folder / "storage")), cell.drawing).to_pylist() for cell in cells(folder)]


class Client:
    """A client of the page at a URL."""

    def __init__(self, url: str) -> None:
        self.url = urlsplit(url)

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, *, token: str | None = None, **headers: str
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Send a request, with another token or headers if wanted."""
        connection = http.client.HTTPConnection("127.0.0.1", self.url.port or 0, timeout=60)
        own = token if token is not None else self.url.path.strip("/")
        given = {"Content-Type": "application/json"} if body is not None else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else json.dumps(body)
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", f"/{own}/{path}", data, given)
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())

    def state(self) -> dict[str, Any]:
        status, body, _ = self.ask("state")
        assert status == 200
        return dict(json.loads(body))

    def vote(self, choice: str, position: int | None = None) -> int:
        where = self.state()["position"] if position is None else position
        return self.ask("vote", {"position": where, "choice": choice})[0]


class Voter(Client):
    """A process of the command, and a client of its page."""

    def __init__(self, folder: Path, journal: Path) -> None:
        command = [sys.executable, "-m", "mapo_entry", "scores", "vote", str(folder / "run.yaml"), "--models", *MODELS]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [*command, "--out", str(journal)], stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
        )
        self.lines: list[str] = []
        for line in self.process.stdout:  # type: ignore[union-attr]
            self.lines.append(line.strip())
            if line.startswith("keys"):
                break
        super().__init__(next(line.split()[1] for line in self.lines if line.startswith("open")))

    def end(self, number: signal.Signals | None) -> list[str]:
        """End the process with a signal, or wait for it; return the lines that it wrote since."""
        if number is not None:
            self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=120)
        return [line for line in out.splitlines() if line]


@pytest.fixture
def page(folder: Path, tmp_path: Path) -> Iterator[Client]:
    """The same server in this process."""
    run = Run.open(parse_config((folder / "run.yaml").read_text()), lambda line: None)
    contest = Contest(run, MODELS, None)
    journal = VoteJournal(tmp_path / "page.jsonl", Session("5e" * 16, contest.suite, MODELS, contest.samples, 0))
    ballots = journal.session.in_order(contest.pairing().ballots)
    server = VoteServer(Voting(ballots, journal, run.storage))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Client(server.url)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        journal.close()


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Any]:
    started: list[Voter] = []

    def begin() -> Voter:
        started.append(Voter(folder, tmp_path / "votes.jsonl"))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


def rows_of_votes(folder: Path) -> list[dict[str, Any]]:
    storage = Storage(str(folder / "storage"))
    names = [name for name in fingerprints(storage, SCORES) if name.startswith("votes@")]
    tables = (scores_table(storage, *name.split("@")) for name in names)
    return [row for table in tables for row in table.read().to_pylist()]


def test_votes_survive_a_kill_and_the_same_command_goes_on(folder: Path, tmp_path: Path, start: Any) -> None:
    before = len(rows_of_votes(folder))
    voter = start()
    assert voter.state() | {"prompt": ""} == {"position": 0, "prompt": "", "num_done": 0, "total": 6, "can_undo": False}
    shown = []
    for choice in ("1", "2", "0"):
        shown.append(voter.state()["prompt"])
        assert voter.vote(choice) == 200
    assert voter.vote("1", 1) == 409, "a click that came twice"
    assert voter.ask("undo", {})[0] == 200
    assert voter.vote("s") == 200
    written = (tmp_path / "votes.jsonl").read_bytes()
    voter.end(signal.SIGKILL)
    assert (tmp_path / "votes.jsonl").read_bytes() == written
    assert len(rows_of_votes(folder)) == before, "not committed yet"

    voter = start()
    assert len(rows_of_votes(folder)) == before + 4, "two votes, of both images each; the third was skipped"
    assert any("3 of them done before" in line for line in voter.lines)
    state = voter.state()
    assert (state["position"], state["num_done"], state["can_undo"]) == (3, 3, False)
    assert voter.ask("undo", {})[0] == 409, "what is committed stays"
    assert voter.vote("2") == 200
    lines = voter.end(signal.SIGINT)
    assert voter.process.returncode == 0
    assert "2 pairs are left" in lines[-1]
    assert not any("wins" in line for line in lines), "who leads is not told before the last vote"

    voter = start()
    for _ in range(2):
        shown.append(voter.state()["prompt"])
        assert voter.vote("1") == 200
    assert voter.state()["position"] is None
    assert voter.vote("1", 5) == 409
    assert voter.ask("finish", {})[0] == 200
    lines = voter.end(None)
    assert voter.process.returncode == 0
    assert re.search(
        r"secretly-tuned wins \d+\.\d % of 3 prompts against plainly-untuned", lines[-1].replace("%", " %", 1)
    )
    rows = rows_of_votes(folder)[before:] if before else rows_of_votes(folder)
    assert len(rows) == 10
    _expect_journal_and_images(folder, tmp_path / "votes.jsonl", rows)


def _expect_journal_and_images(folder: Path, journal: Path, rows: list[dict[str, Any]]) -> None:
    """Every vote says of the images that were on these sides what the person said."""
    first, second = (read_samples(Storage(str(folder / "storage")), cell.drawing).to_pylist() for cell in cells(folder))
    images = {f"{a['prompt_id']}/{a['index']}": (a["sha256"], b["sha256"]) for a, b in zip(first, second, strict=True)}
    values = {row["image_sha256"]: row["value"] for row in rows}
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    undone = {line["undo"] for line in lines if "undo" in line}
    votes = {line["ballot"]: line for line in lines if "ballot" in line}
    assert len(undone) == 1
    choices = {"1": 0, "2": 1}
    typed = iter(["1", "2", "s", "2", "1", "1"])
    for vote, key in zip(votes.values(), typed, strict=True):
        shas = images[vote["ballot"]]
        if key == "s":
            assert not {*shas} & values.keys()
            continue
        preferred = vote["left"] if choices[key] == 0 else 1 - vote["left"]
        assert (values[shas[preferred]], values[shas[1 - preferred]]) == (1.0, 0.0)


def test_nothing_that_is_served_says_which_model_is_which(folder: Path, page: Client) -> None:
    drawn = {row["sha256"]: (number, row["prompt"]) for number, each in enumerate(samples(folder)) for row in each}
    told = [*MODELS, "prompts@1", "run.yaml", SAMPLES, *drawn, *(cell.drawing.fingerprint for cell in cells(folder))]
    lefts = []
    for position in range(6):
        texts = [page.ask(path) for path in ("", "vote.js", "vote.css", "state")]
        sides = [page.ask(f"image/{position}/{side}") for side in ("1", "2")]
        for status, body, headers in (*texts, *sides):
            assert status == 200
            said = ("" if headers["Content-Type"] == "image/png" else body.decode()) + str(headers)
            assert [name for name in told if name in said] == []
            assert headers["Cache-Control"] == "no-store"
        models = [drawn[hashlib.sha256(body).hexdigest()] for _, body, _ in sides]
        assert sorted(number for number, _ in models) == [0, 1]
        assert {prompt for _, prompt in models} == {page.state()["prompt"]}, "both are of the prompt that is shown"
        lefts.append(models[0][0])
        assert page.vote("s") == 200
    assert set(lefts) == {0, 1}, "neither model is always on the left"
    for wrong in (
        "image/6/1",
        "image/-1/1",
        "image/0/3",
        "image/0",
        "image/x/1",
        "image/0/1/2",
        "../state",
        "votes.py",
    ):
        assert page.ask(wrong)[0] == 404, wrong


KEYS = """
<iframe src="TOKEN/" style="width:390px;height:800px;border:0"></iframe><script>
const wait = () => fetch('TOKEN/state').then(answer => answer.text()) // real time: timers run ahead of the network
onload = async () => {
  const page = frames[0], doc = page.document, said = []
  const ready = async () => { // until both images are there
    for (let i = 0; i < 300 && doc.querySelector('[data-choice="1"]').disabled; i++) await wait()
  }
  for (const key of ['1', '2', 'u', 's', 'x', '0']) {
    await ready()
    doc.dispatchEvent(new page.KeyboardEvent('keydown', { key }))
    await ready()
    said.push(doc.getElementById('count').textContent.split(' ')[0])
  }
  doc.querySelector('[data-choice="1"]').click()
  await ready()
  said.push(doc.getElementById('count').textContent, doc.getElementById('error').textContent,
            doc.documentElement.scrollWidth)
  const out = document.createElement('pre')
  out.id = 'out'
  out.textContent = said.join('|')
  document.body.append(out)
}</script>
"""


def proxy_of(page: Client) -> type[http.server.BaseHTTPRequestHandler]:
    """A server of the page in a frame, which the page itself forbids."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/look.html":
                self.answer(200, KEYS.replace("TOKEN", page.url.path.strip("/")).encode(), "text/html")
            else:
                self.forward(None)

        def do_POST(self) -> None:
            self.forward(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def forward(self, body: Any) -> None:
            status, data, headers = page.ask(self.path.split("/", 2)[2], body)
            self.answer(status, data, headers["Content-Type"])

        def answer(self, status: int, data: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    return Proxy


@needs_chromium
def test_the_keys_vote_undo_and_skip(page: Client, tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), proxy_of(page))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        done = chromium(tmp_path, f"http://127.0.0.1:{server.server_port}/look.html")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    assert found[1].split("|") == ["1", "2", "1", "2", "2", "3", "4 of 6 pairs are done", "", "390"]
    assert re.findall(r"CONSOLE.*", done.stderr) == []
    lines = [json.loads(line) for line in (tmp_path / "page.jsonl").read_text().splitlines()[1:]]
    said = [("undo" if "undo" in line else line["value"], line.get("left")) for line in lines]
    better = [1.0 if left == 0 else 0.0 for _, left in said]
    assert [value for value, _ in said] == [better[0], 1 - better[1], "undo", None, 0.5, better[5]]


def test_strangers_are_refused(page: Client) -> None:
    port = page.url.port
    assert page.url.hostname == "127.0.0.1"
    for token in ("", "x", page.url.path.strip("/")[:-1], page.url.path.strip("/") + "x", "%2e%2e"):
        for path in ("", "state", "image/0/1"):
            status, body, _ = page.ask(path, token=token)
            assert (status, body) == (404, b"Not Found"), token
        assert page.ask("vote", {"position": 0, "choice": "1"}, token=token)[0] == 404
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""):
        assert page.ask("state", Host=host)[0] == 421, host
        assert page.ask("vote", {"position": 0, "choice": "1"}, Host=host)[0] == 421
    assert page.ask("state", Host=f"localhost:{port}")[0] == 200
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{(port or 0) + 1}"):
        assert page.ask("vote", {"position": 0, "choice": "1"}, Origin=origin)[0] == 403
    own = f"http://127.0.0.1:{port}"
    assert page.ask("vote", {"position": 0, "choice": "1"}, Content_Type="text/plain")[0] == 403
    assert page.ask("vote", {"position": 0, "choice": "x" * 2000})[0] == 403, "too long"
    for bad in ({"position": 0, "choice": "3"}, {"position": "0", "choice": "1"}, {"choice": "1"}):
        assert page.ask("vote", bad)[0] == 400
    assert page.ask("nothing", {})[0] == 400
    assert page.state()["num_done"] == 0, "none of these was counted"
    assert page.ask("vote", {"position": 0, "choice": "1"}, Origin=own)[0] == 200


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--models", "base", "nobody"], 2, "there is no model nobody"),
        (["--models", "base", "base"], 2, "base is compared with itself"),
        (["--models", "base", "step-20"], 2, "there is no model step-20"),
        (["--models", *MODELS, "--suite", "geneval"], 2, "there is no suite geneval"),
        (["--models", *MODELS, "--port", "http"], 2, "--port http: not a port"),
        (["--models", *MODELS, "--port", "70000"], 2, "not a port"),
        (["--models", *MODELS, "-o", "evaluate.num_inference_steps=2"], 1, "not drawn yet: 6 of secretly"),
        (["--models", *MODELS, "--out", "/none/such/votes.jsonl"], 2, "cannot write the journal"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_at_once(
    folder: Path, options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["scores", "vote", str(folder / "run.yaml"), *options]) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_suite_is_found_with_and_without_its_version(folder: Path) -> None:
    config = parse_config((folder / "run.yaml").read_text())
    run = Run.open(config, lambda line: None)
    found = [Contest(run, MODELS, name) for name in (None, "prompts")]
    assert {contest.suite for contest in found} == {"prompts@1"}
    assert found[0].samples == found[1].samples == tuple(cell.drawing.fingerprint for cell in cells(folder))
