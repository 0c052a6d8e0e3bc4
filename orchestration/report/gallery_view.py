"""View of a gallery: the samples that the page shows side by side, by the reason for which they were chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestration.report.evaluation import own_model, result_of, shown_gallery
from orchestration.report.records import EvaluationSection
from pipelines.suites.gallery import DISAGREE, SPECIMEN, GalleryEntry
from pipelines.suites.results import SuiteResult

MAX_SHOWN_SCORES = 4  # below an image
NUM_OPEN = 12  # entries that are not folded
PICKED, CONTESTED, PLAIN = "Where models differ most", "Where judges disagree", "Other prompts"
NOTES = {
    PICKED: "Chosen by the score that is named: extremes, not averages.",
    CONTESTED: "One primary score says better and another says worse.",
    PLAIN: "Spread over the suite, not chosen by a score.",
}


@dataclass(frozen=True)
class ShownEntry:
    """Entry of a gallery, the run's own model, and the scores to write below each model's image."""

    entry: GalleryEntry
    ours: str | None
    scores: Mapping[str, Sequence[tuple[str, float]]]


@dataclass(frozen=True)
class GalleryGroup:
    """Entries of a gallery that were chosen for one kind of reason."""

    title: str
    note: str
    entries: Sequence[ShownEntry]

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.entries)


def gallery_groups(section: EvaluationSection | None) -> list[GalleryGroup]:
    """Return the gallery by reason: images that a score picked first, then those that none did."""
    if section is None:
        return []
    found: dict[str, list[ShownEntry]] = {PICKED: [], CONTESTED: [], PLAIN: []}
    for entry in shown_gallery(section):
        kind = CONTESTED if DISAGREE in entry.why else PLAIN if set(entry.why) == {SPECIMEN} else PICKED
        found[kind].append(_shown(entry, result_of(section.record.results, entry.suite)))
    groups = [GalleryGroup(kind, NOTES[kind], entries) for kind, entries in found.items() if entries]
    if [each.title for each in groups] == [PLAIN]:  # there is nothing that they could be told from
        return [GalleryGroup("", "", groups[0].entries)]
    return groups


def _shown(entry: GalleryEntry, result: SuiteResult | None) -> ShownEntry:
    """Return an entry with the primary scores of its suite, or the first few of all."""
    wanted = (result.primary or result.scorers) if result else ()
    scores = {
        model: [(name, value) for name in wanted if (value := image.scores.get(name)) is not None][:MAX_SHOWN_SCORES]
        for model, image in entry.images.items()
    }
    return ShownEntry(entry, own_model(result) if result else None, scores)
