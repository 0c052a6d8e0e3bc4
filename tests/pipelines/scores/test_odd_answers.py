"""Answers of a model and of its server that look like a grade and are none: a failure, never another number."""

import json
import socket
import threading
import time
from typing import Any

import pytest

from pipelines.scores.scorers.chat import Answer, Chat, Server, parse_answer
from pipelines.scores.scorers.graded_vlm import grade_of, probability_of_yes
from pipelines.scores.scorers.result import Failure, Score

URL = "http://vlm:8000/v1"


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Final Score (1-5): 4", 4), ("**Final Score (out of 5):** 4", 4), ("Final Score: 4 (1 is worst)", 4),
        ("Final Score: 4/5", 4), ("Final Score: 4 / 5.0", 4), ("Final Score: 4 out of 5", 4), ("Final Score: 4.", 4),
        ("Final Score is 4", 4), ("Final Score = 4!", 4), ("Final Score:\n\n4\n", 4), ("FINAL  SCORE: `4`", 4),
        ("Final Score: 4/10", None), ("Final Score: 2 out of 10", None), ("Final Score: 1e3", None),
        ("Final Score: 4.5.1", None), ("Final Score: 3,5", None), ("Final Score: 3-4", None),
        ("Final Score: 3 \u2013 4", None), ("Final Score: 4th", None), ("Final Score: N", None),
        ("Final Score (1-5):", None), ("Final Score (1-5)", None), ("Final Score: " + "9" * 400, None),
    ],
)  # fmt: skip
def test_a_grade_is_the_number_that_was_meant(text: str, grade: float | None) -> None:
    """`Final Score (1-5): 4` is a 4, and 4 of 10 is no 4 of 5."""
    found = grade_of(Answer(text), 1, 5)
    assert isinstance(found, Failure) if grade is None else isinstance(found, Score) and found.value == grade


def test_a_last_line_that_is_no_grade_does_not_leave_the_one_before() -> None:
    found = grade_of(Answer("At first I thought Final Score: 2.\nFinal Score: 3-4"), 1, 5)
    assert isinstance(found, Failure)


def test_a_number_that_the_limit_of_tokens_cut_is_no_grade() -> None:
    assert isinstance(grade_of(Answer("Final Score: 1", is_cut=True), 1, 10), Failure)
    assert grade_of(Answer("Final Score: 1\nBecause", is_cut=True), 1, 10) == Score(1.0, {"num_grades": 1.0})


@pytest.mark.parametrize("body", ["[" * 200_000, '{"choices": ' * 100_000, "", "null", '{"choices": {"0": 1}}'])
def test_a_body_that_is_no_answer_is_the_servers_fault(body: str) -> None:
    found = parse_answer(body)
    assert isinstance(found, Failure)
    assert found.transient
    assert len(found.reason) < 300


def _tokens(*logprobs: Any) -> str:
    likeliest = [{"token": "Yes", "logprob": each} for each in logprobs]
    choice = {"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": likeliest}]}}
    return json.dumps({"choices": [choice]})


@pytest.mark.parametrize("logprobs", [(1000.0,), (float("nan"), -1.0), (float("inf"),), (-0.1, -0.1), (0.001, -9999.0)])
def test_a_probability_is_one_or_a_failure(logprobs: tuple[float, ...]) -> None:
    answer = parse_answer(_tokens(*logprobs))
    assert isinstance(answer, Answer)
    found = probability_of_yes(answer, URL)
    assert isinstance(found, Failure) or 0 <= found.value <= 1  # type: ignore[union-attr]


def test_impossible_tokens_and_rounding_are_no_fault() -> None:
    answer = parse_answer(_tokens(1e-7, float("-inf")))
    assert isinstance(answer, Answer)
    found = probability_of_yes(answer, URL)
    assert isinstance(found, Score)
    assert found.value == 1.0


@pytest.mark.parametrize("length", ["Content-Length: 100\r\n", ""])
def test_a_server_that_answers_drop_by_drop_has_no_more_time(length: str) -> None:
    """Each byte comes in time, and the answer as a whole does not."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode())
                for _ in range(60):
                    time.sleep(0.05)
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        chat = Chat(Server(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "tiny", "NO_KEY", 0.3, 0, 1))
        found = chat.ask(b"", "a cat")
        seconds = time.monotonic() - started
        thread.join()
    assert found == Failure("no answer within 0.3 s", transient=True)
    assert seconds < 2
