"""Names of any length and script have their place on the leaderboard: cut in charts, wrapped in tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from browser import look, needs_chromium
from hypothesis import given
from hypothesis import strategies as st
from report_sample import sample_data

from orchestration.report.format import shortened, text_width
from orchestration.report.leaderboard import leaderboard_of
from orchestration.report.page import render_leaderboard
from orchestration.report.records import EvaluationSection
from pipelines.suites.cells import VALUES_SCHEMA
from pipelines.suites.evaluation import EvaluationRecord
from pipelines.suites.reduce import reduce_suite
from pipelines.suites.results import Results
from pipelines.suites.suite import Suite, SuitePrompt

LONGEST = "m" * 60
"""The longest name of a model, of the widest letter."""
MODELS = ("base", LONGEST, "a-checkpoint-of-many-words-and-numbers-0001200")
TAGS = ("position", "tag " * 30, "秋の森" * 20, "x" * 200)
SCORERS = ("y" * 100, "geneval")


@given(st.text(max_size=60), st.floats(20, 400))
def test_a_text_is_cut_to_its_width_or_kept(text: str, width: float) -> None:
    found = shortened(text, width)
    assert text_width(found) <= width
    assert found == text if text_width(text) <= width else found.endswith("…")
    assert text.startswith(found.removesuffix("…"))


def test_wide_letters_count_as_wide() -> None:
    assert text_width("秋の森") > text_width("abc")
    assert shortened("mapo-beta", 90) == "mapo-beta"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = tuple(SuitePrompt.of(f"prompt {place}", TAGS[place % len(TAGS)]) for place in range(16))
    suite = Suite("own", 1, prompts, scorers=SCORERS, primary=SCORERS)
    rng = np.random.default_rng(0)
    rows = [
        {"model": model, "scorer": scorer, "prompt_id": each.prompt_id, "index": 0, "value": rng.normal() + place}
        for place, model in enumerate(MODELS)
        for scorer in SCORERS
        for each in prompts
    ]
    values = pa.Table.from_pylist(rows, schema=VALUES_SCHEMA)
    result = reduce_suite(values, suite, against="base", models=MODELS, seed=0, num_draws=200)
    data = replace(sample_data(12), evaluation=EvaluationSection(EvaluationRecord(Results({"own": result}))))
    board = leaderboard_of(data.evaluation)
    assert board is not None
    folder = tmp_path_factory.mktemp("board")
    (folder / "board.html").write_text(render_leaderboard(data, board))
    return folder


MEASURE = """
const rem = parseFloat(page.getComputedStyle(doc.documentElement).fontSize)
const names = [...doc.querySelectorAll('.board th[scope=row]')].map(each => each.getBoundingClientRect().width / rem)
const wide = [...doc.querySelectorAll('.scroll:has(.board)')].filter(each => each.scrollWidth > each.clientWidth)
const out = [...doc.querySelectorAll('figure svg text')].filter(text => {
  const box = text.getBBox()
  return box.x < -1 || box.x + box.width > 361
}).map(text => text.textContent)
const crossed = [...doc.querySelectorAll('figure svg')].flatMap(svg => {
  const labels = [...svg.querySelectorAll('text:not(.tag)')].filter(text => text.getAttribute('x') === '0')
  const lines = [...svg.querySelectorAll('.whisker, rect.column')].map(each => each.getBBox())
  return labels.map(text => text.getBBox()).filter(label => lines.some(line =>
    Math.abs(line.y + line.height / 2 - label.y - label.height / 2) < 6 && line.x < label.x + label.width))
})
const widest = Math.round(Math.max(...names)), page_width = doc.documentElement.scrollWidth
return [widest, wide.length, out.length, crossed.length, page_width].join(' ')
"""


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
def test_long_names_push_no_number_away(page: Path, width: int) -> None:
    seen = look(page, "board.html", MEASURE, width=width)
    widest, num_scrolled, *wrong = map(int, seen.text.split())
    assert wrong == [0, 0, width], "texts beyond their chart, names under a line or a bar, the page's own width"
    assert num_scrolled == 0 if width == 1200 else widest <= 8, "a name is wrapped"
