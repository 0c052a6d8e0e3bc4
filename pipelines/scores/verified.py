"""Whether a scorer's numbers were checked against published ones, recorded beside its weights."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipelines.dataset.model_fetch import default_cache
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject
from pipelines.scores.cluster_weights import RECORDS, LocatedPart

NOT_VERIFIED = "not verified against a published value"


def record_verification(scorer: str, parts: Sequence[LocatedPart], against: str, values: JsonObject) -> Path:
    """Record that a scorer with these weights gives the published values; return the file.

    Args:
        scorer: The scorer's name.
        parts: The weights that were checked.
        against: The source of the values.
        values: What was published and what was found.
    """
    record = {"scorer": scorer, "weights": _digests(parts), "against": against, "values": values}
    file = _file(scorer)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    return file


def verification_of(scorer: str, parts: Sequence[LocatedPart], storage: Storage | None = None) -> str | None:
    """Return what a scorer with these weights was checked against; None if against nothing.

    Args:
        scorer: The scorer's name.
        parts: Its weights.
        storage: The storage whose cache may have the record; this machine's is looked in as well.
    """
    if not parts:
        return None
    found = [_file(scorer).read_bytes() if _file(scorer).is_file() else None]
    if storage is not None and any(part.folder is None for part in parts):
        found.append(storage.read_if_there(f"{RECORDS}/{scorer}.verified.json"))
    for data in found:
        record = {} if data is None else json.loads(data)
        if record.get("weights") == _digests(parts):
            return str(record["against"])
    return None


def forget_verification(scorer: str) -> None:
    """Remove the record, after a check that failed."""
    _file(scorer).unlink(missing_ok=True)


def publish_verification(scorer: str, storage: Storage) -> None:
    """Copy the record to the storage's cache, if there is one."""
    if _file(scorer).is_file():
        storage.write(f"{RECORDS}/{scorer}.verified.json", _file(scorer).read_bytes())


def _file(scorer: str) -> Path:
    return default_cache() / "scorers" / f"{scorer.replace('/', '_').replace(':', '_')}.verified.json"


def _digests(parts: Sequence[LocatedPart]) -> dict[str, str]:
    return {part.name: part.digest for part in parts}
