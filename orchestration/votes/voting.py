"""A session of votes, apart from its page: what is shown next, and what a key means."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pipelines.dataset.storage import Storage
from pipelines.scores.vote_journal import VoteJournal
from pipelines.scores.votes import BETTER, TIE, WORSE, Ballot, Vote

LEFT, RIGHT, EQUAL, SKIP = "1", "2", "0", "s"
CHOICES = (LEFT, RIGHT, EQUAL, SKIP)


@dataclass(frozen=True)
class Shown:
    """What the page shows; nothing in it says which model is on which side.

    Args:
        position: Of the pair among all of them; None once all are voted on.
        prompt: Its prompt.
        num_done: Number of pairs that are voted on or skipped.
        total: Number of pairs.
        can_undo: Whether there is a vote of this session to take back.
    """

    position: int | None
    prompt: str
    num_done: int
    total: int
    can_undo: bool


class Voting:
    """Votes on ballots in a fixed order; safe to call from several threads.

    Votes that the journal had before stand: they may be in the table already.

    Args:
        ballots: All ballots, in the order in which they are shown.
        journal: The journal.
        storage: The storage of the images.
        now: Tells the time.
    """

    def __init__(
        self,
        ballots: Sequence[Ballot],
        journal: VoteJournal,
        storage: Storage,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._ballots, self._journal, self._storage, self._now = ballots, journal, storage, now
        self._lock = threading.Lock()
        self._before = len(journal.votes)

    def shown(self) -> Shown:
        """Return what the page shows now."""
        with self._lock:
            return self._shown()

    def vote(self, position: int, choice: str) -> bool:
        """Record a choice for the pair at a position; return False if another pair is shown, such as after two clicks.

        Args:
            position: Of the pair.
            choice: One of CHOICES.

        Raises:
            StorageError: The vote could not be written; it does not count.
        """
        with self._lock:
            if position != self._shown().position:
                return False
            ballot = self._ballots[position]
            left = self._journal.session.left(ballot)
            values = {LEFT: WORSE if left else BETTER, RIGHT: BETTER if left else WORSE, EQUAL: TIE, SKIP: None}
            time = self._now().strftime("%Y-%m-%dT%H:%M:%SZ")
            self._journal.add(Vote(ballot.key, values[choice], left, time))
            return True

    def undo(self) -> bool:
        """Take the last vote of this session back; return False if there is none."""
        with self._lock:
            if not self._can_undo():
                return False
            self._journal.undo()
            return True

    def image(self, position: int, side: str) -> bytes | None:
        """Return the bytes of the image on one side, LEFT or RIGHT; None if there is no such pair.

        Raises:
            StorageError: The image cannot be read.
        """
        if not 0 <= position < len(self._ballots) or side not in (LEFT, RIGHT):
            return None
        ballot = self._ballots[position]
        left = self._journal.session.left(ballot)
        place = ballot.images[left if side == LEFT else 1 - left]
        return self._storage.read_range(place.shard, place.offset, place.length, place.sha256)

    def _shown(self) -> Shown:
        done = {vote.ballot for vote in self._journal.votes}
        left = (place for place, ballot in enumerate(self._ballots) if ballot.key not in done)
        position = next(left, None)
        prompt = "" if position is None else self._ballots[position].prompt
        total = len(self._ballots)
        num_done = sum(ballot.key in done for ballot in self._ballots)
        return Shown(position, prompt, num_done, total, self._can_undo())

    def _can_undo(self) -> bool:
        return len(self._journal.votes) > self._before
