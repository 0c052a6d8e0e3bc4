"""Pick-a-Pic v1 and v2 parquet: `caption`, `jpg_0`, `jpg_1`, `label_0`, `label_1`, `has_label`.

Labels are float64 (0, 0.5, 1) in the official files and int64 in copies; both are read by value.
Source: the data set's card (19 columns; see docs/guides/sources.md).
"""

from collections.abc import Iterator

from pipelines.dataset.status import Reason
from pipelines.sources.kind import Draft, Field, Record, SourceKind
from pipelines.sources.labels import from_labels, is_false


class PickapicSource(SourceKind):
    """Rows of Pick-a-Pic."""

    format = "pickapic"
    label = 'by value, whatever the type: 1, 0, 0.5, "1.0"'
    fields = (
        Field("caption", required=True),
        Field("jpg_0", required=True, is_image=True),
        Field("jpg_1", required=True, is_image=True),
        Field("label_0", required=True),
        Field("label_1", required=True),
        Field("has_label"),
        Field("user_id"),
    )

    def drafts(self, record: Record) -> Iterator[Draft]:
        """Yield one pair per row."""
        yield Draft(record["caption"], record["jpg_0"], record["jpg_1"], read_label(record), record.get("user_id"))


def read_label(values: Record) -> float | Reason:
    """Return `label_0` as a probability, or why it cannot be read."""
    if is_false(values.get("has_label")):
        return Reason.MISSING_LABEL
    return from_labels(values["label_0"], values["label_1"])
