"""Read a file of scores that were made elsewhere: Parquet or JSON lines, checked row by row."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dataset.errors import ConfigError, SourceError
from pipelines.dataset.status import ScoreStatus
from pipelines.dataset.values import Row

REQUIRED = ("image_sha256", "prompt_id", "value")
OPTIONAL = ("components", "status", "reason", "scorer", "fingerprint")
HINT = "the columns are those of a table of scores; see infra/compbench"
SHA256, PROMPT_ID = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")
SHOWN = 12
MAX_SHOWN = 80  # characters
LARGEST = 3.4028234663852886e38
"""The largest float32, beyond which sums of squares would leave float64, too."""


@dataclass(frozen=True)
class ForeignScore:
    """A score of one image.

    Args:
        image_sha256: Digest of the image's bytes as they are stored.
        prompt_id: Of its bare prompt.
        value: None for a failure.
        components: JSON object of the numbers behind the value, keys sorted.
        status: `scored` or `failed`.
        reason: Why it failed.
        place: Where it stands, for messages.
    """

    image_sha256: str
    prompt_id: str
    value: float | None
    components: str
    status: str
    reason: str | None
    place: str

    @property
    def key(self) -> tuple[str, str]:
        """What it is a score of."""
        return self.image_sha256, self.prompt_id

    @property
    def outcome(self) -> tuple[object, ...]:
        """Everything that a second score of the same image must repeat."""
        return self.value, self.components, self.status, self.reason

    @property
    def told(self) -> str:
        """The score in a message."""
        return repr(self.value) if self.status == ScoreStatus.SCORED else f"no score ({self.reason})"

    def row(self) -> Row:
        """Return it as a row of a table of scores."""
        names = ("image_sha256", "prompt_id", "value", "components", "status", "reason")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ForeignFile:
    """The scores of one file, each image once.

    Args:
        name: The file's name.
        scores: Its scores.
        scorer: The scorer's name, if a column says it.
        fingerprint: What shapes its scores, if a column says it.
    """

    name: str
    scores: tuple[ForeignScore, ...]
    scorer: str | None = None
    fingerprint: str | None = None

    def named(self, scorer: str | None, fingerprint: str | None) -> tuple[str, str]:
        """Return the scorer's name and its fingerprint text, from options or columns.

        Raises:
            ConfigError: One is in neither, or both say something else.
        """
        found = []
        for what, given, own in (("scorer", scorer, self.scorer), ("fingerprint", fingerprint, self.fingerprint)):
            if given is not None and own is not None and given != own:
                raise ConfigError(
                    f"the column {what} of {self.name} says {own!r}, and --{what} says {given!r}", f"leave --{what} out"
                )
            if given is None and own is None:
                raise ConfigError(f"{self.name} has no column {what}, and --{what} is not given", f"give --{what}")
            found.append(str(own if given is None else given))
        if not found[0].strip() or "@" in found[0] or not _is_utf8(found[0]):
            raise ConfigError(
                f"the scorer of {self.name} is called {found[0]!r}, which no configuration can name",
                "give --scorer a short text without @, which stands before a fingerprint",
            )
        return found[0], found[1]


def read_foreign(path: Path) -> ForeignFile:
    """Read a file of scores.

    Args:
        path: A `.parquet` or `.jsonl` file.

    Raises:
        SourceError: It cannot be read, lacks a column, or a row of it is no score; or an image has two scores that
            differ, or rows are of several scorers.
    """
    scores: dict[tuple[str, str], ForeignScore] = {}
    named: dict[str, set[str]] = {"scorer": set(), "fingerprint": set()}
    for place, row in _rows(path):
        score = _checked(row, path, place)
        before = scores.setdefault(score.key, score)
        if before.outcome != score.outcome:
            raise SourceError(
                f"{path}, {place}: the image {score.image_sha256[:SHOWN]} has the score {score.told}, but "
                f"{before.told} in {before.place}",
                "give each image and prompt one score",
            )
        for name, known in named.items():
            known.update([] if row.get(name) is None else [row[name]])
    if not scores:
        raise SourceError(f"{path} has no scores", HINT)
    scorer, fingerprint = (_only(name, known, path) for name, known in named.items())
    return ForeignFile(path.name, tuple(scores.values()), scorer, fingerprint)


def _only(name: str, found: set[str], path: Path) -> str | None:
    """Return what the rows of a column say, which must be one thing; None if they say nothing."""
    if len(found) > 1:
        raise SourceError(
            f"the column {name} of {path} has {len(found)} values: {', '.join(sorted(found))}",
            "give each scorer a file of its own",
        )
    return next(iter(found), None)


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield where each row stands, and the row."""
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield from ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1))
        elif path.suffix == ".jsonl":
            lines = path.read_bytes().decode("utf-8-sig").split("\n")  # other separators may be inside of a text
            numbered = ((f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
            yield from ((place, _object(line)) for place, line in numbered)
        else:
            raise SourceError(f"{path} is neither .parquet nor .jsonl", HINT)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"cannot read the scores {path}: {str(error).splitlines()[0]}", HINT) from error


def _object(line: str) -> Any:
    """Return a line of JSON; a line that is none is no row, and told as such."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _checked(row: Any, path: Path, place: str) -> ForeignScore:
    """Return a row as a score.

    Raises:
        SourceError: It is none.
    """
    wrong = "not a JSON object" if not isinstance(row, dict) else _wrong_columns(row) or _wrong_text(row)
    if not wrong:
        row = _filled(row)
        wrong = _wrong_outcome(row)
    if wrong:
        raise SourceError(f"{path}, {place}: {wrong}", HINT)
    components = _components(row["components"])
    if components is None:
        told = f"`components` is {_short(row['components'])}, not a JSON object of numbers"
        raise SourceError(f"{path}, {place}: {told}", HINT)
    value = None if row["value"] is None else float(row["value"])
    told = json.dumps(components, sort_keys=True)
    return ForeignScore(row["image_sha256"], row["prompt_id"], value, told, row["status"], row["reason"], place)


def _filled(row: Row) -> Row:
    """Return a row with all columns; a failure may have NaN for its value, as some writers of Parquet leave it."""
    value, status = row["value"], row.get("status")
    if status == ScoreStatus.FAILED and isinstance(value, float) and math.isnan(value):
        value = None
    status = status or str(ScoreStatus.FAILED if value is None else ScoreStatus.SCORED)
    named = {"value": value, "status": status, "reason": row.get("reason") or None}
    return {**row, **named, "components": row.get("components")}


def _wrong_columns(row: Row) -> str | None:
    if missing := [name for name in REQUIRED if name not in row]:
        return f"there is no {missing[0]}"
    if unknown := sorted(set(row) - {*REQUIRED, *OPTIONAL}):
        return f"there is no column {unknown[0]} in scores; there are {', '.join((*REQUIRED, *OPTIONAL))}"
    return None


def _wrong_text(row: Row) -> str | None:
    for name in ("reason", "scorer", "fingerprint"):
        text = row.get(name)
        if text is not None and not (isinstance(text, str) and _is_utf8(text)):
            return f"`{name}` is {_short(text)}, not a text"
    for name, pattern, digits in (("image_sha256", SHA256, 64), ("prompt_id", PROMPT_ID, 32)):
        if not isinstance(row[name], str) or not pattern.fullmatch(row[name]):
            return f"`{name}` is {_short(row[name])}, not {digits} hex digits"
    return None


def _is_utf8(text: str) -> bool:
    """Return whether a text can be written; JSON may have half a surrogate pair in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong_outcome(row: Row) -> str | None:
    status, value, reason = row["status"], row["value"], row["reason"]
    if status == ScoreStatus.FAILED:
        if value is not None:
            return f"a failed score has the value {_short(value)}; a failure is never a number"
        return None if reason is not None and reason.strip() else "a failed score has no reason"
    if status != ScoreStatus.SCORED:
        return f"`status` is {_short(status)}, neither scored nor failed"
    if not _is_number(value) or not abs(value) <= LARGEST:
        return f"`value` is {_short(value)}, not a finite number of float32's range"
    return None if reason is None else f"a score has the reason {_short(reason)}, which only a failure has"


def _short(value: Any) -> str:
    """Return what a row has, cut for a message."""
    try:
        text = repr(value)
    except ValueError:  # of an integer with thousands of digits
        return "a huge number"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _components(found: Any) -> dict[str, float | None] | None:
    """Return the numbers behind a value, None for one beyond float32's range; None if they are something else."""
    if isinstance(found, str):
        try:
            found = json.loads(found or "{}")
        except (ValueError, RecursionError):
            return None
    found = {} if found is None else found
    if not isinstance(found, dict):
        return None
    told: dict[str, float | None] = {}
    for name, number in found.items():
        if number is None:
            continue
        if not _is_number(number):
            return None
        told[str(name)] = float(number) if abs(number) <= LARGEST else None
    return told
