"""The scorers of an execution, checked before any work: their names, weights, needs and fingerprints.

Light: loads neither ray nor torch, unless a user's own scorer does.
"""

import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.config import ScorerEntry
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.storage import Storage, file_sha256
from pipelines.dataset.values import JsonObject
from pipelines.scores.cluster_weights import LocatedPart, locate_folder, locate_parts
from pipelines.scores.fit import FitPairs
from pipelines.scores.images import ALL_NEEDS
from pipelines.scores.scorers import SCORERS, needs_of, new_scorer
from pipelines.scores.scorers.imported import IMPORTED, ImportedScorer
from pipelines.scores.scorers.scorer import DTYPE, BuiltIn
from pipelines.scores.verified import verification_of
from pipelines.suites.results import TAGS, VOTES

JUDGE_FILE = "judge.json"
"""Beside a table of scores: `Judge.to_json`."""
MAX_TABLE_NAME = 160
CODE_VERSION = 1
"""Raise it when every scorer would give other numbers."""


@dataclass(frozen=True)
class Judge:
    """A scorer that is ready to be run anywhere on the cluster.

    Args:
        name: The scorer's own name, which is that of its results.
        entry: What the configuration says: name, weights, batch size, options.
        fingerprint: 32 hex digits of everything that shapes a score, besides the image.
        needs: What it needs of each image, such as `image` and `prompt`.
        scale: Unit and usual range.
        higher_is_better: Whether a higher score is better.
        licence: Licence of the weights.
        description: What it measures, as a question or a phrase.
        verified: What its values were checked against; None if against nothing published.
        parts: The files of its weights, by digest.
        folder: The folder from which the driver imports a user's own scorer; None for a built-in one.
        fit: The pairs that it learns from; None if it has no `fit`.
        shaping: What the fingerprint is a hash of.
    """

    name: str
    entry: ScorerEntry
    fingerprint: str
    needs: tuple[str, ...]
    scale: str
    higher_is_better: bool
    licence: str
    description: str
    verified: str | None
    parts: tuple[LocatedPart, ...] = ()
    folder: str | None = None
    fit: FitPairs | None = field(default=None, compare=False, repr=False)
    shaping: JsonObject = field(default_factory=dict, compare=False, repr=False)

    @property
    def table_name(self) -> str:
        """The name of the folder of its scores, without the fingerprint."""
        return table_name(self.name)

    @property
    def is_imported(self) -> bool:
        """Whether its scores are made in another environment, and can only be imported."""
        return self.entry.name.startswith(IMPORTED)

    def to_json(self) -> JsonObject:
        """Return what readers of its scores need to know, as plain data."""
        return {
            "name": self.name,
            "scorer": self.entry.name,
            "description": self.description,
            "scale": self.scale,
            "higher_is_better": self.higher_is_better,
            "licence": self.licence,
            "needs": list(self.needs),
            "fingerprint": self.fingerprint,
            "shaping": self.shaping,
        }


def table_name(name: str) -> str:
    """Return a scorer's name as the name of a folder: other characters than letters, digits, `._-` as `~` and hex.

    Raises:
        ConfigError: The name is empty, or too long for a folder.
    """
    escaped = re.sub(r"[^A-Za-z0-9._-]|^[.-]", _escaped, name)
    if not escaped or len(escaped) > MAX_TABLE_NAME:
        raise ConfigError(
            f"the name of a scorer is {name[:60]!r}, {len(escaped)} characters as the name of a folder; "
            f"1 to {MAX_TABLE_NAME} are possible",
            "set `name` of the scorer's class to a short text",
        )
    return escaped


def _escaped(found: re.Match[str]) -> str:
    return "".join(f"~{byte:02x}" for byte in found[0].encode())


def prepare_judges(
    entries: Sequence[ScorerEntry],
    storage: Storage,
    *,
    fit_on: FitPairs | None = None,
    provided: Collection[str] = ALL_NEEDS,
) -> list[Judge]:
    """Check scorers before any work, and find their weights.

    Args:
        entries: The scorers of the configuration.
        storage: The storage whose cache may hold weights; it is looked in before this machine's.
        fit_on: Held-out pairs for scorers with a `fit`; None if there are none.
        provided: What the images will have.

    Returns:
        One judge for each entry, in order.

    Raises:
        ConfigError: A name is unknown or given twice, or a scorer needs something that is not provided.
        ModelError: Weights are neither in the storage's cache nor on this machine, or are damaged or bfloat16.
    """
    judges: list[Judge] = []
    for entry in entries:
        judge = _prepare(entry, storage, fit_on, provided)
        twin = next((each for each in judges if each.name == judge.name), None)
        if twin is not None:
            raise ConfigError(
                f"the scorers {twin.entry.name} and {entry.name} are both called {judge.name}",
                "give the class of one of them another `name`, or leave one out",
            )
        judges.append(judge)
    return judges


def _prepare(entry: ScorerEntry, storage: Storage, fit_on: FitPairs | None, provided: Collection[str]) -> Judge:
    scorer = new_scorer(entry.name, entry.options)
    if isinstance(scorer, ImportedScorer):
        from pipelines.scores.imported import imported_judge  # which is built on this file

        return replace(imported_judge(storage, scorer.name, scorer.fingerprint), entry=entry)
    name, needs = own_name(scorer, entry.name), needs_of(scorer)
    if missing := [need for need in needs if need not in provided]:
        has = "" if set(missing) - set(ALL_NEEDS) else ", which these images do not have"
        raise ConfigError(
            f"the scorer {name} needs {', '.join(missing)}{has or ', which nothing provides'}",
            f"leave it out; scorers may need {', '.join(ALL_NEEDS)}",
        )
    table_name(name)
    if not callable(getattr(scorer, "score", None)):
        raise ConfigError(f"the scorer {entry.name} has no `score`", "see the guide on evaluation: Write a scorer")
    parts = _parts(scorer, entry, storage)
    fit = _pairs_for(scorer, name, fit_on)
    shaping = shaping_of(scorer, entry.name, parts, fit)
    return Judge(
        name,
        entry,
        fingerprint_of(shaping),
        needs,
        str(getattr(scorer, "scale", "")),
        bool(getattr(scorer, "higher_is_better", True)),
        str(getattr(scorer, "licence", "not stated")),
        str(getattr(scorer, "description", "")),
        verification_of(entry.name, parts, storage),
        parts,
        None if entry.name in SCORERS else _import_folder(scorer),
        fit,
        shaping,
    )


def own_name(scorer: Any, given: str) -> str:
    """Return a scorer's own name.

    Raises:
        ConfigError: It has none.
    """
    name = getattr(scorer, "name", None)
    if not isinstance(name, str):
        raise ConfigError(f"the scorer {given} has no `name`", "set `name` of its class to a short text")
    if name in (TAGS, VOTES) or "\n" in name:
        raise ConfigError(
            f"the scorer {given} is called {name!r}, which has another meaning in results", "give it another `name`"
        )
    return name


def _parts(scorer: Any, entry: ScorerEntry, storage: Storage) -> tuple[LocatedPart, ...]:
    folder = None if entry.weights is None else Path(entry.weights).expanduser().absolute()
    if folder is not None and not folder.is_dir():
        raise ModelError(
            f"there is no folder {folder}, the weights of the scorer {entry.name}",
            "give a local folder, or leave `weights` out for what `mapo scorers fetch` brought",
        )
    if isinstance(scorer, BuiltIn):
        return locate_parts(entry.name, scorer.parts, storage, folder)
    return () if folder is None else (locate_folder(folder),)


def _pairs_for(scorer: Any, name: str, fit_on: FitPairs | None) -> FitPairs | None:
    if not hasattr(scorer, "fit"):
        return None
    if fit_on is None or not fit_on.table.num_rows:
        raise ConfigError(
            f"the scorer {name} learns from held-out pairs, and there are none",
            "raise `ingest.validation_ratio` or `evaluate.max_audit_pairs`, or leave the scorer out",
        )
    return fit_on


def fingerprint_of(shaping: JsonObject) -> str:
    """Return the 32 hex digits that stand for everything that shapes a score."""
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:32]


def shaping_of(scorer: Any, given: str, parts: Sequence[LocatedPart], fit: FitPairs | None) -> JsonObject:
    """Return everything that shapes a score, besides the image.

    Args:
        scorer: A new scorer, not loaded.
        given: Its name in the configuration.
        parts: The files of its weights.
        fit: The pairs that it learns from.
    """
    digests = {part.name: part.digest for part in parts}
    shaping: JsonObject
    if isinstance(scorer, BuiltIn):
        shaping = scorer.shaping(digests)
    else:
        shaping = {"scorer": own_name(scorer, given), "weights": digests, "dtype": DTYPE}
        shaping["version"] = str(getattr(scorer, "version", ""))
    if given not in SCORERS:
        shaping["class"], shaping["source"] = given, _source_digest(scorer)
    if fit is not None:
        shaping["fit"] = fit.digest()
    shaping["code"] = CODE_VERSION
    return shaping


def _source_digest(scorer: Any) -> str:
    """Return the digest of the module of a scorer's class; "" if it has no file."""
    file = _source_file(scorer)
    return "" if file is None else file_sha256(file)


def _source_file(scorer: Any) -> Path | None:
    try:
        file = inspect.getsourcefile(importlib.import_module(type(scorer).__module__))
    except (TypeError, ImportError):
        return None
    return Path(file).absolute() if file is not None and Path(file).is_file() else None


def _import_folder(scorer: Any) -> str | None:
    """Return the folder on the path of modules from which the module of a scorer's class is imported."""
    file = _source_file(scorer)
    if file is None:
        return None
    depth = type(scorer).__module__.count(".") + (file.name == "__init__.py")
    return str(file.parents[depth])
