"""Rapidata's preference sets: votes of many people for each of two images, as a vote share.

Source: the card of Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3 (`prompt`, `image1`, `image2`,
`votes_image1`, `votes_image2`).
"""

from collections.abc import Iterator

from pipelines.sources.kind import Draft, Field, Record, SourceKind
from pipelines.sources.labels import from_votes


class RapidataSource(SourceKind):
    """Rows with counts of votes."""

    format = "rapidata"
    label = "share of votes"
    fields = (
        Field("prompt", required=True),
        Field("image1", ("image1_path",), required=True, is_image=True),
        Field("image2", ("image2_path",), required=True, is_image=True),
        Field("votes_image1", required=True),
        Field("votes_image2", required=True),
        Field("user_id"),
    )

    def drafts(self, record: Record) -> Iterator[Draft]:
        """Yield one pair per row."""
        label = from_votes(record["votes_image1"], record["votes_image2"])
        yield Draft(record["prompt"], record["image1"], record["image2"], label, record.get("user_id"))
