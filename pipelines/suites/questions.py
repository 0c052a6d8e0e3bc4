"""Questions about the images of prompts, and the words of prompts, as a parser found them once.

A file has one JSON object a line: first `{"parser": "en_core_web_sm 3.5.0, ..."}`, then for each prompt
`{"prompt": ..., "questions": [...], "words": [[text, part of speech], ...]}`, where `words` may be left out. Another
version of a parser gives other questions, and thus other scores: its name is part of a protocol.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.dataset.errors import SourceError

HINT = "make it with benchmarks/compbench_questions.py"


@dataclass(frozen=True)
class Word:
    """A word of a prompt and its part of speech, such as NOUN or ADJ."""

    text: str
    part: str


@dataclass(frozen=True)
class Questions:
    """What a parser found in prompts.

    Args:
        parser: The parser and its version.
        asked: prompt -> questions about its images.
        words: prompt -> its words; without prompts whose words are not in the file.
        sha256: Digest of the file.
    """

    parser: str
    asked: Mapping[str, list[str]]
    words: Mapping[str, list[Word]] = field(default_factory=dict)
    sha256: str = ""

    def column(self, prompts: Iterable[str]) -> list[str]:
        """Return for each prompt its questions as JSON, which is the column `questions` of images to score.

        Raises:
            SourceError: A prompt has none.
        """
        wanted = list(prompts)
        check_prompts(self, wanted, is_whole=False)
        return [json.dumps(self.asked[prompt]) for prompt in wanted]


def read_questions(path: Path, prompts: Iterable[str] | None = None) -> Questions:
    """Read a file of questions.

    Args:
        path: The file.
        prompts: The prompts that it must be about: each of them, and no other. None leaves that unchecked.

    Raises:
        SourceError: The file cannot be read, has no header, repeats a prompt, lacks one or has a foreign one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read the questions {path}: {error}", HINT) from error
    return parse_questions(data, path, prompts)


def parse_questions(data: bytes, path: Path | str, prompts: Iterable[str] | None = None) -> Questions:
    """Parse the content of a file of questions, like `read_questions`.

    Args:
        data: The content.
        path: Where it comes from, for errors.
        prompts: See `read_questions`.

    Raises:
        SourceError: See `read_questions`.
    """
    try:
        lines = data.decode("utf-8-sig").split("\n")  # not splitlines: a prompt may contain U+2028
    except UnicodeDecodeError as error:
        raise SourceError(f"cannot read the questions {path}: {error}", HINT) from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise SourceError(f"{path} is empty", HINT)
    asked: dict[str, list[str]] = {}
    words: dict[str, list[Word]] = {}
    for number, line in numbered[1:]:
        row = _object(line, path, number)
        prompt, questions = _checked(row, path, number)
        if prompt in asked:
            raise SourceError(f"{path}, line {number}: the prompt {prompt[:60]!r} is there twice", "keep one of them")
        asked[prompt] = questions
        if "words" in row:
            words[prompt] = _words(row["words"], path, number)
    found = Questions(_parser(numbered[0][1], path), asked, words, hashlib.sha256(data).hexdigest())
    if prompts is not None:
        check_prompts(found, list(prompts), is_whole=True, path=path)
    return found


def check_prompts(
    questions: Questions, prompts: Iterable[str], *, is_whole: bool, path: Path | str = "the questions"
) -> None:
    """Check that each prompt has its questions.

    Args:
        questions: The questions.
        prompts: The prompts.
        is_whole: Whether there may be no questions about other prompts.
        path: Where they come from, for the error.

    Raises:
        SourceError: A prompt has none, or there are questions about another prompt.
    """
    wanted = dict.fromkeys(prompts)
    missing = [prompt for prompt in wanted if prompt not in questions.asked]
    foreign = [prompt for prompt in questions.asked if prompt not in wanted] if is_whole else []
    if missing or foreign:
        what, some = ("lack", missing) if missing else ("have questions about", foreign)
        of = f"{len(wanted):,} prompts" if missing else f"{len(questions.asked):,}, which the suite does not have"
        raise SourceError(
            f"the questions in {path} {what} {len(some):,} of {of}, such as {some[0][:60]!r}",
            f"questions belong to exactly these prompts; {HINT}",
        )


def _object(line: str, path: Path | str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SourceError(f"{path}, line {number}: not valid JSON: {error}", HINT) from error
    if not isinstance(row, dict):
        raise SourceError(f"{path}, line {number}: not a JSON object", HINT)
    return row


def _parser(line: str, path: Path | str) -> str:
    parser = _object(line, path, 1).get("parser")
    if not isinstance(parser, str) or not parser:
        raise SourceError(
            f"{path} does not name the parser that its questions come from",
            'begin with a line such as {"parser": "en_core_web_sm 3.5.0"}: other versions find other questions',
        )
    return parser


def _checked(row: dict[str, Any], path: Path | str, number: int) -> tuple[str, list[str]]:
    prompt, questions = row.get("prompt"), row.get("questions")
    if not isinstance(prompt, str):
        raise SourceError(f"{path}, line {number}: `prompt` is {prompt!r}, not a text", HINT)
    if not isinstance(questions, list) or not all(isinstance(each, str) for each in questions):
        raise SourceError(f"{path}, line {number}: `questions` is {questions!r}, not a list of texts", HINT)
    return prompt, questions


def _words(found: Any, path: Path | str, number: int) -> list[Word]:
    is_right = isinstance(found, list) and all(
        isinstance(each, list) and len(each) == 2 and all(isinstance(text, str) for text in each) for each in found
    )
    if not is_right:
        raise SourceError(f"{path}, line {number}: `words` is not a list of text and part of speech", HINT)
    return [Word(*each) for each in found]
