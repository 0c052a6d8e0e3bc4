"""Reads prompts from files: one a line, JSON lines, CSV, TSV or parquet; distinct, and limited in seeded order.

Light: needs neither ray, torch nor diffusers.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import PromptFile
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.pair import prompt_id
from pipelines.dataset.read_once import read_once
from pipelines.dataset.storage import Storage

TAGS = "tags"
"""The optional column, or key, with the tags of a prompt: a text, or a list of texts."""
Numbered = tuple[int, object, object]
"""Where a prompt is in its file (a line, or a row of a parquet file, from 1), its cell, and the cell of its tags."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to draw.

    Args:
        prompt_id: From `pipelines.dataset.pair.prompt_id`.
        prompt: The text, exactly as in its file.
        tags: What kind of prompt it is, for results by tag.
        text: What images are drawn from, if they are judged against another text, such as one without a rare token.
    """

    prompt_id: str
    prompt: str
    tags: tuple[str, ...] = ()
    text: str | None = None

    @property
    def drawn(self) -> str:
        """The text that images are drawn from."""
        return self.prompt if self.text is None else self.text


def read_prompts(file: PromptFile, seed: int) -> list[Prompt]:
    """Read the distinct prompts of a file, in its order; with `limit` the chosen ones, in the order of `limit_prompts`.

    A file that has not changed since the last call of this process is not read again.

    Args:
        file: The file, the column of the prompts, and how many of them to use.
        seed: Chooses the prompts if there is a limit.

    Raises:
        ConfigError: The file is missing, of another kind, damaged or empty, or a line of it has no prompt.
    """
    suffix, (folder, _, name) = _suffix(file), file.path.rpartition("/")
    storage = Storage(folder or ("/" if file.path.startswith("/") else "."))
    prompts = read_once(
        storage, name, lambda data: _prompts(READERS[suffix](data, file), file), as_what=("prompts", file)
    )
    if prompts is None:
        raise ConfigError(f"there is no file {storage.uri(name)}", "check the path of the file of prompts")
    return list(prompts) if file.limit is None else limit_prompts(prompts, file.limit, seed)


def _prompts(cells: Iterator[Numbered], file: PromptFile) -> list[Prompt]:
    found: dict[str, Prompt] = {}
    for number, cell, tags in cells:
        prompt = _prompt(cell, tags, number, file)
        found.setdefault(prompt.prompt_id, prompt)
    if not found:
        raise ConfigError(f"{file.path} has no prompts", "write one prompt a line, or name another file")
    return list(found.values())


def limit_prompts(prompts: Sequence[Prompt], limit: int, seed: int) -> list[Prompt]:
    """Return the first `limit` prompts in the order of a seeded hash of their ids.

    The order is a pure function of the seed and the ids, so a longer limit gives the same prompts and then more.
    """

    def place(prompt: Prompt) -> bytes:
        return hashlib.sha256(f"mapo-limit-1 {seed} {prompt.prompt_id}".encode()).digest()

    return sorted(prompts, key=place)[:limit]


def _prompt(cell: object, tags: object, number: int, file: PromptFile) -> Prompt:
    """Check a prompt and its tags."""
    if not isinstance(cell, str) or not cell.strip():
        what = f"`{file.column}` is {cell!r}" if cell is not None else f"there is no `{file.column}`"
        raise _bad_line(file, number, what, "every line needs a prompt that is not empty: correct or remove the line")
    try:
        identity = prompt_id(cell)
    except UnicodeEncodeError as error:
        raise _bad_line(file, number, f"not text: {error.reason}", "remove the line, or write it anew") from error
    listed = [tags] if isinstance(tags, str) else tags if tags is not None else []
    if not isinstance(listed, list) or not all(isinstance(tag, str) for tag in listed):
        raise _bad_line(file, number, f"`{TAGS}` is {tags!r}", f"`{TAGS}` must be a text or a list of texts")
    return Prompt(identity, cell, tuple(dict.fromkeys(tag for tag in listed if tag)))


def _bad_line(file: PromptFile, number: int, what: str, hint: str) -> ConfigError:
    return ConfigError(f"{file.path}: cannot use line {number:,}: {what}", hint)


def _suffix(file: PromptFile) -> str:
    """Return the suffix of a file, by which it has a reader.

    Raises:
        ConfigError: No reader has it.
    """
    suffix = "." + file.path.rpartition("/")[2].rpartition(".")[2].lower()
    if suffix not in READERS:
        raise ConfigError(
            f"{file.path} is not a file of prompts that mapo reads",
            f"write the prompts to a file that ends in {', '.join(READERS)}",
        )
    return suffix


def _text_of(data: bytes, file: PromptFile) -> str:
    """Decode a file; a byte order mark, as Excel writes it, is left out."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _bad_line(file, line, f"not UTF-8 ({error.reason})", "save the file as UTF-8") from error


def _read_txt(data: bytes, file: PromptFile) -> Iterator[Numbered]:
    # By line ends alone: `splitlines` would also divide prompts at exotic separators.
    for number, line in enumerate(_text_of(data, file).split("\n"), 1):
        if (prompt := line.removesuffix("\r")).strip():
            yield number, prompt, None


def _read_jsonl(data: bytes, file: PromptFile) -> Iterator[Numbered]:
    has_column = False
    for number, line in enumerate(_text_of(data, file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _bad_line(file, number, f"not valid JSON ({error})", "write one JSON object a line") from error
        if not isinstance(row, dict):
            raise _bad_line(file, number, "not a JSON object", f'write lines such as {{"{file.column}": "a cat"}}')
        if not has_column and file.column not in row:
            raise _missing_column(file, list(row))
        has_column = True
        yield number, row.get(file.column), row.get(TAGS)


def _read_csv(data: bytes, file: PromptFile, delimiter: str) -> Iterator[Numbered]:
    rows = csv.DictReader(io.StringIO(_text_of(data, file), newline=""), delimiter=delimiter, strict=True)
    try:
        if file.column not in (rows.fieldnames or ()):
            raise _missing_column(file, list(rows.fieldnames or ()))
        for row in rows:
            yield rows.line_num, row[file.column], row.get(TAGS)
    except csv.Error as error:
        first = rows.line_num + 1  # of the row that failed
        raise _bad_line(file, first, str(error), "is the line quoted properly?") from error


def _read_parquet(data: bytes, file: PromptFile) -> Iterator[Numbered]:
    try:
        opened = pq.ParquetFile(pa.BufferReader(data))
        names = opened.schema_arrow.names
        if file.column not in names:
            raise _missing_column(file, names)
        columns = [file.column, *([TAGS] if TAGS in names else [])]
        number = 0
        for batch in opened.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row[file.column], row.get(TAGS)
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"cannot read {file.path}: {text}", "is the file complete? copy it again") from error


def _missing_column(file: PromptFile, names: Sequence[object]) -> ConfigError:
    there = ", ".join(map(str, names)) or "none"
    return ConfigError(
        f"{file.path} has no column `{file.column}`; its columns are: {there}",
        "set `column` of the file of prompts to the one that holds them",
    )


READERS: dict[str, Callable[[bytes, PromptFile], Iterator[Any]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
"""The reader of each kind of file, by suffix."""
