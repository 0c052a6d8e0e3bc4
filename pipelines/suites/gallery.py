"""Gallery: which images of an evaluation a person should see, chosen from the values alone."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.suites.cells import scorers_of
from pipelines.suites.results import Judge
from pipelines.suites.suite import REPEAT, Suite

NUM_EACH = 3
"""Images for each reason."""
NUM_PLAIN = 12
"""Images that are chosen for no reason but their place, so that there are some that no score picked."""
MAX_JUDGES = 4
"""Judges for which the largest differences are shown."""
MAX_IMAGES = 144
"""Images of a gallery, over all models; more models get fewer prompts."""
SPECIMEN, DISAGREE = "specimen", "judges disagree"
CHECKPOINT = re.compile(r"step-(\d+)")
"""Names of the models that are checkpoints of a training."""

Place = tuple[str, int]
"""prompt_id and number of the image."""


@dataclass(frozen=True)
class GalleryImage:
    """Image of one model: its file below the run's `evaluation/`, and its scores; a failed one is None."""

    name: str
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class GalleryEntry:
    """One prompt, drawn by each model from the same noise.

    Args:
        suite: The suite's name.
        prompt_id: Id of the prompt.
        prompt: The prompt.
        index: Number of the image among those of the prompt.
        why: Why it was chosen: SPECIMEN, DISAGREE, or `NAME differs most`.
        images: The image by model, in the order of the models.
    """

    suite: str
    prompt_id: str
    prompt: str
    index: int
    why: tuple[str, ...]
    images: Mapping[str, GalleryImage]


def differs_most(scorer: str) -> str:
    """Return the reason for which the images with the largest difference of a score are shown."""
    return f"{scorer} differs most"


def step_of(model: str) -> int | None:
    """Return the step of a checkpoint's model, such as 400 for `step-400`; None for other models."""
    found = CHECKPOINT.fullmatch(model)
    return int(found[1]) if found else None


def image_name(suite: str, model: str, prompt_id: str, index: int) -> str:
    """Return the file name of a gallery's image; the same image always has the same one."""
    sample_id, _, repeat = prompt_id.partition(REPEAT)
    return f"{suite}-{model}-{sample_id[:16]}-{f'{repeat}-' if repeat else ''}{index}.png"


def choose_gallery(
    values: pa.Table,
    suite: Suite,
    *,
    against: str,
    judges: Mapping[str, Judge] | None = None,
    models: Sequence[str] | None = None,
    num_each: int = NUM_EACH,
    num_plain: int = NUM_PLAIN,
    max_images: int = MAX_IMAGES,
) -> tuple[GalleryEntry, ...]:
    """Choose images: where models differ most by a primary scorer, where these disagree, and some by place alone.

    The same values give the same choice. A place (prompt and number of the image) is shown once, with all its reasons.
    A place counts for a scorer where every model has a value.

    Args:
        values: Rows of `cells.VALUES_SCHEMA`; those of other suites are left out if there is a column `suite`.
        suite: The suite.
        against: The model that the others are compared with; it is shown first.
        judges: What is known of each scorer; one that is not here is better if higher.
        models: The models to show; by default all that are no checkpoints of a training, or all if those are fewer
            than two.
        num_each: Images for each reason.
        num_plain: Images by place alone.
        max_images: Images over all models and entries.
    """
    if "suite" in values.column_names:
        values = values.filter(pc.field("suite") == suite.name)
    scores, scorers = _scores(values), scorers_of(values, suite)
    shown = tuple(models) if models is not None else _shown(scores, against)
    judged = {each: (judges or {}).get(each, Judge()) for each in scorers}
    reasons: dict[Place, list[str]] = defaultdict(list)
    for why, sizes in _sizes(scores, suite, judged, against, shown).items():
        for place in _largest(sizes, num_each):
            reasons[place].append(why)
    reasons |= {place: [SPECIMEN] for place in _specimens(suite, reasons, num_plain)}
    most = max(1, max_images // max(1, len(shown)))
    prompts = {each.prompt_id: each.prompt for each in suite.prompts}
    return tuple(
        GalleryEntry(
            suite=suite.name,
            prompt_id=place[0],
            prompt=prompts[place[0]],
            index=place[1],
            why=tuple(why),
            images=_images(suite, place, shown, scorers, scores.get(place, {})),
        )
        for place, why in list(reasons.items())[:most]
    )


Values = Mapping[tuple[str, str], float | None]
"""Model and scorer -> value of one place; None if it failed."""


def _images(
    suite: Suite, place: Place, models: Sequence[str], scorers: Sequence[str], values: Values
) -> dict[str, GalleryImage]:
    return {
        model: GalleryImage(
            image_name(suite.name, model, *place), {scorer: values.get((model, scorer)) for scorer in scorers}
        )
        for model in models
    }


def _scores(values: pa.Table) -> dict[Place, Values]:
    """Return the values of each place, ordered by place; one that is not finite is None."""
    found: dict[Place, dict[tuple[str, str], float | None]] = defaultdict(dict)
    columns = (values[name].to_pylist() for name in ("prompt_id", "index", "model", "scorer", "value"))
    for prompt_id, index, model, scorer, value in zip(*columns, strict=True):
        found[prompt_id, index][model, scorer] = value if value is not None and math.isfinite(value) else None
    return dict(sorted(found.items()))


def _shown(scores: Mapping[Place, Values], against: str) -> tuple[str, ...]:
    models = sorted({model for by_model in scores.values() for model, _ in by_model})
    named = [each for each in models if step_of(each) is None]
    chosen = named if len(named) > 1 else models
    return tuple(sorted(chosen, key=lambda each: each != against))


def _complete(by_model: Values, models: Iterable[str], scorer: str) -> list[float] | None:
    """Return a value for each model; None if one has none."""
    found = [by_model.get((model, scorer)) for model in models]
    known = [each for each in found if each is not None]
    return known if len(known) == len(found) else None


def _sizes(
    scores: Mapping[Place, Values], suite: Suite, judges: Mapping[str, Judge], against: str, models: Sequence[str]
) -> dict[str, dict[Place, float]]:
    """Return for each reason to show a place how strong it is there."""
    primary = [each for each in judges if each in suite.primary]
    signs = {each: 1.0 if judges[each].higher_is_better else -1.0 for each in primary}
    spreads = {differs_most(each): _spreads(scores, models, each) for each in (primary or list(judges))[:MAX_JUDGES]}
    return {**spreads, DISAGREE: _disagreements(scores, signs, against, models)}


def _spreads(scores: Mapping[Place, Values], models: Sequence[str], scorer: str) -> dict[Place, float]:
    """Return the largest difference between two models at each place where all have a value."""
    return {
        place: max(found) - min(found)
        for place, by_model in scores.items()
        if (found := _complete(by_model, models, scorer))
    }


def _disagreements(
    scores: Mapping[Place, Values],
    signs: Mapping[str, float],
    against: str,
    models: Sequence[str],
) -> dict[Place, float]:
    """Return for each place on which two judges contradict each other how much they do, over the models.

    A judge's opinion is its gain over `against`, better being positive, in its own standard deviations over all places.
    """
    found: dict[Place, float] = {}
    for model in (each for each in models if each != against):
        opinions: dict[Place, list[float]] = defaultdict(list)
        for scorer, sign in signs.items():
            gains = {
                place: sign * (both[0] - both[1])
                for place, by_model in scores.items()
                if (both := _complete(by_model, (model, against), scorer))
            }
            scale = float(np.std(list(gains.values()))) if gains else 0.0
            for place, gain in gains.items() if scale > 0 else ():
                opinions[place].append(gain / scale)
        for place, each in opinions.items():
            if max(each) > 0 > min(each):
                found[place] = max(found.get(place, 0.0), max(each) - min(each))
    return found


def _largest(sizes: Mapping[Place, float], count: int) -> list[Place]:
    """Return the places of the largest sizes, at most one for a prompt, and none of size 0."""
    chosen: dict[str, Place] = {}
    for place in sorted(sizes, key=lambda each: (-sizes[each], each)):
        if sizes[place] > 0 and len(chosen) < count:
            chosen.setdefault(place[0], place)
    return list(chosen.values())


def _specimens(suite: Suite, taken: Mapping[Place, Sequence[str]], count: int) -> list[Place]:
    """Return places evenly spread over the suite: first images first, and none that is shown already."""
    free = [
        (each.prompt_id, index)
        for index in range(suite.images_per_prompt)
        for each in suite.prompts
        if (each.prompt_id, index) not in taken
    ]
    first = free[: len(suite.prompts)] if len(free) > len(suite.prompts) >= count else free
    return [first[number * len(first) // count] for number in range(count)] if len(first) > count else first
