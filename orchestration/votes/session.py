"""One session of votes from a configuration: its images, its journal, its page, and the scores that come of it."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

from orchestration.cluster.signals import Interruption, Stopped
from orchestration.config import RunConfig
from orchestration.run.context import Run, Say
from orchestration.votes.ballots import Contest
from orchestration.votes.server import VoteServer
from orchestration.votes.voting import Voting
from pipelines.scores.vote_journal import VoteJournal
from pipelines.scores.votes import Ballot, Session, commit_votes, result_of


def hold_session(
    config: RunConfig, models: tuple[str, str], *, suite: str | None, port: int, out: Path | None, say: Say
) -> None:
    """Serve the page until it is finished, or the command is stopped; then commit the votes.

    Votes of an earlier session that was killed are committed first. The same command goes on where it ended.

    Args:
        config: The run's configuration.
        models: The two models.
        suite: Name of a suite of the configuration; None for its first.
        port: The port on loopback; 0 for any that is free.
        out: The journal; by default a file in the working folder, named after run, suite and models.
        say: Shows a line to the user.

    Raises:
        ConfigError: A model, the suite, the journal or the port is wrong.
        SnapshotError: Samples are not drawn.
        StorageError: The votes cannot be committed; they stay in the journal.
    """
    run = Run.open(config, say)
    contest = Contest(run, models, suite)
    pairing = contest.pairing()
    wanted = Session(uuid.uuid4().hex, contest.suite, models, contest.samples, config.seed)
    file = out or Path(f"votes-{config.name}-{contest.cells[0].suite.name}-{'-'.join(models)}.jsonl")
    journal = VoteJournal(file, wanted)
    try:
        ballots = {ballot.key: ballot for ballot in journal.session.in_order(pairing.ballots)}
        _commit(run, journal, ballots)
        _tell_begin(say, journal, ballots, contest.suite)
        for count, why in ((pairing.num_equal, "equal images"), (pairing.num_absent, "images that are not there")):
            if count:
                say(f"left out {count:,} pairs of {why}")
        _serve(VoteServer(Voting(list(ballots.values()), journal, run.storage), port), say)
        _commit(run, journal, ballots)
        _tell_end(say, run, journal, ballots)
    finally:
        journal.close()


def _serve(server: VoteServer, say: Say) -> None:
    """Serve until the page is finished or a signal comes, and let a vote that is being written end."""
    thread = threading.Thread(target=server.serve_forever, name="votes")
    with Interruption().armed():
        thread.start()
        try:
            say(f"open     {server.url}")
            say("keys     1 left, 2 right, 0 equal, s skip, u undo; Ctrl-C ends the session and keeps the votes")
            server.finished.wait()
        except Stopped:
            pass
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _commit(run: Run, journal: VoteJournal, ballots: dict[str, Ballot]) -> None:
    votes = [vote for vote in journal.votes if vote.ballot in ballots]  # others: of a larger selection of prompts
    commit_votes(run.storage, journal.session, ballots, votes)


def _tell_begin(say: Say, journal: VoteJournal, ballots: dict[str, Ballot], suite: str) -> None:
    done = sum(vote.ballot in ballots for vote in journal.votes)
    before = f", {done:,} of them done before" if done else ""
    say(f"votes    {len(ballots):,} pairs of {suite}{before}; journal {journal.file}")


def _tell_end(say: Say, run: Run, journal: VoteJournal, ballots: dict[str, Ballot]) -> None:
    """Say where the votes are; who won only once all are in, so that the rest is voted on blindly."""
    votes = [vote for vote in journal.votes if vote.ballot in ballots]
    judge, models = journal.session.judge, journal.session.models
    num_scored = sum(vote.value is not None for vote in votes)
    place = run.storage.uri(f"dataset/scores/{judge.table_name}@{judge.fingerprint}/table")
    say(f"votes    {num_scored:,} in {place}")
    if len(votes) < len(ballots):
        say(f"{len(ballots) - len(votes):,} pairs are left; the same command goes on with them")
    elif found := result_of(votes, ballots):
        say(
            f"{models[0]} wins {found.rate:.1%} of {found.num_prompts:,} prompts against {models[1]}"
            f" (95 % interval {found.low:.1%} to {found.high:.1%})"
        )
