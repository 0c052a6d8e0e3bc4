"""Votes: nothing acknowledged is lost, nothing is counted twice, and a vote is a score that readers of scores find."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset.errors import ConfigError
from pipelines.dataset.layout import SAMPLES_SCHEMA, SCORES
from pipelines.dataset.pair import prompt_id
from pipelines.dataset.storage import Storage
from pipelines.scores.images import IMAGES_SCHEMA
from pipelines.scores.plan import read_scores, table_of
from pipelines.scores.vote_journal import VoteJournal
from pipelines.scores.votes import (
    BETTER,
    TIE,
    WORSE,
    Ballot,
    ImagePlace,
    Session,
    Vote,
    commit_votes,
    pair_samples,
    result_of,
    score_rows,
)

SESSION = Session("5e" * 16, "starter@1", ("aligned", "base"), ("a1" * 16, "b2" * 16), 0)


def image(digit: int) -> ImagePlace:
    return ImagePlace("dataset/samples/x.tar", 512 * digit, 9, f"{digit:064x}")


def ballots_of(count: int) -> dict[str, Ballot]:
    found = (Ballot(prompt_id(f"p{i}"), f"p{i}", 0, (image(2 * i), image(2 * i + 1))) for i in range(count))
    return {ballot.key: ballot for ballot in found}


BALLOTS = ballots_of(4)
KEYS = list(BALLOTS)


def vote(place: int, value: float | None, left: int = 0) -> Vote:
    return Vote(KEYS[place], value, left, "2026-12-01T10:00:00Z")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[VoteJournal]:
    opened = VoteJournal(tmp_path / "votes.jsonl", SESSION)
    yield opened
    opened.close()


def reopened(journal: VoteJournal) -> VoteJournal:
    journal.close()
    return VoteJournal(journal.file, replace(SESSION, id="0" * 32))


def test_a_journal_that_is_opened_again_has_its_session_and_votes(journal: VoteJournal) -> None:
    for each in (vote(0, BETTER), vote(1, None, 1), vote(2, TIE)):
        journal.add(each)
    journal.undo()
    again = reopened(journal)
    assert again.session == SESSION, "the session of the file, not the new one"
    assert again.votes == [vote(0, BETTER), vote(1, None, 1)]
    again.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 3), st.sampled_from([BETTER, WORSE, TIE, None])))))
def test_votes_and_undos_are_replayed_as_they_happened(acts: list[tuple[int, float | None] | None]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        journal = VoteJournal(Path(folder) / "v.jsonl", SESSION)
        for act in acts:
            if act is not None and KEYS[act[0]] not in {each.ballot for each in journal.votes}:
                journal.add(vote(*act))
            elif act is None and journal.votes:
                journal.undo()
        again = reopened(journal)
        assert again.votes == journal.votes
        again.close()


@pytest.mark.parametrize("kept", range(1, 12))
def test_a_line_that_a_kill_cut_off_is_dropped_and_the_next_one_is_whole(journal: VoteJournal, kept: int) -> None:
    journal.add(vote(0, BETTER))
    whole = journal.file.read_bytes()
    journal.add(vote(1, TIE))
    journal.close()
    journal.file.write_bytes(journal.file.read_bytes()[: len(whole) + kept])
    again = reopened(journal)
    assert again.votes == [vote(0, BETTER)]
    again.add(vote(2, WORSE))
    last = reopened(again)
    assert last.votes == [vote(0, BETTER), vote(2, WORSE)]
    last.close()


@pytest.mark.parametrize(
    "content", [b"", b"notes\nmore", b'{"version": 9}\n', b"[1]\n{}", b'{"version": 1}\n', b"\xff\n"]
)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine\.txt is not a journal of votes: line 1"):
        VoteJournal(file, SESSION)
    assert file.read_bytes() == content


def test_a_damaged_line_is_named_and_nothing_is_written(journal: VoteJournal) -> None:
    journal.add(vote(0, BETTER))
    journal.close()
    journal.file.write_bytes(journal.file.read_bytes() + b"{}\n" + b'{"ballot": "cut')
    before = journal.file.read_bytes()
    with pytest.raises(ConfigError, match="line 3"):
        reopened(journal)
    assert journal.file.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"models": ("base", "aligned")}, "is about aligned and base on starter@1, not about base and aligned"),
     ({"suite": "own@1"}, "not about aligned and base on own@1"), ({"samples": ("c" * 32, "d" * 32)}, "other images"),
     ({"seed": 1}, "the seed has changed")],
)  # fmt: skip
def test_a_journal_about_something_else_is_refused(
    journal: VoteJournal, changed: Mapping[str, Any], message: str
) -> None:
    journal.close()
    with pytest.raises(ConfigError, match=message):
        VoteJournal(journal.file, replace(SESSION, **changed))


def test_one_process_at_a_time_votes(journal: VoteJournal) -> None:
    code = (
        "import sys; from pathlib import Path; from pipelines.scores.vote_journal import VoteJournal\n"
        "from pipelines.scores.votes import Session\n"
        f"VoteJournal(Path({str(journal.file)!r}), Session{tuple(vars(SESSION).values())!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert "another process is voting" in done.stderr
    journal.close()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_vote_that_cannot_be_written_does_not_count(journal: VoteJournal) -> None:
    journal.add(vote(0, BETTER))
    whole = journal.file.read_bytes()
    code = (
        "import resource, sys; from pathlib import Path; from pipelines.scores.vote_journal import VoteJournal\n"
        "from pipelines.scores.votes import Session, Vote\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"journal = VoteJournal(Path({str(journal.file)!r}), Session{tuple(vars(SESSION).values())!r})\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(whole) + 7},) * 2)\n"
        "try:\n    journal.add(Vote('k', 1.0, 0, 't'))\nexcept Exception as error:\n"
        "    print(type(error).__name__, len(journal.votes))"
    )
    journal.close()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["StorageError", "1"], done.stderr
    assert journal.file.read_bytes() == whole


def test_the_order_and_the_sides_follow_from_the_session_alone() -> None:
    many = list(ballots_of(200).values())
    order = SESSION.in_order(many)
    assert order == SESSION.in_order(reversed(many))
    assert sorted(order, key=many.index) == many
    assert order != many
    other = replace(SESSION, id="6f" * 16)
    assert other.in_order(many) != order
    sides = Counter(SESSION.left(ballot) for ballot in many)
    assert min(sides[0], sides[1]) > 70
    fewer = [ballot for ballot in order if ballot in many[:150]]
    assert SESSION.in_order(many[:150]) == fewer, "a ballot that is added moves no other"


def test_votes_are_scores_of_both_images_beside_each_other() -> None:
    rows = score_rows(BALLOTS, [vote(0, BETTER), vote(1, WORSE, 1), vote(2, TIE), vote(3, None)]).to_pylist()
    assert [row["value"] for row in rows] == [1.0, 0.0, 0.0, 1.0, 0.5, 0.5]
    first, second = BALLOTS[KEYS[0]].images
    assert [row["image_sha256"] for row in rows[:2]] == [first.sha256, second.sha256]
    assert {row["status"] for row in rows} == {"scored"}
    assert [json.loads(row["components"]) for row in rows[:4]] == [
        {"shown_left": 1.0}, {"shown_left": 0.0}, {"shown_left": 0.0}, {"shown_left": 1.0},
    ]  # fmt: skip
    assert len({row["context"] for row in rows}) == 6, "the context is the image beside it"


def test_the_votes_of_a_session_are_read_as_any_scores_are(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert commit_votes(storage, SESSION, BALLOTS, [vote(0, BETTER), vote(1, TIE)]) == 2
    rows = [
        {"image_sha256": ballot.images[side].sha256, "prompt_id": ballot.prompt_id, "prompt": ballot.prompt,
         "shard": "x", "references": [vars(ballot.images[1 - side])]}
        for ballot in (BALLOTS[KEYS[1]], BALLOTS[KEYS[0]]) for side in (0, 1)
    ]  # fmt: skip
    images = pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA)
    assert read_scores(storage, SESSION.judge, images)["value"].to_pylist() == [0.5, 0.5, 1.0, 0.0]
    folder = f"{SCORES}/votes@{SESSION.judge.fingerprint}"
    said = json.loads(storage.read(f"{folder}/judge.json"))
    assert said["shaping"]["models"] == ["aligned", "base"]
    assert said["fingerprint"] == SESSION.judge.fingerprint


def test_a_vote_is_committed_once_however_often_that_is_tried(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    votes = [vote(0, BETTER), vote(1, TIE)]
    assert commit_votes(storage, SESSION, BALLOTS, []) == 0
    assert not storage.names()
    assert [commit_votes(storage, SESSION, BALLOTS, votes) for _ in range(2)] == [2, 0]
    assert commit_votes(storage, SESSION, BALLOTS, [*votes, vote(2, WORSE)]) == 1
    assert table_of(storage, SESSION.judge).count_rows() == 6
    other = replace(SESSION, id="6f" * 16)
    assert commit_votes(storage, other, BALLOTS, [vote(0, WORSE)]) == 1
    assert table_of(storage, other.judge).count_rows() == 2, "another person's votes are another table"


def sample(prompt: str, index: int, digest: int, status: str = "kept") -> dict[str, Any]:
    found = {"prompt": prompt, "prompt_id": prompt_id(prompt), "index": index, "status": status}
    return found | ({"shard": "s", "offset": 0, "length": 1, "sha256": f"{digest:064x}"} if status == "kept" else {})


def test_samples_are_paired_by_prompt_and_number_and_equal_images_are_no_pair() -> None:
    first = [
        sample("a", 0, 1),
        sample("a", 1, 2),
        sample("b", 0, 3),
        sample("c", 0, 4),
        sample("d", 0, 0, "quarantined"),
    ]
    second = [
        sample("c", 0, 4),
        sample("a", 1, 12),
        sample("a", 0, 11),
        sample("b", 0, 0, "quarantined"),
        sample("d", 0, 5),
    ]
    tables = (pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA) for rows in (first, second))
    found = pair_samples(*tables)
    pairs = [(each.prompt, each.index, *(int(side.sha256, 16) for side in each.images)) for each in found.ballots]
    assert pairs == [("a", 0, 1, 11), ("a", 1, 2, 12)]
    assert (found.num_absent, found.num_equal) == (2, 1)


def test_a_prompt_counts_once_in_the_outcome() -> None:
    ballots = {f"{i}/{n}": Ballot(str(i), "", n, (image(1), image(2))) for i in range(2) for n in range(3)}
    values = {"0/0": BETTER, "0/1": BETTER, "0/2": WORSE, "1/0": TIE, "1/1": None, "1/2": TIE}
    found = result_of([Vote(key, value, 0, "") for key, value in values.items()], ballots)
    assert found is not None
    assert (found.num_votes, found.num_prompts, found.rate) == (5, 2, 0.75)
    assert found.low < 0.75 < found.high
    assert result_of([Vote("0/0", None, 0, "")], ballots) is None
