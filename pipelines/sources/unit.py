"""Units of work of a source, and the rows that every kind of source yields.

A unit is a part of one file. Its id is a hash of the file's identity (URI, size, change mark), of the part, and of the
settings that shape its shards and rows, so that a changed file gives new units and an unchanged one none.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipelines.dataset.status import PAIR, Reason
from pipelines.sources.config import SourceConfig

UNIT_VERSION = 2  # raise it when the same source rows would give other shard bytes or other table rows


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, in its state when the run was planned."""

    uri: str
    size: int
    change_mark: str  # etag or time of change


@dataclass(frozen=True)
class UnitSettings:
    """Settings that shape the shards of a unit, in addition to its source; part of its id."""

    max_shard_bytes: int
    image_check: Literal["full", "header"]


@dataclass(frozen=True)
class SourceUnit:
    """A part of one source file, which one worker turns into shards; committed as a whole."""

    id: str
    source: SourceConfig
    file: SourceFile
    part: tuple[int, int]  # first, one past the last: row groups of parquet, records of JSON, 0 and 1 for a whole tar
    first_row: int
    num_rows: int  # source rows; 0 where only reading them tells
    settings: UnitSettings
    known: bool = False
    """Whether the table has rows from an earlier state of this file; not part of the id."""

    def to_json(self) -> str:
        """Return the unit as text, for Ray Data rows."""
        return json.dumps(asdict(self) | {"source": self.source.model_dump(mode="json")}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "SourceUnit":
        """Read the output of `to_json`."""
        fields = json.loads(text)
        fields["source"] = SourceConfig.model_validate(fields["source"])
        fields["file"] = SourceFile(**fields["file"])
        fields["settings"] = UnitSettings(**fields["settings"])
        fields["part"] = tuple(fields["part"])
        return SourceUnit(**fields)


@dataclass(frozen=True)
class SourceRow:
    """One pair or single image of a source, the same for all formats. A `Reason` replaces a missing value."""

    row: int
    """Row number in the file, from 0."""
    prompt: object
    """Text, or bytes that should be UTF-8; None if there is none."""
    image_0: bytes | Reason | None
    image_1: bytes | Reason | None
    """None of a single image."""
    label_0: float | Reason
    """Probability that image_0 is preferred, 0..1; of a single image 1 (good) or 0 (bad)."""
    user_id: str | None = None
    split: str | None = None
    """The source's own split: train, validation or test."""
    pair: int = 0
    """Number of the pair within the row, if a row ranks several images."""
    kind: str = PAIR
    """pair, judged or prior."""
    weight: float | Reason | None = None
    """Weight of the row's loss, above 0; None without one, which is 1."""


def make_unit(
    config: SourceConfig,
    file: SourceFile,
    settings: UnitSettings,
    *,
    part: tuple[int, int],
    first_row: int,
    num_rows: int,
) -> SourceUnit:
    """Return a unit with its id: 32 hex digits, a hash of everything that shapes its shards and rows."""
    shaping: list[Any] = [UNIT_VERSION, file.uri, file.size, file.change_mark, *part]
    # Without defaults, so that a key that is added to the configuration later leaves the ids as they are.
    shaping += [
        config.model_dump(mode="json", exclude={"path", "url_timeout_s"}, exclude_defaults=True),
        asdict(settings),
    ]
    identity = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:32]
    return SourceUnit(identity, config, file, part, first_row, num_rows, settings)
