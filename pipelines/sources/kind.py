"""What a kind of source is: a table of names, which columns it has, and how one record becomes pairs.

Light: neither ray, torch nor pyarrow is imported here, nor in the files of the kinds; `reader` reads the files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pipelines.dataset.status import Reason

Record = dict[str, Any]
"""A record of a source file: column -> value, as it came."""
BROKEN = "__broken__"
"""Stands in a record that could not be read, for the reason why."""


@dataclass(frozen=True)
class Field:
    """A column of a format.

    Args:
        name: The format's own name, which `columns` maps.
        also: Other names that published files use.
        required: A file without it is refused.
        is_image: It holds images, where text is a path or an address.
    """

    name: str
    also: tuple[str, ...] = ()
    required: bool = False
    is_image: bool = False


SPLIT = Field("split")
"""Every kind of source may have this column."""


@dataclass(frozen=True)
class Draft:
    """One pair of a record before its images are fetched: cells as they came."""

    prompt: object
    image_0: object
    image_1: object
    label_0: float | Reason
    user_id: object = None


class SourceKind:
    """One kind of source; a subclass in a file of its own is entered in `registry`."""

    format: ClassVar[str]
    """Its name in the configuration."""
    fields: ClassVar[tuple[Field, ...]]
    """Its columns beside `split`."""
    label: ClassVar[str]
    """Where the label comes from, for the reference page."""
    forms: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """If there are any: a file has all fields of one of these, or is refused."""
    group_by: ClassVar[str | None] = None
    """Consecutive records of one image each and of one value of this field are one record of lists."""
    gathered: ClassVar[tuple[str, ...]] = ()
    """The fields that become lists then, beside the images."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of its files in a folder; all that can be read if there are none here."""

    @property
    def all_fields(self) -> tuple[Field, ...]:
        """All columns."""
        return (*self.fields, SPLIT)

    def drafts(self, record: Record) -> Iterator[Draft]:
        """Yield the pairs of one record, whose keys are the format's own names; at least one."""
        raise NotImplementedError
