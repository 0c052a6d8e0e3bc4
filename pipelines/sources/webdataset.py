"""WebDataset tars of Pick-a-Pic's fields: `jpg_0.jpg`, `jpg_1.jpg`, `label_0.txt`, `label_1.txt`, `caption.txt`.

These names are used in the tar mirrors of Pick-a-Pic that diffusers' ORPO example trains on (there the caption is
`original_prompt.txt`), and, as `0.jpg`, `1.jpg` and one JSON part, in this package's own pair shards.
"""

from collections.abc import Iterator

from pipelines.dataset.status import Reason
from pipelines.sources.kind import Draft, Field, Record, SourceKind
from pipelines.sources.labels import from_label, from_labels, is_false


class WebdatasetSource(SourceKind):
    """Samples of tars."""

    format = "webdataset"
    label = "by value, as in `pickapic`; that of image 0 alone is enough"
    fields = (
        Field("caption", ("original_prompt", "prompt", "text", "txt")),
        Field("jpg_0", ("image_0", "0"), is_image=True),
        Field("jpg_1", ("image_1", "1"), is_image=True),
        Field("label_0"),
        Field("label_1"),
        Field("has_label"),
        Field("user_id"),
    )
    suffixes = (".tar",)

    def drafts(self, record: Record) -> Iterator[Draft]:
        """Yield one pair per sample; image 0's label alone is enough."""
        label: float | Reason
        if is_false(record["has_label"]):
            label = Reason.MISSING_LABEL
        elif record["label_1"] is None:
            label = from_label(record["label_0"])
        else:
            label = from_labels(record["label_0"], record["label_1"])
        yield Draft(record["caption"], record["jpg_0"], record["jpg_1"], label, record["user_id"])
