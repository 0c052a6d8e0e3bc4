"""Every container by the suffix of its files."""

from collections.abc import Callable

from pipelines.dataset.errors import SourceError
from pipelines.sources.records import Container, Json, Parquet, Tar
from pipelines.sources.text_tables import TextTable
from pipelines.sources.unit import SourceFile

CONTAINERS: dict[str, Callable[[], Container]] = {
    ".parquet": Parquet,
    ".jsonl": lambda: Json(lines=True),
    ".jsonl.gz": lambda: Json(lines=True),
    ".json": lambda: Json(lines=False),
    ".json.gz": lambda: Json(lines=False),
    ".tar": Tar,
    ".csv": lambda: TextTable(","),
    ".tsv": lambda: TextTable("\t"),
}
"""Containers by file suffix."""
FOLDER_SUFFIXES = tuple(suffix for suffix in CONTAINERS if suffix not in (".csv", ".tsv"))
"""Suffixes of the files that are read from a folder: a text table beside a published data set often describes it."""


def container_of(file: SourceFile) -> Container:
    """Return the container of a file.

    Raises:
        SourceError: Its suffix is not one that mapo can read.
    """
    for suffix, make in CONTAINERS.items():
        if file.uri.endswith(suffix):
            return make()
    raise SourceError(
        f"{file.uri} has a type that mapo cannot read", f"the name must end in one of {', '.join(CONTAINERS)}"
    )
