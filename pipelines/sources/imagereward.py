"""ImageRewardDB: several ranked images per prompt; every two of them make a pair, equal ranks a tie.

One image per record (`image` or `image_path`, `prompt_id`, `prompt`, `rank`) with the records of a prompt in a row, as
in the JSON files and the plain subsets; or one prompt per record with lists, as in the `_group` subsets; or
`img_better` and `img_worse`, as in the `_pair` subsets. Rank 1 is best.
Source: the card of THUDM/ImageRewardDB.
"""

from collections.abc import Iterator

from pipelines.dataset.status import Reason
from pipelines.sources.kind import Draft, Field, Record, SourceKind
from pipelines.sources.labels import from_ranks


class ImagerewardSource(SourceKind):
    """Ranked images."""

    format = "imagereward"
    label = "ranks: every two images make a pair, equal ranks a tie; `img_better` is preferred"
    fields = (
        Field("prompt", required=True),
        Field("prompt_id"),
        Field("image", ("image_path", "images"), is_image=True),
        Field("rank", ("ranks", "ranking")),
        Field("img_better", is_image=True),
        Field("img_worse", is_image=True),
        Field("user_id"),
    )
    group_by = "prompt_id"
    gathered = ("rank",)

    def drafts(self, record: Record) -> Iterator[Draft]:
        """Yield every two images of the record."""
        prompt, user = record.get("prompt"), record.get("user_id")
        if record.get("img_better") is not None or record.get("img_worse") is not None:
            yield Draft(prompt, record.get("img_better"), record.get("img_worse"), 1.0, user)
            return
        images = record.get("image")
        if not isinstance(images, list) or len(images) < 2:
            lone = images[0] if isinstance(images, list) and images else images
            yield Draft(prompt, None if isinstance(lone, list) else lone, None, Reason.MISSING_LABEL, user)
            return
        for i, j, label in from_ranks(record.get("rank"), count=len(images)):
            yield Draft(prompt, images[i], images[j], label, user)
