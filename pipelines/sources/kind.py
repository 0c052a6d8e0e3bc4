"""The base class of a kind of source: its columns, their names in files, and how one record becomes rows.

Light: neither this file nor those of the kinds import ray, torch or pyarrow; `reader` reads the source files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pipelines.dataset.status import PAIR, Reason

Record = dict[str, Any]
"""A record of a source file: column -> raw value."""
BROKEN = "__broken__"
"""Key for the reason, in a record that could not be read."""


@dataclass(frozen=True)
class Field:
    """A column of a format.

    Args:
        name: The format's name of the column, which `columns` maps.
        also: Other names that published files use.
        required: Whether a file without it is rejected.
        is_image: Whether it contains images; text in it is then a path or a URL.
    """

    name: str
    also: tuple[str, ...] = ()
    required: bool = False
    is_image: bool = False


SPLIT, WEIGHT = Field("split"), Field("weight")
COMMON = (SPLIT, WEIGHT)
"""Every kind of source may have these columns."""


@dataclass(frozen=True)
class Draft:
    """One pair or single image of a record before its images are fetched, with raw cells.

    `label_0` of a single image is 1 or 0, and `image_1` None.
    """

    prompt: object
    image_0: object
    image_1: object
    label_0: float | Reason
    user_id: object = None
    kind: str = PAIR


class SourceKind:
    """One kind of source; each subclass has its own file and an entry in `registry`."""

    format: ClassVar[str]
    """The kind's name in the configuration."""
    fields: ClassVar[tuple[Field, ...]]
    """Its columns in addition to the common ones."""
    label: ClassVar[str]
    """Where the label comes from, for the reference page."""
    forms: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Alternative sets of fields, if any: a file must have all fields of one of them."""
    row_kind: ClassVar[str] = PAIR
    """The kind of a row whose record cannot be read."""
    group_by: ClassVar[str | None] = None
    """If set, consecutive single-image records with the same value of this field form one record of lists."""
    gathered: ClassVar[tuple[str, ...]] = ()
    """The fields that then become lists, in addition to the images."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes of its files in a folder; if empty, all readable files but text tables."""

    @property
    def all_fields(self) -> tuple[Field, ...]:
        """All columns."""
        return (*self.fields, *COMMON)

    def drafts(self, record: Record) -> Iterator[Draft]:
        """Yield the rows of one record, whose keys are the format's names; at least one."""
        raise NotImplementedError
