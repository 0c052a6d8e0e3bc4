"""Pairs under names of your own: `chosen` and `rejected`, or `image_0`, `image_1` and a label.

Without a column map the names are those of open-image-preferences (`prompt`, `chosen`, `rejected`), and for
`jsonl` `prompt`, `image_0`, `image_1`, `label_0`. Images are bytes, `{bytes, path}`, paths or URLs.
"""

from collections.abc import Iterator

from pipelines.dataset.status import Reason
from pipelines.sources.kind import Draft, Field, Record, SourceKind
from pipelines.sources.labels import from_label, from_labels


class PairsSource(SourceKind):
    """Rows of any table, with a column map."""

    format = "pairs"
    label = "position: `chosen` is preferred; or by value, as in `pickapic`"
    forms = (("chosen", "rejected"), ("image_0", "image_1", "label_0"))
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

    def drafts(self, record: Record) -> Iterator[Draft]:
        """Yield one pair per row; the columns chosen and rejected decide the label."""
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
    """The same pairs in JSON lines, one object per line."""

    format = "jsonl"
    suffixes = (".jsonl", ".jsonl.gz")
