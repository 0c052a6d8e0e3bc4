"""Judges whose scores were made in another environment: described by whoever imports them, found beside their table."""

import dataclasses
import json

from pipelines.config import ScorerEntry
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.layout import SCORES, fingerprints
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject
from pipelines.scores.judges import JUDGE_FILE, Judge, fingerprint_of, own_name, table_name
from pipelines.scores.plan import table_of
from pipelines.scores.scorers.imported import IMPORTED, ImportedScorer

SHOWN = 12


def foreign_judge(
    name: str,
    fingerprint: str,
    *,
    scale: str = "",
    higher_is_better: bool = True,
    licence: str = "not stated",
    description: str = "",
) -> Judge:
    """Describe a scorer of another environment as a judge, whose scores `read_scores` finds.

    Args:
        name: The scorer's own name, which is that of its results.
        fingerprint: What shapes its scores, in words: code, weights, versions. Other words are another fingerprint.
        scale: Unit and usual range.
        higher_is_better: Whether a higher score is better.
        licence: Licence of its weights.
        description: What it measures.

    Raises:
        ConfigError: A text is empty, or the name is none for a scorer.
    """
    if not fingerprint.strip():
        raise ConfigError(
            f"the scores of {name} have no fingerprint",
            'say what shaped them, such as --fingerprint "UniDet RS200, T2I-CompBench 1b70949"',
        )
    own_name(ImportedScorer(f"{IMPORTED}{name}"), f"{IMPORTED}{name}")
    table_name(name)
    shaping: JsonObject = {"scorer": name, "imported": fingerprint}
    entry = ScorerEntry(name=f"{IMPORTED}{name}")
    return Judge(
        name, entry, fingerprint_of(shaping), ImportedScorer.needs, scale, higher_is_better, licence, description,
        verified=None, shaping=shaping,
    )  # fmt: skip


def imported_judge(storage: Storage, name: str, fingerprint: str = "") -> Judge:
    """Return the judge of imported scores, from what the import wrote beside its table.

    Args:
        storage: The storage of the scores.
        name: The scorer's own name.
        fingerprint: The 32 hex digits, or their beginning; "" where there is but one.

    Raises:
        ConfigError: There are no imported scores of this scorer, or several fingerprints fit.
    """
    found = find_imported(storage, name, fingerprint)
    if not found:
        raise ConfigError(
            f"{storage.uri(SCORES)} has no imported scores of {name}", "bring them: `mapo scores import FILE STORAGE`"
        )
    if len(found) > 1:
        several = ", ".join(each.fingerprint[:SHOWN] for each in found)
        raise ConfigError(
            f"{storage.uri(SCORES)} has {len(found)} imported tables of {name}: {several}",
            f"name one as {IMPORTED}{name}@FINGERPRINT",
        )
    return found[0]


def find_imported(storage: Storage, name: str, fingerprint: str = "") -> list[Judge]:
    """Return the judge of each imported table of a scorer; none if nothing was imported.

    Args:
        storage: The storage of the scores.
        name: The scorer's own name.
        fingerprint: The 32 hex digits, or their beginning; "" for all.
    """
    prefix = f"{table_name(name)}@"
    found = []
    for folder in fingerprints(storage, SCORES):
        if folder.startswith(prefix + fingerprint):
            noted = json.loads(storage.read_if_there(f"{SCORES}/{folder}/{JUDGE_FILE}") or b"{}")
            if str(noted.get("scorer", "")).startswith(IMPORTED):
                found.append(_judge_of(noted))
    return found


def _judge_of(noted: JsonObject) -> Judge:
    """Return the judge that an import described."""
    judge = foreign_judge(
        noted["name"], noted["shaping"]["imported"], scale=noted["scale"], licence=noted["licence"],
        higher_is_better=noted["higher_is_better"], description=noted["description"],
    )  # fmt: skip
    return dataclasses.replace(judge, fingerprint=noted["fingerprint"])


def count_imported(storage: Storage, scorer: str) -> int:
    """Count the imported scores of a scorer, failed ones included, over all of its tables.

    Args:
        storage: The storage of the scores.
        scorer: Its name in a configuration: `imported:NAME`, or `imported:NAME@FINGERPRINT`.
    """
    named = ImportedScorer(scorer)
    found = find_imported(storage, named.name, named.fingerprint)
    return sum(table_of(storage, judge).count_rows() for judge in found)
