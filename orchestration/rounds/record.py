"""The lineage of an exported model, from its file `lineage.json` and the storage.

The file is self-contained: rounds, snapshots, base, digests of settings. With the storage it leads to source rows.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from orchestration import __version__
from orchestration.rounds.rows import find_pair, survey
from orchestration.rounds.seen_pairs import TrainedRound
from orchestration.rounds.series import describe_round
from orchestration.run.context import Run
from orchestration.run.journal import StageRecord
from pipelines.dataset.errors import ConfigError, MapoError, ModelError, SnapshotError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.secrets import redact
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject

LINEAGE = "lineage.json"
VERSION = 1


def lineage_of(run: Run, trained: StageRecord, checkpoint: str, weights: str) -> JsonObject:
    """Return the content of an export's `lineage.json`: the same for the same export, whenever it is written.

    Args:
        run: The run.
        trained: The record of its training.
        checkpoint: The folder of the exported checkpoint.
        weights: `raw` or `ema`.
    """
    assert run.config.encode is not None
    base = run.config.encode
    newest = _round(run, int(trained.details.get("round", 1)), trained.key) or describe_round(
        number=int(trained.details.get("round", 1)),
        key=trained.key,
        details=trained.details,
        finished_at=trained.finished_at,
    )
    rounds = [newest | _used(checkpoint, weights)]
    while (parent := rounds[0].get("parent")) is not None:
        record = _round(run, int(parent["round"]), parent["key"])
        lost = {"round": parent["round"], "key": parent["key"], "parent": None, "is_lost": True}
        rounds.insert(0, (record or lost) | _used(parent["checkpoint"], parent["weights"]))
    lineage = {
        "version": VERSION,
        "mapo": __version__,
        "run": run.config.name,
        "storage": run.storage.url,
        "base": {name: getattr(base, name) for name in ("model", "vae", "revision", "variant")}
        | {"digest": newest["base_digest"]},
        "round": newest["round"],
        "key": trained.key,
        "checkpoint": checkpoint,
        "weights": weights,
        "snapshot": newest["snapshot"],
        "settings": newest["settings"],
        "finished_at": newest["finished_at"],
        "rounds": rounds,
    }
    plain: JsonObject = json.loads(redact(json.dumps(lineage)))
    return plain


def _round(run: Run, number: int, key: str) -> JsonObject | None:
    """Return the record of a round, unless another training has its number now."""
    name = f"{run.folder}/rounds/{number:04d}.json"
    data = run.storage.read_if_there(name)
    if data is None:
        return None
    record: JsonObject = json.loads(data)
    return record if record["key"] == key else None


def _used(checkpoint: str, weights: str) -> JsonObject:
    """Describe which weights of a round the next one, or the export, used: not always those of its last step."""
    return {"checkpoint": checkpoint, "weights": weights, "step": int(re.findall(r"step-(\d+)", checkpoint)[-1])}


def read_lineage(model: str) -> JsonObject:
    """Read the lineage of an exported model.

    Args:
        model: The model's folder, a path or an fsspec URL.

    Raises:
        ModelError: The model has no lineage, or it cannot be read.
    """
    folder = Storage(model)
    if not folder.exists(LINEAGE):
        raise ModelError(
            f"there is no {folder.uri(LINEAGE)}",
            "give the folder of an exported model, such as STORAGE/runs/NAME/model; `mapo export` rewrites the file",
        )
    try:
        lineage: JsonObject = json.loads(folder.read(LINEAGE))
        if lineage["version"] != VERSION:
            raise ValueError(f"version {lineage['version']}, not {VERSION}")
        assert lineage["rounds"]
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ModelError(f"cannot read {folder.uri(LINEAGE)}: {error!r}", "`mapo export` rewrites it") from error
    return lineage


def describe_lineage(
    model: str, *, storage: str | None = None, rows: str | None = None, pair: str | None = None
) -> JsonObject:
    """Return the lineage of an exported model, completed from the tables.

    Args:
        model: The model's folder, a path or an fsspec URL; a copy works too.
        storage: The data set's storage, if it has moved since the training.
        rows: A new parquet file, a path or an fsspec URL, for one row per pair that the model was trained on.
        pair: A `pair_key` or `URI#ROW` to look for.

    Returns:
        `lineage` (the file), `trained_on` and `sources` (None if the tables cannot be read), `pairs` (with `pair`)
        and `notes`.

    Raises:
        ModelError: The model has no lineage.
        MapoError: Rows or a pair were requested, but the tables cannot be read.
    """
    lineage = read_lineage(model)
    place = Storage(storage or lineage["storage"])
    told: JsonObject = {"model": Storage(model).url, "lineage": lineage, "trained_on": None, "sources": None}
    told |= {"pairs": None, "notes": []}
    rounds = _known_rounds(lineage, told["notes"])
    try:
        if pairs_table(place).version is None:
            raise SnapshotError(f"there is no data set at {place.url}", "give its URL with `--storage`")
        if pair is not None:
            told["pairs"] = find_pair(place, rounds, pair)
        else:
            found = survey(place, rounds, rows)
            told["trained_on"] = _totals(found.rounds, found.sources)
            told["sources"] = [
                {"source": name, "uri": uri, **counts} for (name, uri), counts in sorted(found.sources.items())
            ]
    except ConfigError:
        raise
    except MapoError as error:
        if pair is not None or rows is not None:
            raise
        told["notes"].append(f"from the model's own file only: {error.message}")
    return told


def _known_rounds(lineage: JsonObject, notes: list[str]) -> list[TrainedRound]:
    """Return the rounds whose records say what they read; add notes about the others."""
    known = [each for each in lineage["rounds"] if not each.get("is_lost") and None not in each["order"].values()]
    if lost := [str(each["round"]) for each in lineage["rounds"] if each not in known]:
        notes.append(f"the record of round {', '.join(lost)} is missing, so its pairs are not counted")
    return [TrainedRound.of_record(each) for each in known]


def _totals(rounds: Mapping[int, dict[str, int]], sources: Mapping[Any, JsonObject]) -> JsonObject:
    return {
        "pairs": sum(each["first_time"] for each in rounds.values()),
        "removed": sum(each["removed"] for each in sources.values()),
        "rounds": {str(number): counts for number, counts in rounds.items()},
    }
