"""Files of prompts: every kind gives the same prompts, and whatever is wrong is said with its line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import PromptFile
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.pair import prompt_id
from pipelines.dataset.storage import Storage
from pipelines.samples.prompts import Prompt, limit_prompts, read_prompts

TEXTS = ["a cat, sitting", 'a "red" house', "ein Hündchen", "a cat, sitting", "\u201ccurly\u201d\u2028and strange"]
DISTINCT = [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[4]]


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def write(file: Path, texts: list[str]) -> Path:
    """The texts in the form of the file's suffix."""
    if file.suffix == ".parquet":
        pq.write_table(pa.table({"prompt": texts}), file)
        return file
    lines = {
        ".txt": texts,
        ".jsonl": [json.dumps({"prompt": text}) for text in texts],
        ".csv": ["id,prompt", *(f"{i},{quoted(text)}" for i, text in enumerate(texts))],
        ".tsv": ["prompt\tid", *(f"{quoted(text)}\t{i}" for i, text in enumerate(texts))],
    }[file.suffix]
    file.write_bytes("\n".join([*lines, ""]).encode())
    return file


def read(file: Path | str, seed: int = 0, **options: Any) -> list[Prompt]:
    return read_prompts(PromptFile(path=str(file), **options), seed)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".parquet", ".TXT"])
def test_every_kind_of_file_gives_its_distinct_prompts_in_order(suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"prompts{suffix.lower()}", TEXTS).rename(tmp_path / f"p{suffix}")
    assert read(file) == [Prompt(prompt_id(text), text) for text in DISTINCT]


def test_line_ends_marks_and_empty_lines_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n  \r\na dog ")
    assert [each.prompt for each in read(tmp_path / "windows.txt")] == ["a cat", "a dog "]
    (tmp_path / "excel.csv").write_bytes(b'\xef\xbb\xbfprompt;id\r\n"a, cat";1\r\n'.replace(b";", b","))
    assert [each.prompt for each in read(tmp_path / "excel.csv")] == ["a, cat"]


def test_tags_are_kept_as_a_text_or_a_list(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "tags": "Animals, wild"}, {"prompt": "b", "tags": ["x", "y", "x"]}, {"prompt": "c"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = [("Animals, wild",), ("x", "y"), ()]
    assert [each.tags for each in read(tmp_path / "p.jsonl")] == expected
    pq.write_table(
        pa.table({"prompt": ["a", "b", "c"], "tags": [["Animals, wild"], ["x", "y"], None]}), tmp_path / "p.parquet"
    )
    assert [each.tags for each in read(tmp_path / "p.parquet")] == expected
    (tmp_path / "p.csv").write_text("tags,prompt\nx,a\n,b\n")
    assert [each.tags for each in read(tmp_path / "p.csv")] == [("x",), ()]


def test_another_column_and_a_url(tmp_path: Path, s3_storage: Storage) -> None:
    s3_storage.write("sets/own.csv", b"caption,prompt\na cat,no\n")
    assert [each.prompt for each in read(s3_storage.uri("sets/own.csv"), column="caption")] == ["a cat"]
    with pytest.raises(ConfigError, match="there is no file s3://"):
        read(s3_storage.uri("sets/other.csv"))


def test_a_longer_limit_has_the_shorter_one_first_and_another_seed_other_prompts(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", [f"prompt {i}" for i in range(100)])
    ten, twenty = read(file, limit=10), read(file, limit=20)
    assert twenty[:10] == ten
    assert len({each.prompt_id for each in twenty}) == 20
    assert read(file, seed=1, limit=10) != ten
    assert len(read(file, limit=1000)) == 100


@given(st.lists(st.text(min_size=1), max_size=30, unique=True), st.integers(1, 30), st.integers(0, 3))
def test_a_limit_depends_on_the_set_of_prompts_alone(texts: list[str], limit: int, seed: int) -> None:
    prompts = [Prompt(prompt_id(text), text) for text in texts]
    assert limit_prompts(prompts, limit, seed) == limit_prompts(prompts[::-1], limit, seed)
    assert limit_prompts(limit_prompts(prompts, limit, seed), limit, seed) == limit_prompts(prompts, limit, seed)


@pytest.mark.parametrize(
    ("name", "data", "words", "hint"),
    [
        ("p.docx", b"x", "p.docx is not a file of prompts that mapo reads", ".jsonl"),
        ("p", b"x", "is not a file of prompts", ".parquet"),
        ("p.txt", b"", "p.txt has no prompts", "one prompt a line"),
        ("p.txt", b"\n  \n", "has no prompts", "one prompt a line"),
        ("p.jsonl", b"\n", "has no prompts", ""),
        ("p.csv", b"prompt\n", "has no prompts", ""),
        ("p.csv", b"", "has no column `prompt`; its columns are: none", "`column`"),
        ("p.csv", b"text,id\na,1\n", "has no column `prompt`; its columns are: text, id", "`column`"),
        ("p.jsonl", b'{"text": "a"}\n', "has no column `prompt`; its columns are: text", "`column`"),
        ("p.txt", b"a cat\n\nM\xe4dchen\n", "cannot use line 3: not UTF-8", "save the file as UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', "cannot use line 2: not valid JSON", "one JSON object"),
        ("p.jsonl", b'{"prompt": "a"}\n\n["b"]\n', "cannot use line 3: not a JSON object", '{"prompt": "a cat"}'),
        ("p.jsonl", b'{"prompt": "a"}\n{"x": 1}\n', "cannot use line 2: there is no `prompt`", "remove the line"),
        ("p.jsonl", b'{"prompt": 7}\n', "cannot use line 1: `prompt` is 7", "not empty"),
        ("p.jsonl", b'{"prompt": " "}\n', "cannot use line 1: `prompt` is ' '", "not empty"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "cannot use line 1: not text", "remove the line"),
        ("p.jsonl", b'{"prompt": "a", "tags": {"x": 1}}\n', "line 1: `tags` is {'x': 1}", "a list of texts"),
        ("p.csv", b"id,prompt\n1,a\n2\n", "cannot use line 3: there is no `prompt`", "remove the line"),
        ("p.csv", b'prompt\n"a\nb\n', "cannot use line 2: unexpected end of data", "quoted"),
        ("p.parquet", b"PAR1 not really", "cannot read", "complete"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(name: str, data: bytes, words: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / name)
    assert words in caught.value.message
    assert hint in str(caught.value.hint)


def test_what_is_wrong_with_a_parquet_file_is_said(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match="has no column `prompt`; its columns are: text"):
        read(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match="cannot use line 2: there is no `prompt`"):
        read(tmp_path / "p.parquet")


def test_a_missing_file_is_named_with_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"there is no file {tmp_path}/nowhere.txt"):
        read("nowhere.txt")
