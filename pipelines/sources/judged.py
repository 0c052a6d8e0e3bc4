"""Single images with a verdict, good or bad; and images of a class, for DreamBooth's prior preservation.

`image`, `prompt` and `good` are columns of any table. A row whose `prior` is true is an image of a class: it has no
verdict, so its `good` is not read. Images are bytes, `{bytes, path}`, paths or URLs.
"""

from collections.abc import Iterator

from pipelines.dataset.status import JUDGED, PRIOR, Reason
from pipelines.sources.kind import Draft, Field, Record, SourceKind
from pipelines.sources.labels import verdict


class JudgedSource(SourceKind):
    """Rows of one image each."""

    format = "judged"
    label = "`good`: true, yes, good or 1; false, no, bad or 0. Without one if `prior` is true"
    forms = (("good",), ("prior",))
    fields = (
        Field("image", ("image_path", "file_name", "jpg", "png", "webp"), required=True, is_image=True),
        Field("prompt", ("caption", "text", "txt"), required=True),
        Field("good"),
        Field("prior"),
        Field("user_id"),
    )
    row_kind = JUDGED
    suffixes = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".tsv")

    def drafts(self, record: Record) -> Iterator[Draft]:
        """Yield one image per row."""
        prior = verdict(record.get("prior"))
        kind = PRIOR if prior is True else JUDGED
        label = _label(prior, record.get("good"))
        yield Draft(record.get("prompt"), record.get("image"), None, label, record.get("user_id"), kind)


def _label(prior: bool | Reason, good: object) -> float | Reason:
    """Return 1 for a good image or one of a class, 0 for a bad one, or why that cannot be told."""
    if prior is True:
        return 1.0
    found = prior if prior is Reason.UNREADABLE_LABEL else verdict(good)
    return found if isinstance(found, Reason) else float(found)
