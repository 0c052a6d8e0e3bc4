"""Pairs under names of your own: `chosen` and `rejected`, or `image_0`, `image_1` and a label.

Without a column map the names are those of open-image-preferences (`prompt`, `chosen`, `rejected`), and for
`jsonl` `prompt`, `image_0`, `image_1`, `label_0`. Images are bytes, `{bytes, path}`, paths or addresses.
"""

from collections.abc import Iterator, Sequence

from pipelines.config import SourceConfig
from pipelines.dataset.errors import SourceError
from pipelines.dataset.pair import Reason
from pipelines.sources.labels import from_label, from_labels
from pipelines.sources.records import Record
from pipelines.sources.source import SourceFile
from pipelines.sources.table_source import Draft, Field, TableSource

FORMS = ({"chosen", "rejected"}, {"image_0", "image_1", "label_0"})


class PairsSource(TableSource):
    """Rows of any table, through a column map."""

    format = "pairs"
    fields = (
        Field("prompt", ("caption",), required=True),
        Field("chosen", is_image=True),
        Field("rejected", is_image=True),
        Field("image_0", is_image=True),
        Field("image_1", is_image=True),
        Field("label_0"),
        Field("label_1"),
        Field("user_id"),
    )

    def _columns(self, config: SourceConfig, names: Sequence[str] | None, file: SourceFile) -> dict[str, str]:
        found = super()._columns(config, names, file)
        if names is not None and not (
            {"chosen", "rejected"} <= set(found) or {"image_0", "image_1", "label_0"} <= set(found)
        ):
            raise SourceError(
                f"{file.uri} has neither `chosen` and `rejected` nor `image_0`, `image_1` and `label_0`; "
                f"it has {', '.join(sorted(names))}",
                "say with `columns:` which of its columns is which",
            )
        return found

    def drafts(self, record: Record) -> Iterator[Draft]:
        """One pair a row; the position of chosen and rejected is the label."""
        prompt, user = record.get("prompt"), record.get("user_id")
        if record.get("image_0") is not None or record.get("image_1") is not None:
            label_1 = record.get("label_1")
            label: float | Reason
            label = (
                from_label(record.get("label_0")) if label_1 is None else from_labels(record.get("label_0"), label_1)
            )
            yield Draft(prompt, record.get("image_0"), record.get("image_1"), label, user)
            return
        yield Draft(prompt, record.get("chosen"), record.get("rejected"), 1.0, user)


class JsonlSource(PairsSource):
    """The same from an object a line."""

    format = "jsonl"
    suffixes = (".jsonl", ".jsonl.gz")
