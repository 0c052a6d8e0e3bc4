"""The sessions of votes on a storage, and those of their votes that are about the images of a suite as it is now.

Light: needs neither ray nor torch.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa

from pipelines.dataset.key_map import Keys
from pipelines.dataset.layout import SCORES, fingerprints, scores_table
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.scores.images import PLACE, Rows, keys_of_images, keys_of_scores, places_in
from pipelines.scores.judges import JUDGE_FILE
from pipelines.scores.plan import KEY_COLUMNS
from pipelines.scores.votes import NAME, NEEDS, Ballot, Session, pair_samples
from pipelines.suites.votes import VOTES_SCHEMA, Votes

GONE = "on images that are not in the suite now"


@dataclass(frozen=True)
class VoteTable:
    """The votes of one session.

    Args:
        session: The session.
        fingerprint: Of its table.
        table: The table, of scores.
    """

    session: Session
    fingerprint: str
    table: Table

    @property
    def suite(self) -> str:
        """Name of the suite, without its version."""
        return self.session.suite.partition("@")[0]


def vote_tables(storage: Storage, suites: Collection[str]) -> list[VoteTable]:
    """Return the sessions of votes on suites, by their fingerprints.

    Args:
        storage: The storage of the scores.
        suites: Names of suites, without versions.

    Raises:
        StorageError: The storage cannot be read.
    """
    names = [each for each in fingerprints(storage, SCORES) if each.startswith(f"{NAME}@")]
    found = (_opened(storage, *each.split("@")) for each in names)
    return [each for each in found if each is not None and each.suite in suites]


def _opened(storage: Storage, name: str, fingerprint: str) -> VoteTable | None:
    """Return a session; None for one that was killed before its first commit."""
    noted = json.loads(storage.read_if_there(f"{SCORES}/{name}@{fingerprint}/{JUDGE_FILE}") or b"{}")
    if not noted:
        return None
    told = noted["shaping"]
    (one, other), (of_one, of_other) = told["models"], told["samples"]
    session = Session(told["id"], told["suite"], (one, other), (of_one, of_other), told["seed"])
    return VoteTable(session, fingerprint, scores_table(storage, name, fingerprint))


def count_votes(
    tables: Iterable[VoteTable], samples: Mapping[str, pa.Table], *, against: str, may_rank: bool = True
) -> Votes:
    """Return the votes on images that models have now, for each model against one of them.

    A vote is on the bytes of two images and their prompt: it counts for every two models that have these images.

    Args:
        tables: The sessions on the suite.
        samples: Rows of SAMPLES_SCHEMA by model.
        against: The model that the others are compared with.
        may_rank: Whether the suite leaves its primary judges to the configuration.
    """
    pairs, rest = [(model, against) for model in samples if model != against], _others(samples, against)
    known = {each: _Pairs.of(samples[each[0]], samples[each[1]]) for each in (*pairs, *rest)}
    rows, left_out = [VOTES_SCHEMA.empty_table()], Counter[str]()
    for each in tables:
        scores = each.table.read([*KEY_COLUMNS, "value"])
        keys, is_known = keys_of_scores(scores), np.zeros(scores.num_rows, np.bool_)
        for model, _ in pairs:
            rows.append(known[model, against].votes(scores, keys, is_known, model=model, voter=each.session.id))
        num_counted = int(is_known.sum()) // 2
        for pair in rest:
            known[pair].votes(scores, keys, is_known, model="", voter="")
        num_known = int(is_known.sum()) // 2
        left_out[GONE] += scores.num_rows // 2 - num_known
        left_out[f"on two models of which neither is {against}"] += num_known - num_counted
    return Votes(pa.concat_tables(rows), {reason: count for reason, count in left_out.items() if count}, may_rank)


def _others(samples: Mapping[str, pa.Table], against: str) -> list[tuple[str, str]]:
    """Return every two models without the one that is compared with."""
    return list(combinations([model for model in samples if model != against], 2))


@dataclass(frozen=True)
class _Pairs:
    """Pairs of images of two models, and the keys of a vote's two rows for each."""

    ballots: list[Ballot]
    first: Keys
    second: Keys

    @staticmethod
    def of(first: pa.Table, second: pa.Table) -> "_Pairs":
        """Pair the samples of two models."""
        ballots = pair_samples(first, second).ballots
        return _Pairs(ballots, *(_keys(ballots, side) for side in (0, 1)))

    def votes(self, scores: pa.Table, keys: Keys, is_known: np.ndarray, *, model: str, voter: str) -> pa.Table:
        """Return the votes on these pairs as rows of VOTES_SCHEMA, and mark their rows as known."""
        places = places_in(keys, self.first)
        is_voted = places >= 0
        values = scores["value"].to_numpy()
        is_known[places[is_voted]] = True
        others: Rows = places_in(keys, self.second)
        is_known[others[others >= 0]] = True
        voted = np.flatnonzero(is_voted)
        found = {
            "model": [model] * len(voted),
            "voter": [voter] * len(voted),
            "prompt_id": [self.ballots[place].prompt_id for place in voted],
            "index": [self.ballots[place].index for place in voted],
            "value": values[places[is_voted]],
        }
        return pa.table(found, schema=VOTES_SCHEMA)


def _keys(ballots: Iterable[Ballot], side: int) -> Keys:
    """Return the key of the score of each ballot's image on one side, which depends on the image beside it."""
    rows = list(_images(ballots, side))
    schema = pa.schema([("image_sha256", pa.string()), ("prompt_id", pa.string()), ("references", pa.list_(PLACE))])
    return keys_of_images(pa.Table.from_pylist(rows, schema=schema), NEEDS)


def _images(ballots: Iterable[Ballot], side: int) -> Iterator[dict[str, object]]:
    for ballot in ballots:
        yield {
            "image_sha256": ballot.images[side].sha256,
            "prompt_id": ballot.prompt_id,
            "references": [asdict(ballot.images[1 - side])],
        }
