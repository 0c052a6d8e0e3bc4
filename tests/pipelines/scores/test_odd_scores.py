"""Odd files of imported scores: read as they are meant, or refused with their place; never an error of our own."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.dataset.errors import ConfigError, SourceError
from pipelines.scores.foreign import ForeignFile, ForeignScore, read_foreign

IMAGE = {"image_sha256": "a" * 64, "prompt_id": "b" * 32}
FAILED = {**IMAGE, "value": None, "status": "failed"}


def read(tmp_path: Path, data: bytes) -> ForeignFile:
    file = tmp_path / "scores.jsonl"
    file.write_bytes(data)
    return read_foreign(file)


def line(value: str = "1", **more: Any) -> bytes:
    """A line whose value is written as it is given."""
    start = json.dumps({**IMAGE, **more}, ensure_ascii=False).removesuffix("}")
    return f'{start}, "value": {value}}}\n'.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_a_separator_inside_of_a_text_ends_no_line(separator: str, tmp_path: Path) -> None:
    (score,) = read(tmp_path, line("null", status="failed", reason=f"out of{separator}memory")).scores
    assert score.reason == f"out of{separator}memory"


def test_a_mark_of_utf8_and_line_ends_of_windows_are_no_part_of_a_row(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + line("0.5") + line("2", image_sha256="c" * 64)
    assert [each.value for each in read(tmp_path, data.replace(b"\n", b"\r\n")).scores] == [0.5, 2.0]


@pytest.mark.parametrize("value", ["1" + "0" * 400, "-1" + "0" * 5000, "1e400", "1e39", "-3.5e38"])
def test_a_value_beyond_float32_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"line 1: (`value` is .*float32|not a JSON object)") as found:
        read(tmp_path, line(value))
    assert len(str(found.value)) < 1000
    named = f'{{"a": {value}}}'
    (score,) = read(tmp_path, line(components={"b": 1})).scores
    assert score.components == '{"b": 1.0}'
    if len(value) < 1000:
        (score,) = read(tmp_path, line(components=named)).scores
        assert score.components == '{"a": null}'


def test_values_at_the_ends_of_float32_are_taken(tmp_path: Path) -> None:
    for value in ("3.4028234663852886e38", "-3.4028234663852886e38", "5e-324", "-0.0"):
        assert read(tmp_path, line(value)).scores[0].value == float(value)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000,
        line(components="[" * 200_000),
        line(components="{"),
        line("null", status="failed", reason=3),
        line("null", status="failed", reason=["x"]),
        line(scorer=["a"]),
        line(scorer=3),
        line(fingerprint={}),
        line().replace(b'"value"', b'"reason": "\\ud800", "status": "failed", "value"'),
        line().replace(b'"value"', b'"scorer": "\\ud800", "value"'),
        b"<!doctype html>\n<title>404</title>\n",
    ],
)
def test_a_line_that_is_no_score_is_refused_with_its_place(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="line 1: ") as found:
        read(tmp_path, data)
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize("name", ["", "  ", "a@b", "\udcff"])
def test_a_name_that_no_configuration_can_give_is_refused(name: str) -> None:
    score = ForeignScore("a" * 64, "b" * 32, 1.0, "{}", "scored", None, "line 1")
    with pytest.raises(ConfigError, match="no configuration can name"):
        ForeignFile("s.jsonl", (score,)).named(name, "UniDet")
