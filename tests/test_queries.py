"""The page of queries: every block runs on a real table, and answers what its heading asks."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from encoded import LATENTS, write_encoded
from factories import photo_pairs
from kept import keep_rows, rows_in

from pipelines.dataset.storage import Storage

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "queries.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def rows_and_answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a data set, and the names that the page's blocks leave behind, run in order beside it."""
    work = tmp_path_factory.mktemp("queries")
    storage = Storage(str(work / "runs" / "photos"))
    photos = photo_pairs(40, num_ties=3, num_damaged=8, num_prompts=9)
    contradicted = [row | {"label_0": row["label_1"], "label_1": row["label_0"]} for row in photos[:6]]
    keep_rows(storage, work / "photos.parquet", [*photos, *contradicted])
    write_encoded(storage, work)
    answers: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for block in BLOCK.findall(PAGE.read_text()):
            exec(compile(block, str(PAGE), "exec"), answers)
    return rows_in(storage), answers


def test_drops_are_counted_by_reason_and_file(rows_and_answers: Any) -> None:
    rows, answers = rows_and_answers
    expected = Counter((row["reason"], row["source_uri"]) for row in rows if row["status"] == "quarantined")
    assert {(reason, uri): count for reason, uri, count, _ in answers["dropped"]} == expected
    assert len(expected) >= 3


def test_conflicts_are_counted_by_user(rows_and_answers: Any) -> None:
    rows, answers = rows_and_answers
    expected = Counter(row["user_id"] for row in rows if row["reason"] == "conflicting_label")
    assert {user: count for user, count, _ in answers["contradicting"]} == expected
    assert sum(expected.values()) == 6


def test_prompts_are_ordered_by_their_pairs(rows_and_answers: Any) -> None:
    rows, answers = rows_and_answers
    counted = Counter(row["prompt"] for row in rows if row["status"] == "kept")
    assert answers["frequent"].rows() == sorted(counted.items(), key=lambda item: (-item[1], item[0]))


def test_shares_are_of_kept_pairs_by_source(rows_and_answers: Any) -> None:
    rows, answers = rows_and_answers
    for source, num_pairs, share in answers["shares"].rows():
        labels = [row["label_0"] for row in rows if row["source"] == source and row["status"] == "kept"]
        assert num_pairs == len(labels)
        assert share == pytest.approx(sum(label > 0.5 for label in labels) / len(labels))
    assert answers["shares"]["source"].to_list() == ["pickapic", "test"]


def test_pairs_without_latents_wait(rows_and_answers: Any) -> None:
    rows, answers = rows_and_answers
    waiting = [row for row in rows if row["status"] == "kept" and row["source"] == "pickapic"]
    assert answers["waiting"] == {LATENTS: (len(waiting), len({row["shard"] for row in waiting}))}
