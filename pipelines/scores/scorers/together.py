"""Several scorers over one batch: an image is decoded once, and each trunk runs once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.images import Picture
from pipelines.scores.scorers.result import Result, checked
from pipelines.scores.scorers.scorer import IMAGE, PROMPT, BuiltIn, needs_of

if TYPE_CHECKING:
    from PIL.Image import Image


def score_together(
    scorers: Sequence[Any], images: "Sequence[Image]", prompts: Sequence[str | None], **extra: Sequence[Any]
) -> dict[str, list[Result]]:
    """Score images with several loaded scorers; return one result for each image, by the scorer's name.

    The results equal those of each scorer alone. Scorers with the same weights and preprocessing share a forward pass.

    Args:
        scorers: Loaded scorers, built-in or a user's own.
        images: The images, of any mode; a user's own scorer is given readable RGB images alone.
        prompts: One prompt for each image.
        extra: One list for each further name that a scorer needs, with one item for each image.

    Raises:
        ValueError: Lists have different lengths, two scorers have the same name, a needed list is missing, or a
            scorer returned another number of results than images.
    """
    names = [scorer.name for scorer in scorers]
    if len(set(names)) < len(names):
        raise ValueError(f"two scorers have the same name: {', '.join(sorted(names))}")
    batch = Batch(images, prompts, extra)
    return {scorer.name: score_batch(scorer, batch) for scorer in scorers}


def score_batch(scorer: Any, batch: Batch) -> list[Result]:
    """Return one result for each image of a batch, by one loaded scorer, built-in or a user's own."""
    return scorer.score_batch(batch) if isinstance(scorer, BuiltIn) else _of_user(scorer, batch)


def _of_user(scorer: Any, batch: Batch) -> list[Result]:
    """Score with a scorer that knows nothing of batches; rows that it cannot score never reach it."""
    needs = needs_of(scorer)
    failures = batch.failures(needs)
    rows = [row for row in range(len(batch)) if row not in failures]
    results: list[Result] = [failures.get(row, 0.0) for row in range(len(batch))]
    if not rows:
        return results
    extra = {need: [_plain(batch.extra[need][row]) for row in rows] for need in needs if need not in (IMAGE, PROMPT)}
    found = scorer.score([batch.pictures[row].rgb for row in rows], [batch.prompts[row] for row in rows], **extra)
    if len(found) != len(rows):
        raise ValueError(f"the scorer {scorer.name} returned {len(found)} results for {len(rows)} images")
    for row, result in zip(rows, found, strict=True):
        results[row] = checked(result)
    return results


def _plain(item: Any) -> Any:
    """Return an item of a further list with images in place of pictures."""
    if isinstance(item, list | tuple) and any(isinstance(each, Picture) for each in item):
        return [each.rgb if isinstance(each, Picture) else each for each in item]
    return item
