"""Scores from another environment, such as detectors in a container: checked, then committed as our own are.

A file of scores has the columns of a table of scores. Every row must be about an image of the storage, a sample or one
of a kept pair, and about its own prompt. A file that is imported again adds nothing; a score that differs from one that
is there already is an error. Light: loads neither ray nor torch.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import ConfigError, SnapshotError, SourceError
from pipelines.dataset.layout import SAMPLES, SCORES, fingerprints, pairs_table, samples_table
from pipelines.dataset.status import Status
from pipelines.dataset.storage import Storage
from pipelines.scores.actor import JUDGED_SCHEMA
from pipelines.scores.execution import Commits, note_judge
from pipelines.scores.foreign import ForeignFile, ForeignScore
from pipelines.scores.judges import JUDGE_FILE, Judge
from pipelines.scores.plan import table_of

ROWS_A_UNIT = 4096
SHOWN = 12


@dataclass(frozen=True)
class Imported:
    """The outcome of an import.

    Args:
        judge: The scorer, as readers of its scores know it.
        num_new: New scores, failed ones included.
        num_failed: New failed ones.
        num_known: Scores of the file that were there.
    """

    judge: Judge
    num_new: int
    num_failed: int
    num_known: int


def import_scores(file: ForeignFile, storage: Storage, judge: Judge) -> Imported:
    """Check the scores of a file against a storage, and commit those that are not there.

    Args:
        file: The scores, from `foreign.read_foreign`.
        storage: The storage of the images.
        judge: The scorer, from `imported.foreign_judge`.

    Raises:
        ConfigError: What readers must know of the scorer differs from what an earlier import said.
        SnapshotError: An image is not on the storage, or belongs to another prompt.
        SourceError: A score differs from one that is there under the same fingerprint.
        StorageError: The storage cannot be read or written.
    """
    check_images(file, storage)
    known = _known_scores(storage, judge, [each.image_sha256 for each in file.scores])
    for each in file.scores:
        _check_equal(each, known.get(each.key), judge, file)
    num_known = sum(each.key in known for each in file.scores)
    _check_noted(storage, judge)
    storage.check_writable()
    note_judge(storage, judge)
    commits = Commits(storage, [judge])
    for unit in _units(file.scores):
        missing = [each for each in unit if each.key not in known]
        if missing:
            rows = [{"judge": 0, "context": "", **each.row()} for each in missing]
            commits.add(pa.Table.from_pylist(rows, schema=JUDGED_SCHEMA))
    commits.finish()
    return Imported(judge, commits.num_scored[judge.name], commits.num_failed[judge.name], num_known)


def _check_noted(storage: Storage, judge: Judge) -> None:
    """Check that a scorer is described as it was before.

    Raises:
        ConfigError: It is not.
    """
    name = f"{SCORES}/{judge.table_name}@{judge.fingerprint}/{JUDGE_FILE}"
    before, now = json.loads(storage.read_if_there(name) or b"{}"), judge.to_json()
    for each, known in before.items():
        if known != now.get(each):
            raise ConfigError(
                f"{each} of {judge.name} is {now.get(each)!r}, but {known!r} in {storage.uri(name)}",
                "describe the scorer as before, or give its scores another fingerprint text",
            )


def _units(scores: Sequence[ForeignScore]) -> Iterator[list[ForeignScore]]:
    """Cut all scores into units, whatever is there, so that an import that was stopped goes on with the same ones."""
    ordered = sorted(scores, key=lambda each: (each.prompt_id, each.image_sha256))
    for start in range(0, len(ordered), ROWS_A_UNIT):
        yield ordered[start : start + ROWS_A_UNIT]


def _check_equal(score: ForeignScore, known: ForeignScore | None, judge: Judge, file: ForeignFile) -> None:
    """Check that a score is the one that is there, if one is.

    Raises:
        SourceError: It is another one.
    """
    if known is not None and known.outcome != score.outcome:
        raise SourceError(
            f"{file.name}, {score.place}: {judge.name} gave the image {score.image_sha256[:SHOWN]} {known.told} "
            f"before, and {score.told} here, under the fingerprint {judge.fingerprint[:SHOWN]}",
            "another version of the scorer needs another fingerprint text: scores are never replaced",
        )


def _known_scores(storage: Storage, judge: Judge, images: Sequence[str]) -> dict[tuple[str, str], ForeignScore]:
    columns = ["image_sha256", "prompt_id", "value", "components", "status", "reason"]
    wanted = pa.array(sorted(set(images)), pa.string())
    found = {}
    for batch in table_of(storage, judge).batches(columns):
        for row in batch.filter(pc.is_in(batch["image_sha256"], value_set=wanted)).to_pylist():
            score = ForeignScore(**row, place="on the storage")
            found[score.key] = score
    return found


def check_images(file: ForeignFile, storage: Storage) -> None:
    """Check that every score is about an image of the storage and its prompt.

    Raises:
        SnapshotError: One is not.
    """
    known = prompts_of_images(storage, {each.image_sha256 for each in file.scores})
    unknown = [each for each in file.scores if each.image_sha256 not in known]
    if unknown:
        raise SnapshotError(
            f"{len(unknown):,} of {len(file.scores):,} scores of {file.name} are about images that {storage.url} does "
            f"not have, such as {unknown[0].image_sha256} ({unknown[0].place})",
            "score the samples and kept pairs of this very storage; a digest is of an image's bytes as they are stored",
        )
    others = [each for each in file.scores if each.prompt_id not in known[each.image_sha256]]
    if others:
        first = others[0]
        raise SnapshotError(
            f"{len(others):,} of {len(file.scores):,} scores of {file.name} name another prompt than their image has, "
            f"such as {first.image_sha256[:SHOWN]} with {first.prompt_id} ({first.place}); its prompt is "
            f"{min(known[first.image_sha256])}",
            "the prompt_id is that of the bare prompt, as in the table of samples",
        )


def prompts_of_images(storage: Storage, images: set[str]) -> dict[str, set[str]]:
    """Return the prompt_ids of those images that are samples, or images of kept rows of the data set, by digest."""
    wanted = pa.array(sorted(images), pa.string())
    found: dict[str, set[str]] = {}
    for sha256, prompt_id in _images_on(storage, wanted):
        found.setdefault(sha256, set()).add(prompt_id)
    return found


def _images_on(storage: Storage, wanted: pa.Array) -> Iterator[tuple[Any, Any]]:
    is_kept = pc.field("status") == str(Status.KEPT)
    tables = [(samples_table(storage, each), ("sha256",)) for each in fingerprints(storage, SAMPLES)]
    for table, columns in (*tables, (pairs_table(storage), ("image_0_sha256", "image_1_sha256"))):
        for batch in table.batches([*columns, "prompt_id"], is_kept):
            for column in columns:
                rows = batch.filter(pc.is_in(batch[column], value_set=wanted))
                yield from zip(rows[column].to_pylist(), rows["prompt_id"].to_pylist(), strict=True)
