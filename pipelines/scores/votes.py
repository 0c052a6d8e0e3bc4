"""Blind votes of one person on pairs of images: ballots in a seeded order, and votes as scores.

A vote is a score of both images: 1 for the better one, 0 for the other, 0.5 for both of a tie. It depends on the image
beside it, which is its context. Each session has a fingerprint, and so a table, of its own: two people never meet in
one. Light: needs neither ray nor torch.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from pipelines.config import ScorerEntry
from pipelines.dataset.layout import SCORES, SCORES_SCHEMA
from pipelines.dataset.pair import Status
from pipelines.dataset.status import ScoreStatus
from pipelines.dataset.storage import Storage
from pipelines.scores.images import PLACE, contexts, keys_of_scores, places_in
from pipelines.scores.judges import Judge, fingerprint_of
from pipelines.scores.plan import KEY_COLUMNS, commit_id, table_of
from pipelines.suites.results import VOTES
from pipelines.suites.statistics import win_rate

NAME = VOTES
NEEDS = ("image", "prompt", "references")
"""A vote's reference is the image that it was shown beside."""
BETTER, WORSE, TIE = 1.0, 0.0, 0.5
CODE_VERSION = 1


@dataclass(frozen=True)
class ImagePlace:
    """Where the bytes of an image are; the fields of `images.PLACE`."""

    shard: str
    offset: int
    length: int
    sha256: str


@dataclass(frozen=True)
class Ballot:
    """Two images of one prompt from the same noise, in the order of the session's models."""

    prompt_id: str
    prompt: str
    index: int
    images: tuple[ImagePlace, ImagePlace]

    @property
    def key(self) -> str:
        """Prompt and number of the image."""
        return f"{self.prompt_id}/{self.index}"


@dataclass(frozen=True)
class Session:
    """One person's votes on one pair of models.

    Args:
        id: Drawn at random when the session begins, so that two sessions never share a table.
        suite: Name and version of the suite.
        models: The two models.
        samples: The fingerprints of their samples.
        seed: Seed of the order.
    """

    id: str
    suite: str
    models: tuple[str, str]
    samples: tuple[str, str]
    seed: int

    @property
    def judge(self) -> Judge:
        """The votes as a judge: the name, needs and fingerprint of their table."""
        shaping = {"scorer": NAME, "code": CODE_VERSION, **json.loads(json.dumps(asdict(self)))}
        return Judge(
            name=NAME,
            entry=ScorerEntry(name=NAME),
            fingerprint=fingerprint_of(shaping),
            needs=NEEDS,
            scale="1 better, 0.5 tie, 0 worse",
            higher_is_better=True,
            licence="yours",
            description=f"Which of two images is better? Blind votes of one person, on {self.suite}.",
            verified=None,
            shaping=shaping,
        )

    def in_order(self, ballots: Iterable[Ballot]) -> list[Ballot]:
        """Return the ballots in the order in which they are shown; one that is added later moves no other."""
        return sorted(ballots, key=lambda ballot: self._draw(ballot, "order"))

    def left(self, ballot: Ballot) -> int:
        """Return which of the two images is shown on the left: 0 or 1."""
        return int(self._draw(ballot, "side")[0], 16) % 2

    def _draw(self, ballot: Ballot, what: str) -> str:
        return hashlib.sha256(f"mapo-ballot-1 {what} {self.seed} {self.id} {ballot.key}".encode()).hexdigest()


@dataclass(frozen=True)
class Vote:
    """A vote on one ballot.

    Args:
        ballot: The ballot's key.
        value: Score of the first model's image: BETTER, WORSE or TIE; None if the ballot was skipped.
        left: Which of the two images was shown on the left.
        time: ISO time, UTC.
    """

    ballot: str
    value: float | None
    left: int
    time: str


@dataclass(frozen=True)
class Pairing:
    """Ballots from the samples of two models, and how many samples make none.

    Args:
        ballots: In the order of the samples.
        num_absent: Samples that one of the two models could not draw.
        num_equal: Samples that are the same image, byte for byte.
    """

    ballots: list[Ballot]
    num_absent: int
    num_equal: int


def pair_samples(first: pa.Table, second: pa.Table) -> Pairing:
    """Pair the samples of two models by prompt and number of the image.

    Args:
        first: Rows of SAMPLES_SCHEMA of the first model, drawn or quarantined.
        second: Those of the other model.
    """
    others = {(row["prompt_id"], row["index"]): row for row in second.to_pylist()}
    ballots: dict[tuple[str, ...], Ballot] = {}
    num_absent = num_equal = 0
    for row in first.to_pylist():
        other = others.get((row["prompt_id"], row["index"]))
        if other is None or row["status"] != Status.KEPT or other["status"] != Status.KEPT:
            num_absent += 1
            continue
        images = _place(row), _place(other)
        if images[0].sha256 == images[1].sha256:
            num_equal += 1
            continue
        key = (row["prompt_id"], images[0].sha256, images[1].sha256)  # what a score is known by
        ballots.setdefault(key, Ballot(row["prompt_id"], row["prompt"], row["index"], images))
    return Pairing(list(ballots.values()), num_absent, num_equal)


def _place(row: Mapping[str, object]) -> ImagePlace:
    return ImagePlace(*(row[name] for name in PLACE.names))  # type: ignore[arg-type]


def score_rows(ballots: Mapping[str, Ballot], votes: Sequence[Vote]) -> pa.Table:
    """Return votes as rows of SCORES_SCHEMA without `unit`, two for each; skipped ballots have none.

    Args:
        ballots: The ballots by key.
        votes: The votes.
    """
    rows = []
    for vote in votes:
        if vote.value is None:
            continue
        ballot = ballots[vote.ballot]
        for side, value in enumerate((vote.value, 1 - vote.value)):
            shown = {"shown_left": float(vote.left == side)}
            rows.append(
                {
                    "image_sha256": ballot.images[side].sha256,
                    "prompt_id": ballot.prompt_id,
                    "references": [asdict(ballot.images[1 - side])],
                    "value": value,
                    "components": json.dumps(shown),
                    "status": str(ScoreStatus.SCORED),
                    "reason": None,
                }
            )
    fields = [field for field in SCORES_SCHEMA if field.name not in ("context", "unit")]
    table = pa.Table.from_pylist(rows, schema=pa.schema([*fields, ("references", pa.list_(PLACE))]))
    context = contexts(table, ("references",))
    wanted = [field for field in SCORES_SCHEMA if field.name != "unit"]
    return table.append_column("context", context).select([field.name for field in wanted]).cast(pa.schema(wanted))


def commit_votes(storage: Storage, session: Session, ballots: Mapping[str, Ballot], votes: Sequence[Vote]) -> int:
    """Commit the votes that are not in the session's table; return their number. Safe to repeat after a kill.

    Args:
        storage: The storage of the samples.
        session: The session.
        ballots: Its ballots by key.
        votes: All its votes.

    Raises:
        StorageError: The table cannot be read or written.
    """
    judge, rows = session.judge, score_rows(ballots, votes)
    if not rows.num_rows:
        return 0
    table = table_of(storage, judge)
    known = keys_of_scores(table.read(KEY_COLUMNS))
    rows = rows.filter(pa.array(places_in(known, keys_of_scores(rows)) < 0))
    if not rows.num_rows:
        return 0
    name = f"{SCORES}/{judge.table_name}@{judge.fingerprint}/judge.json"
    if not storage.exists(name):
        storage.write(name, (json.dumps(judge.to_json(), indent=1, sort_keys=True) + "\n").encode())
    unit = commit_id(judge, rows)
    table.append(unit, rows.append_column("unit", pa.repeat(unit, rows.num_rows)))
    return int(rows.num_rows) // 2


@dataclass(frozen=True)
class Result:
    """What the votes of a session say of the first model; a prompt counts once, with the mean over its images.

    Args:
        num_votes: Ballots that were voted on.
        num_prompts: Their prompts.
        rate: Share of the prompts on which the first model is better, ties counting half.
        low: End of its 95 % interval.
        high: The other end.
    """

    num_votes: int
    num_prompts: int
    rate: float
    low: float
    high: float


def result_of(votes: Iterable[Vote], ballots: Mapping[str, Ballot]) -> Result | None:
    """Return the outcome of votes; None without one."""
    values: dict[str, list[float]] = {}
    for vote in votes:
        if vote.value is not None:
            values.setdefault(ballots[vote.ballot].prompt_id, []).append(vote.value)
    if not values:
        return None
    means = [float(np.mean(each)) for each in values.values()]
    won = win_rate(means, [1 - mean for mean in means], tolerance=0.0)
    return Result(sum(map(len, values.values())), len(values), won.rate, won.low, won.high)
