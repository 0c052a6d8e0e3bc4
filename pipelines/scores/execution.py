"""Scores missing images on Ray Data actors and commits them, judge by judge.

Invariants: what has a row under a judge's fingerprint is never scored again by it; a unit's scores of one judge are
committed once, as a whole, without those that a server left unanswered, which the next run tries again; nothing is held
in the driver but the plan and one unit.
"""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import SCORES
from pipelines.dataset.secrets import write_line
from pipelines.dataset.status import ScoreStatus
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.progress import ProgressBar
from pipelines.resources import nodes
from pipelines.scores.cluster_weights import publish
from pipelines.scores.judges import JUDGE_FILE, Judge
from pipelines.scores.plan import commit_id, pending_scores, table_of
from pipelines.scores.scorers import new_scorer
from pipelines.scores.scorers.result import UNANSWERED
from pipelines.scores.scorers.text import clean_as_open_clip
from pipelines.units.lazy import actor_by_name
from pipelines.units.pool import Pool, demand_of_part, run_units, share_devices, units_dataset
from pipelines.units.stats import Speed, Tally
from pipelines.units.unit import Unit
from pipelines.units.waiting import wait_for, wait_until_placed
from pipelines.units.workers import Workers

MAX_TABLE_FILES = 64
SHORT = 12


@dataclass(frozen=True)
class ScoringFigures:
    """The work of one call of `score`.

    Args:
        num_scored: New scores by the judge's name, failed ones included.
        num_failed: New failed ones by the judge's name.
        num_unanswered: Scores that are still missing because a server did not answer, by the judge's name; counted in
            neither of the others.
        speed: Scores a second and where the time went; None if nothing was missing.
    """

    num_scored: dict[str, int]
    num_failed: dict[str, int]
    speed: Speed | None
    num_unanswered: dict[str, int] = field(default_factory=dict)


def score(
    storage: Storage,
    judges: Sequence[Judge],
    images: pa.Table,
    workers: Workers,
    say: Callable[[str], None] = write_line,
) -> ScoringFigures:
    """Bring the scores of images up to date. Needs a running Ray if something is missing.

    Args:
        storage: The storage of images, scores and weights.
        judges: From `prepare_judges`.
        images: Rows of IMAGES_SCHEMA; the column JUDGES may say who scores which image.
        workers: Number, device and resources of the scoring actors; the batch size is each judge's own.
        say: Takes lines for the user.

    Raises:
        ConfigError: A judge needs a column that the images do not have.
        SnapshotError: A judge's scores are imported, and not all of them are.
        ModelError: Weights are missing on a node, or damaged.
        EncodingError: There is not enough memory for even one image, or a unit repeatedly kills its actor.
        ClusterError: No node has the resources of a scorer, and none joined in time.
        ShardCorrupt: An image differs from its digest.
        StorageError: An image cannot be read, or scores cannot be written.
    """
    todo = pending_scores(storage, judges, images)
    names = [judge.name for judge in judges]
    check_imported(judges, todo.num_missing)
    if not todo.units:
        return ScoringFigures(dict.fromkeys(names, 0), dict.fromkeys(names, 0), None)
    wanted = [judge for judge, count in zip(judges, todo.num_missing, strict=True) if count]
    if len(wanted) < len(judges):  # no actor loads what nobody asks
        found = score(storage, wanted, images, workers, say)
        nothing = dict.fromkeys(names, 0)
        return replace(
            found, num_scored=nothing | found.num_scored, num_failed=nothing | found.num_failed,
            num_unanswered=nothing | found.num_unanswered,
        )  # fmt: skip
    _check_prompts(judges, images)
    storage.check_writable()
    if len(nodes()) > 1:
        publish([part for judge in judges for part in judge.parts], storage, say)
    for judge in judges:
        note_judge(storage, judge)
    counted = Commits(storage, judges)
    with ProgressBar(workers.stage, todo.total, "scores") as progress:
        speed = _run(storage, judges, todo.units, workers, counted, progress)
    counted.finish()
    counted.tell(say)
    return ScoringFigures(counted.num_scored, counted.num_failed, speed, counted.num_unanswered)


def check_imported(judges: Sequence[Judge], num_missing: Sequence[int]) -> None:
    """Check that judges of another environment have scored everything.

    Raises:
        SnapshotError: One has not.
    """
    for judge, count in zip(judges, num_missing, strict=True):
        if judge.is_imported and count:
            raise SnapshotError(
                f"{count:,} images have no imported score of {judge.name}@{judge.fingerprint[:SHORT]}",
                "score the samples there and bring the scores: `mapo scores import FILE STORAGE`; then rerun",
            )


def _check_prompts(judges: Sequence[Judge], images: pa.Table) -> None:
    """Check that this machine can clean the prompts of judges that need it.

    Raises:
        ModelError: ftfy is not installed, and a prompt is not plain enough to do without.
    """
    cleans = any(getattr(new_scorer(judge.entry.name), "as_open_clip", False) for judge in judges)
    if cleans and importlib.util.find_spec("ftfy") is None:
        for prompt in pc.unique(images["prompt"]).drop_null().to_pylist():
            clean_as_open_clip(prompt)


def note_judge(storage: Storage, judge: Judge) -> None:
    """Write beside a table of scores which scorer made it and what its fingerprint is a hash of, unless it is there."""
    name = f"{SCORES}/{judge.table_name}@{judge.fingerprint}/{JUDGE_FILE}"
    if not storage.exists(name):
        storage.write(name, (json.dumps(judge.to_json(), indent=1, sort_keys=True) + "\n").encode())


def _run(
    storage: Storage,
    judges: Sequence[Judge],
    units: list[Unit],
    workers: Workers,
    commits: "Commits",
    progress: ProgressBar,
) -> Speed | None:
    pool = share_devices(workers, len(units))
    batch_size = max(judge.entry.batch_size for judge in judges)
    tally = Tally(workers.stage, batch_size, pool.most)
    arguments = (storage, tuple(judges), pool.num_threads)
    done = run_units(actor_by_name("pipelines.scores.actor:ScoreImages"), arguments, pool, units_dataset(units))
    with contextlib.closing(done):
        _wait(workers, pool, progress)
        for _, rows, effort in done:
            commits.add(rows)
            progress.say(tally.add(rows, effort))
            progress.advance(rows.num_rows)
    return tally.take()


def _wait(workers: Workers, pool: Pool, progress: ProgressBar) -> None:
    demand = demand_of_part(pool)
    way_out = "add such a node, or score on CPUs; a longer `start_timeout_s` allows a longer wait"
    wait = wait_for(workers.stage, demand, timeout_s=workers.start_timeout_s, way_out=way_out, say=progress.say)
    wait_until_placed(demand, wait, count=pool.first)


class Commits:
    """Commits the scores of units, each judge's to its own table, and counts them.

    Args:
        storage: The storage of the scores.
        judges: The judges, in the order of the units' columns.
    """

    def __init__(self, storage: Storage, judges: Sequence[Judge]) -> None:
        self._judges = judges
        self._tables: list[Table] = [table_of(storage, judge) for judge in judges]
        self.num_scored = {judge.name: 0 for judge in judges}
        self.num_failed = {judge.name: 0 for judge in judges}
        self.num_unanswered = {judge.name: 0 for judge in judges}
        self._reasons: dict[str, str] = {}

    def finish(self) -> None:
        """Merge the files of tables that have many."""
        for table in self._tables:
            if len(table.files()) > MAX_TABLE_FILES:
                table.merge_files()

    def tell(self, say: Callable[[str], None]) -> None:
        """Say how many scores are missing because a server did not answer, and why."""
        for name, reason in self._reasons.items():
            count = self.num_unanswered[name]
            say(f"scores: {name} has no answer for {count:,} images, which a rerun asks again; such as: {reason}")

    def add(self, rows: pa.Table) -> None:
        """Commit the rows of one unit, of schema `JUDGED_SCHEMA`, but not those that a server left unanswered."""
        for position, judge in enumerate(self._judges):
            own = self._answered(judge, rows.filter(pc.equal(rows["judge"], position)).drop_columns(["judge"]))
            if not own.num_rows:
                continue
            unit = commit_id(judge, own)
            self._tables[position].append(unit, own.append_column("unit", pa.repeat(unit, own.num_rows)))
            self.num_scored[judge.name] += own.num_rows
            self.num_failed[judge.name] += int(pc.sum(pc.equal(own["status"], str(ScoreStatus.FAILED))).as_py() or 0)

    def _answered(self, judge: Judge, rows: pa.Table) -> pa.Table:
        """Count and leave out the rows that a server left unanswered."""
        is_unanswered = pc.equal(rows["status"], UNANSWERED)
        if count := int(pc.sum(is_unanswered).as_py() or 0):
            self.num_unanswered[judge.name] += count
            self._reasons.setdefault(judge.name, rows["reason"].filter(is_unanswered)[0].as_py())
        return rows.filter(pc.invert(is_unanswered))
