"""A grade from a server: of the very pixels, never a number for a failure, and asked again only where it was silent."""

import json
import math
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scored_images import formula_files, rows_of, score_here, write_images
from scorer_twins import formula_image

from pipelines.config import EvaluateConfig, ScorerEntry
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.storage import Storage
from pipelines.scores.actor import ScoreWriter
from pipelines.scores.execution import Commits
from pipelines.scores.judges import fingerprint_of, prepare_judges
from pipelines.scores.loaded import load_judge
from pipelines.scores.plan import pending_scores
from pipelines.scores.scorers import Failure, Score, new_scorer
from pipelines.scores.scorers.chat import Answer, Chat, Server
from pipelines.scores.scorers.graded_vlm import grade_of

SERVER = Path(__file__).parents[2] / "support" / "chat_server.py"
KEY = "sk-4dd1e0f9c2b87a65"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Running:
    """A server process, and what it was asked."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.log = folder / f"asked-{time.monotonic_ns()}.jsonl"
        self._process = subprocess.Popen([sys.executable, SERVER, str(self.port), self.log, *options])
        self.url = f"http://127.0.0.1:{self.port}/v1"
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError

    def asked(self, word: str = "") -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        return [line for line in map(json.loads, lines) if word in line["text"]]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


def graded(server: Running, **options: Any) -> Any:
    return new_scorer("graded_vlm", {"url": server.url, "model": "judges/tiny", "timeout_s": 30, **options})


def image_of(number: int) -> Image.Image:
    return formula_image(33 + number, 20, number)


def expected(image: Image.Image) -> float:
    return round(1 + 4 * float(np.asarray(image).mean()) / 255, 3)


def test_a_grade_is_of_the_very_pixels_after_the_rubric(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPO_VLM_API_KEY", KEY)
    images = [image_of(number) for number in range(5)]
    scorer = graded(server, highest=5)
    assert scorer.name == "graded_vlm-tiny"
    found = scorer.score(images, [f"a {{lowest}} cat {number}" for number in range(5)])
    assert [each.value for each in found] == [expected(image) for image in images]
    asked = server.asked("cat 3")
    assert [(each["temperature"], each["model"], each["path"]) for each in asked] == [
        (0.0, "judges/tiny", "/v1/chat/completions")
    ]
    assert asked[0]["key"] == f"Bearer {KEY}"
    assert "made for this prompt: a {lowest} cat 3\n" in asked[0]["text"]
    assert "from 1 (worst) to 5 (best)" in asked[0]["text"]


@pytest.mark.parametrize(
    ("word", "reason", "transient", "num_asked"),
    [
        ("garbage", 'the answer has no "Final Score: N"', False, 1),
        ("endless", 'no "Final Score: N" and was cut off', False, 1),
        ("beyond", "the grade 45 is not in 1..5", False, 1),
        ("refusing", "the model refused: I cannot look at this.", False, 1),
        ("filtered", "the server's content filter", False, 1),
        ("policy", "the server refused", False, 1),
        ("too-large", "HTTP 413", False, 1),
        ("no-json", "the server's answer has no choice", True, 1),
        ("locked", "HTTP 401", True, 1),
        ("broken", "HTTP 500: .*CUDA out of memory", True, 3),
        ("slow", "no answer within 1 s", True, 1),
    ],
)
def test_what_is_no_grade_is_a_failure_and_only_the_servers_own_are_asked_again(
    word: str, reason: str, transient: bool, num_asked: int, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.scores.scorers.chat.FIRST_DELAY_S", 0.01)
    scorer = graded(server, max_retries=2, timeout_s=1 if word == "slow" else 30)
    failure, fine = scorer.score([image_of(1), image_of(2)], [f"a cat {word} of failures", "a dog"])
    assert isinstance(failure, Failure)
    assert failure.transient is transient
    assert re.search(reason, failure.reason), failure.reason
    assert fine.value == expected(image_of(2))
    assert len(server.asked(f"{word} of failures")) == num_asked


def test_a_busy_server_is_asked_again_until_it_answers(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.scores.scorers.chat.FIRST_DELAY_S", 0.01)
    scorer = graded(server, max_retries=3)
    found = scorer.score([image_of(11), image_of(12)], ["a busy street", "a flaky pastry"])
    assert [each.value for each in found] == [expected(image_of(11)), expected(image_of(12))]
    assert [len(server.asked(word)) for word in ("a busy street", "a flaky pastry")] == [3, 2]


def test_no_more_requests_run_at_once_than_allowed(server: Running) -> None:
    images = [image_of(number) for number in range(12)]
    graded(server, concurrency=3).score(images, ["a careful cat"] * 12)
    assert max(each["inside"] for each in server.asked("a careful cat")) == 3


def test_a_rerun_asks_only_for_what_a_killed_server_left_unanswered(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    prompts = [f"a cat {number}" if number != 2 else "garbage" for number in range(12)]
    images = write_images(storage, "a", formula_files(12), prompts)
    first = Running(tmp_path, "--die-after", "6")
    options = {"url": first.url, "model": "tiny", "max_retries": 0, "concurrency": 2}
    entry = ScorerEntry(name="graded_vlm", batch_size=4, options=options)
    judges = prepare_judges([entry], storage)
    writer, commits = ScoreWriter(storage, [load_judge(judges[0], storage, "cpu")]), Commits(storage, judges)
    for unit in pending_scores(storage, judges, images).units:
        commits.add(writer.write(unit.id, unit.rows)[0])
    first.stop()
    before = rows_of(storage, judges[0])
    num_left = 12 - len(before)
    assert num_left >= 6
    assert commits.num_unanswered == {"graded_vlm-tiny": num_left}
    assert commits.num_scored == {"graded_vlm-tiny": len(before)}
    told: list[str] = []
    commits.tell(told.append)
    assert f"graded_vlm-tiny has no answer for {num_left} images, which a rerun asks again" in told[0]
    assert {row["status"] for row in before} <= {"scored", "failed"}
    assert pending_scores(storage, judges, images).total == num_left
    second = Running(tmp_path, port=first.port)
    try:
        score_here(storage, judges, images)
        after = rows_of(storage, judges[0])
        assert len(second.asked()) == num_left
    finally:
        second.stop()
    assert len(after) == 12
    assert [row for row in after if row in before] == before
    assert [row["reason"] is not None for row in after].count(True) == 1, "the garbage alone is final"
    assert pending_scores(storage, judges, images).total == 0


def test_a_dead_server_is_given_up_after_a_while() -> None:
    chat = Chat(Server(f"http://127.0.0.1:{free_port()}/v1", "tiny", "NO_KEY", 5, 0, 1))
    found = [chat.ask(b"", "a cat") for _ in range(18)]
    reasons = [each.reason for each in found if isinstance(each, Failure) and each.transient]
    assert [reason.startswith("no connection: ") for reason in reasons] == [True] * 16 + [False] * 2
    assert "left 16 images in a row unanswered" in reasons[-1]


def test_the_key_is_in_no_reason_and_no_fingerprint(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    prints = {}
    for key in (KEY, "another-" + KEY):
        monkeypatch.setenv("VLM_ACCESS", key)  # a name that says nothing of a secret
        scorer = graded(server, key_variable="VLM_ACCESS")
        (failure,) = scorer.score([image_of(20)], ["a locked door"])
        assert server.asked("a locked door")[-1]["key"] == f"Bearer {key}"
        assert key not in failure.reason
        assert "no such key: Bearer ***" in failure.reason
        prints[key] = fingerprint_of(scorer.shaping({}))
    assert len(set(prints.values())) == 1
    same, url, model = (
        fingerprint_of(graded(server, **other).shaping({}))
        for other in ({"concurrency": 2, "timeout_s": 1, "max_retries": 0}, {"url": "http://other/v1"}, {"model": "b"})
    )
    assert same == prints[KEY]
    assert len({same, url, model, fingerprint_of(graded(server, rubric="{prompt}?").shaping({}))}) == 4


def test_the_probability_of_yes_needs_log_probabilities(server: Running) -> None:
    scorer = graded(server, answer="p_yes")
    likely, neither = scorer.score([image_of(1), image_of(2)], ["a likely cat", "neither of them"])
    assert isinstance(likely, Score)
    assert likely.value == pytest.approx(math.exp(-0.5) + math.exp(-2.0))
    assert likely.components == {"no": pytest.approx(math.exp(-1.5))}
    assert neither == Failure("neither yes nor no is among the 1 likeliest first tokens")
    (asked,) = server.asked("a likely cat")
    assert (asked["max_tokens"], asked["logprobs"], asked["top_logprobs"]) == (1, True, 20)
    with pytest.raises(ModelError, match="gives no log-probabilities") as caught:
        scorer.score([image_of(1)], ["a plain cat"])
    assert "answer: grade" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Final Score: 4", 4), ("**Final Score:** 3.5/5", 3.5), ("final score - 2", 2), ("Final Score: [5]", 5),
        ("At first Final Score: 2, but no.\nFinal Score: 3", 3), ("Final Score: 0", None), ("Final Score: -3", None),
        ("Final Score: four", None), ("Score: 4", None), ("", None), ("Final Score: 1\u20445", 1),
    ],
)  # fmt: skip
def test_a_grade_is_read_from_the_last_line_that_has_one(text: str, grade: float | None) -> None:
    found = grade_of(Answer(text), 1, 5)
    assert isinstance(found, Failure) if grade is None else found.value == grade  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "url: Field required"),
        ({"url": "http://a/v1"}, "model: Field required"),
        ({"url": "a:8000", "model": "b"}, "'a:8000' is not the URL of a server"),
        ({"url": "http://me:secretsecret@a/v1", "model": "b"}, "holds credentials"),
        ({"url": "http://a/v1", "model": "b", "temprature": 1}, "temprature: Extra inputs"),
        ({"url": "http://a/v1", "model": "b", "lowest": 5}, "must be below `highest`"),
        ({"url": "http://a/v1", "model": "b", "rubric": "{promt}"}, "has promt in braces"),
    ],
)
def test_impossible_options_are_refused_before_any_work(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        prepare_judges([ScorerEntry(name="graded_vlm", options=options)], Storage(str(tmp_path)))
    assert caught.value.hint
    assert "secretsecret" not in caught.value.message


def test_url_and_model_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAPO_VLM_URL", "http://vlm:8000/v1")
    monkeypatch.setenv("MAPO_VLM_MODEL", "Qwen/Qwen3-VL-8B-Instruct")
    (judge,) = prepare_judges([ScorerEntry(name="graded_vlm")], Storage(str(tmp_path)))
    assert judge.name == "graded_vlm-Qwen3-VL-8B-Instruct"
    assert (judge.shaping["url"], judge.shaping["model"]) == ("http://vlm:8000/v1", "Qwen/Qwen3-VL-8B-Instruct")


def test_options_change_no_digest_of_configurations_without_them(tmp_path: Path) -> None:
    config = EvaluateConfig.model_validate({"scorers": [{"name": "pickscore", "batch_size": 4}, "saturation"]})
    plain = [{"name": "pickscore", "weights": None, "batch_size": 4}, "saturation"]
    assert config.model_dump(mode="json")["scorers"] == plain
    with_options = ScorerEntry(name="graded_vlm", options={"model": "b"})
    assert with_options.model_dump(mode="json", exclude_defaults=True) == {
        "name": "graded_vlm", "options": {"model": "b"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="the scorer saturation has no options, but strength is set"):
        prepare_judges([ScorerEntry(name="saturation", options={"strength": 1})], Storage(str(tmp_path)))
