"""The scorers as `mapo scorers` lists them: what they measure, their weights, licences, and what is on this machine."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_fetch import default_cache
from pipelines.dataset.values import JsonObject
from pipelines.scores.cluster_weights import LocatedPart, locate_parts
from pipelines.scores.golden import GOLDEN
from pipelines.scores.parts import PARTS
from pipelines.scores.scorers import needs_of, new_scorer
from pipelines.scores.verified import NOT_VERIFIED, verification_of
from pipelines.scores.weights import is_fetched


@dataclass(frozen=True)
class ListedPart:
    """A part of a scorer's weights.

    Args:
        name: Its name.
        source: Where it comes from: a hub repository or a URL.
        licence: Its licence.
        is_cached: Whether it is on this machine.
    """

    name: str
    source: str
    licence: str
    is_cached: bool


@dataclass(frozen=True)
class ListedScorer:
    """A scorer.

    Args:
        name: The name that the configuration takes.
        measures: What it measures.
        scale: Unit and usual range.
        higher_is_better: Whether a higher score is better.
        needs: What it needs of each image.
        licence: Licence of its weights.
        parts: Its weights; none for pixel statistics.
        verified: What its values on this machine were checked against, or that they were not.
        published: Where a value is published that they can be checked against; None if nowhere.
    """

    name: str
    measures: str
    scale: str
    higher_is_better: bool
    needs: tuple[str, ...]
    licence: str
    parts: tuple[ListedPart, ...]
    verified: str
    published: str | None

    @property
    def is_cached(self) -> bool:
        """Whether it can run on this machine."""
        return all(part.is_cached for part in self.parts)

    def to_json(self) -> JsonObject:
        """Return the scorer as plain data."""
        return {**asdict(self), "is_cached": self.is_cached}


def list_scorers(names: Sequence[str]) -> list[ListedScorer]:
    """Describe scorers by name.

    Raises:
        ConfigError: There is no such scorer.
    """
    return [_listed(name, new_scorer(name)) for name in names]


def _listed(name: str, scorer: Any) -> ListedScorer:
    golden, parts = GOLDEN.get(name), tuple(getattr(scorer, "parts", ()))
    return ListedScorer(
        name,
        str(getattr(scorer, "description", "")),
        str(getattr(scorer, "scale", "")),
        bool(getattr(scorer, "higher_is_better", True)),
        needs_of(scorer),
        str(getattr(scorer, "licence", "not stated")),
        tuple(_listed_part(part) for part in parts),
        _verified(name, scorer, parts),
        None if golden is None else golden.source,
    )


def _listed_part(name: str) -> ListedPart:
    part = PARTS[name]
    source = part.repo if part.repo is not None else next(str(file.url) for file in part.files)
    return ListedPart(name, source, part.licence, is_fetched(default_cache() / "scorers" / name))


def _verified(name: str, scorer: Any, parts: Sequence[str]) -> str:
    if not parts:
        has_model = getattr(scorer, "has_foreign_model", False)
        return NOT_VERIFIED if has_model else "no weights: its definition is its test"
    try:
        located: tuple[LocatedPart, ...] = locate_parts(name, parts, None)
    except ModelError:
        return NOT_VERIFIED
    against = verification_of(name, located)
    return NOT_VERIFIED if against is None else f"verified against {against}"
