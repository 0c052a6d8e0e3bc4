"""Human Preference Datasets: JSON records that name their images by path.

v2, train: `prompt`, `file_path` and `human_preference`, votes in the order of the paths.
v2, test: `prompt`, `image_path` and `rank`, ranks in the order of the paths, 1 is best.
v3: `prompt`, `path1` (preferred), `path2`, and `choice_dist`, votes for both, or null.
Source: the cards of ymhao/HPDv2 and MizzenAI/HPDv3.
"""

from collections.abc import Iterator
from typing import Any

from pipelines.dataset.status import Reason
from pipelines.sources.kind import Draft, Field, Record, SourceKind
from pipelines.sources.labels import from_ranks, from_votes


class HpdSource(SourceKind):
    """Records of HPDv2 and HPDv3."""

    format = "hpd"
    label = "votes; ranks, 1 is best; `path1` is preferred, with the share of `choice_dist` if present"
    fields = (
        Field("prompt", required=True),
        Field("file_path", ("image_path",), is_image=True),
        Field("human_preference"),
        Field("rank"),
        Field("path1", is_image=True),
        Field("path2", is_image=True),
        Field("choice_dist"),
        Field("user_id", ("user_hash",)),
    )

    def drafts(self, record: Record) -> Iterator[Draft]:
        """Yield one pair for a v3 record or two images; all pairs for more images."""
        prompt, user = record.get("prompt"), record.get("user_id")
        if record.get("path1") is not None or record.get("path2") is not None:
            label = _from_position(record.get("choice_dist"))
            yield Draft(prompt, record.get("path1"), record.get("path2"), label, user)
            return
        paths = record.get("file_path")
        if not isinstance(paths, list) or len(paths) < 2:
            yield Draft(prompt, None, None, Reason.MISSING_LABEL, user)
            return
        votes = record.get("human_preference")
        if votes is not None and isinstance(votes, list) and len(paths) == len(votes) == 2:
            yield Draft(prompt, paths[0], paths[1], from_votes(*votes), user)
            return
        ranks, best = (record.get("rank"), "smallest") if votes is None else (votes, "largest")
        for i, j, label in from_ranks(ranks, count=len(paths), best=best):
            yield Draft(prompt, paths[i], paths[j], label, user)


def _from_position(votes: Any) -> float | Reason:
    """Return the label of a first image that is the preferred one; votes, if there are any, say by how much."""
    if votes is None:
        return 1.0
    if not isinstance(votes, list) or len(votes) != 2:
        return Reason.UNREADABLE_LABEL
    return from_votes(*votes)
