"""The leaderboard: ranks by win rates over primary judges alone, nothing oversold, published numbers apart."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CONTRAST, look, needs_chromium
from report_sample import Page, changed, evaluation_data, former_details, sample_data

from orchestration.config import parse_config
from orchestration.report.evaluation import evaluation_section
from orchestration.report.leaderboard import Leaderboard, leaderboard_of
from orchestration.report.page import render_leaderboard, render_report
from orchestration.report.records import EvaluationSection, ReportData, StageRow
from orchestration.report.writer import write_report
from orchestration.run.context import Run
from orchestration.stages.stage import StageState
from pipelines.suites.evaluation import EvaluationRecord
from pipelines.suites.published import PUBLISHED
from pipelines.suites.results import Comparison, Judge, ModelResult, ModelScore, Results, SuiteResult, TagScore

RESULTS = "evaluation.record.results.suites"


@pytest.fixture(scope="module")
def data() -> ReportData:
    return sample_data(12)


def board_of(data: ReportData) -> Leaderboard:
    board = leaderboard_of(data.evaluation)
    assert board is not None
    return board


def text_of(data: ReportData) -> str:
    return re.sub(r"\s+", " ", Page(render_leaderboard(data, board_of(data))).text)


def section(data: ReportData, name: str) -> str:
    (found,) = re.findall(rf'<section id="{name}".*?</section>', render_leaderboard(data, board_of(data)), re.DOTALL)
    return re.sub(r"\s+", " ", Page(found).text)


def won(rate: float | None, half: float = 0.1) -> Comparison:
    """A comparison with this win rate; its difference says the opposite, so that nobody ranks by it."""
    ends = (None, None) if rate is None else (rate - half, rate + half)
    return Comparison(None if rate is None else -rate, None, None, rate, *ends, ties=0, n=10)


def suite(
    rates: dict[str, dict[str, float | None]], primary: tuple[str, ...] = ("x", "y"), name: str = "s"
) -> SuiteResult:
    """A suite of base and other models, with their win rates by judge; mean scores order the models the other way."""
    scorers = ("x", "y", "z")
    means = {"base": 0.9} | dict.fromkeys(rates, 0.1)
    models = {
        model: ModelResult({s: ModelScore(mean, mean, 0.0, 1.0, 10) for s in scorers}) for model, mean in means.items()
    }
    against = {model: {s: won(rate) for s, rate in each.items()} for model, each in rates.items()}
    return SuiteResult(f"{name}@1", 10, 1, models, against, "base", scorers, primary)


def section_of(**suites: SuiteResult) -> EvaluationSection:
    return EvaluationSection(EvaluationRecord(Results(suites)))


def test_models_are_ranked_by_the_mean_win_rate_over_primary_judges() -> None:
    rates = {
        "a": {"x": 0.9, "y": 0.3, "z": 1.0},  # the highest mean of all three, and the highest single rate
        "b": {"x": 0.7, "y": 0.7, "z": 0.0},
        "c": {"x": 0.2, "y": 0.6, "z": 0.9},
    }
    board = leaderboard_of(section_of(s=suite(rates)))
    assert board is not None
    assert [(row.model, row.rank) for row in board.standings] == [("b", 1), ("a", 2), ("base", 3), ("c", 4)]
    by_model = {row.model: row.overall for row in board.standings}
    assert math.isclose(by_model["a"].rate, 0.6)  # type: ignore[union-attr]
    assert math.isclose(by_model["b"].low, 0.6)  # type: ignore[union-attr, arg-type]
    assert (by_model["base"].rate, by_model["base"].low) == (0.5, None)  # type: ignore[union-attr]
    assert [row.model for row in board.boards[0].rows] == ["b", "a", "base", "c"]


def test_equal_models_share_the_better_place() -> None:
    same = {"x": 0.75, "y": 0.75}
    board = leaderboard_of(section_of(s=suite({"a": same, "b": same})))
    assert board is not None
    assert [(row.model, row.rank) for row in board.standings] == [("a", 1), ("b", 1), ("base", 3)]


def test_every_suite_counts_the_same_and_a_model_that_one_does_not_rank_has_no_place() -> None:
    one, other = (
        suite({"a": {"x": 0.6, "y": 0.6}, "b": {"x": 0.55, "y": 0.55}}),
        suite({"a": {"x": 0.4, "y": 0.2}, "b": {"x": 0.9, "y": None}}),
    )
    board = leaderboard_of(section_of(one=one, other=other))
    assert board is not None
    assert board.ranked == ["one", "other"]
    places = {row.model: (row.rank, row.overall) for row in board.standings}
    assert places["a"][0] == 2
    assert math.isclose(places["a"][1].rate, 0.45)  # type: ignore[union-attr]
    assert places["b"] == (None, None)
    assert [row.model for row in board.standings] == ["base", "a", "b"]
    assert "b" not in [row.label for row in board.plot.rows]  # type: ignore[union-attr]


def test_scores_that_only_describe_rank_nobody(data: ReportData) -> None:
    describes = suite({"a": {"x": 0.9, "y": 0.9}}, primary=())
    only = replace(data, evaluation=section_of(starter=describes))
    board = board_of(only)
    assert (board.standings, board.plot) == ([], None)
    assert [row.rank for row in board.boards[0].rows] == [None, None]
    text = text_of(only)
    assert "Scores without a ranking" in text
    assert "so this suite ranks no model" in text
    both = leaderboard_of(section_of(starter=describes, s=suite({"a": {"x": 0.9, "y": 0.9}})))
    assert both is not None
    assert both.ranked == ["s"]


def test_one_model_alone_has_scores_and_no_place(data: ReportData) -> None:
    alone = replace(data, evaluation=section_of(s=suite({})))
    assert board_of(alone).standings == []
    assert "0.900 0 to 1.00" in text_of(alone)


def test_checkpoints_are_no_rows() -> None:
    board = leaderboard_of(section_of(s=suite({"step-20": {"x": 0.9, "y": 0.9}, "a": {"x": 0.6, "y": 0.6}})))
    assert board is not None
    assert [row.model for row in board.standings] == ["a", "base"]


def test_the_page_has_every_number_with_its_interval(data: ReportData) -> None:
    text = text_of(data)
    for said in (
        "aligned ranks first", "1 aligned 73.9 % 53.0 % to 85.6 % 71.4 % 41.7 % to 87.5 % 76.3 % 64.3 % to 83.6 %",
        "2 base reference 50.0 % 50.0 % 50.0 %",
        "1 aligned 71.4 % 41.7 % to 87.5 % 0.328 0.301 to 0.354 wins 100.0 % 67.6 % to 100.0 %",
        "held-out@1: 8 prompts, 2 images each, 25 steps, guidance 3.0", "dark_share describes lower is better",
        "style How far the style is met. 71.0 % 58.0 % to 81.0 % share, 0 to 1 MIT against a published value",
        "GPU hours of drawing 0.250",
        "style helped to make the training pairs",
    ):  # fmt: skip
        assert said in text, said
    assert "within the noise" not in text


def test_a_first_place_within_the_noise_says_so(data: ReportData) -> None:
    close = replace(data, evaluation=section_of(s=suite({"a": {"x": 0.55, "y": 0.55}})))
    assert "a ranks first, which is within the noise" in text_of(close)
    worse = replace(data, evaluation=section_of(s=suite({"a": {"x": 0.45, "y": 0.45}})))
    assert "base ranks first" in text_of(worse)


def test_the_cost_has_a_price_if_one_is_configured(data: ReportData) -> None:
    priced = replace(data, config=data.config | {"report": {"gpu_hour_price": 2.5, "currency": "EUR"}})
    assert "cost 0.62 EUR" in text_of(priced)
    assert " EUR" not in text_of(data)


def test_trained_prompts_are_shown_by_suite(data: ReportData) -> None:
    assert "is not known" in section(data, "suite-1")
    found = changed(data, {f"{RESULTS}.held-out.leaked_prompts": 2, f"{RESULTS}.own.leaked_prompts": 0})
    assert "2 of 8 prompts (25.0 %) are in this run\u2019s training pairs" in section(found, "suite-1")
    assert "None of its prompts is in this run\u2019s training pairs" in section(found, "suite-2")


def test_published_numbers_are_apart_and_only_beside_what_they_are_about(data: ReportData) -> None:
    assert board_of(data).published == ()
    preferences = suite({"a": {"x": 0.9, "y": 0.9}}, name="pickapic-v2-test")
    beside = replace(data, evaluation=section_of(p=replace(preferences, scorers=("x", "y", "z", "pickscore"))))
    text, own = section(beside, "published"), section(beside, "suite-1")
    assert "Published elsewhere, another protocol" in text
    assert "MaPO paper, version 2, Table 2" in text
    assert "SDXL 6.03 30.0 22.4 DPO-SDXL 6.03 31.1 22.9 MaPO 6.34 31.2 22.9" in text
    assert "GenEval" not in text
    assert "22.9" not in own
    assert [row.model for row in board_of(beside).standings] == ["a", "base"]
    compbench = suite({}, name="t2i-compbench-color")
    (table,) = (leaderboard_of(section_of(c=compbench)) or board_of(data)).published
    assert table.prompts == "T2I-CompBench"


def test_published_tables_are_whole_and_name_their_source() -> None:
    assert len({(table.source, table.prompts) for table in PUBLISHED}) == len(PUBLISHED)
    for table in PUBLISHED:
        assert table.source
        assert table.protocol
        assert table.scorers or table.suites
        assert all(len(values) == len(table.metrics) for values in table.values.values()), table.source


def test_tags_are_bars_of_means_for_shares_and_of_differences_for_other_scales(data: ReportData) -> None:
    (_, own) = board_of(data).boards
    style, content = own.tags
    assert (style.scorer, style.is_difference) == ("style", False)
    assert [group.tag for group in style.groups] == ["thing", "few", "many"]
    result = own.result
    few = style.groups[1]
    assert few.num_prompts == 12
    assert {bar.model: bar.value for bar in few.bars} == {
        model: result.models[model].tags["few"]["style"].mean for model in ("aligned", "base")
    }
    assert (style.x_range[0], content.x_range[0]) == (0, 0)
    logits = changed(data, {"evaluation.record.judges.style.scale": "100 cos"})
    style = board_of(logits).boards[1].tags[0]
    assert style.is_difference
    assert {bar.model for group in style.groups for bar in group.bars} == {"aligned"}
    assert style.groups[1].bars[0].value == result.against["aligned"]["style"].tags["few"].difference
    assert "Difference from base by tag" in text_of(logits)


def test_bars_begin_at_zero_and_end_at_their_value() -> None:
    scores = {tag: {"x": TagScore(mean, mean - 0.1, mean + 0.1, 5)} for tag, mean in (("low", 0.2), ("high", 0.8))}
    models = {"base": ModelResult({"x": ModelScore(0.5, 0.5, 0.4, 0.6, 10)}, scores)}
    result = SuiteResult("s@1", 10, 1, models, {}, "base", ("x",), ("x",), tags={"low": 5, "high": 5})
    record = EvaluationRecord(Results({"s": result}), judges={"x": Judge(scale="share, 0 to 1")})
    board = leaderboard_of(EvaluationSection(record))
    assert board is not None
    (chart,) = board.boards[0].tags
    zero, one = chart.x(0.0), chart.x(1.0)
    low, high = (group.bars[0] for group in chart.groups)
    assert math.isclose(chart.x(low.value) - zero, 0.2 * (one - zero), abs_tol=0.02)
    assert math.isclose(chart.x(high.value) - zero, 0.8 * (one - zero), abs_tol=0.02)
    assert low.y < high.y < chart.height


def test_names_are_never_markup(data: ReportData) -> None:
    hostile = '"><script>alert(1)</script>'
    result = suite({hostile: {"x": 0.9, "y": 0.9}})
    scores = {hostile: {"x": TagScore(0.5, 0.4, 0.6, 5)}}
    models = {name: replace(each, tags=scores) for name, each in result.models.items()}
    result = replace(result, protocol=hostile, about=hostile, licence=hostile, tags={hostile: 5}, models=models)
    record = EvaluationRecord(
        Results({hostile: result}),
        judges={"x": Judge("0 to 1", licence=hostile, description=hostile)},
        warnings=(hostile,),
    )
    parsed = Page(
        render_leaderboard(
            replace(data, name=hostile, evaluation=EvaluationSection(record)),
            board_of(replace(data, evaluation=EvaluationSection(record))),
        )
    )
    assert "script" not in parsed.tags
    assert parsed.text.count(hostile) >= 10


def test_the_page_loads_nothing_and_the_report_links_to_it(data: ReportData) -> None:
    parsed = Page(render_leaderboard(data, board_of(data)))
    local = ("../report/index.html", "../../index.html")
    assert all(each.startswith(("data:", "#")) or each.partition("#")[0] in local for each in parsed.addresses)
    assert not {"script", "iframe", "object", "embed", "base", "img"} & set(parsed.tags)
    assert "../evaluation/leaderboard.html" in Page(render_report(data, {})).addresses
    former = replace(data, evaluation=evaluation_section(former_details(), has_samples=True))
    for without in (replace(data, evaluation=None), former):
        assert leaderboard_of(without.evaluation) is None
        assert "leaderboard.html" not in render_report(without, {})


def test_results_of_an_earlier_evaluation_are_marked(data: ReportData) -> None:
    stages = [StageRow("train", StageState.DONE), StageRow("evaluate", StageState.RUNNING)]
    assert "results of an earlier evaluation" in text_of(replace(data, stages=stages))
    assert "results of an earlier evaluation" not in text_of(data)


def test_the_report_writes_it_beside_the_results(tmp_path: Path) -> None:
    run = Run.open(parse_config(f"{{name: photos, storage: {tmp_path}/storage}}"), lambda line: None)
    write_report(run, command="mapo run photos.yaml")
    assert not run.storage.exists(run.leaderboard)
    details = json.loads(json.dumps(evaluation_data().record.to_json(), allow_nan=False))
    run.journal.finish("evaluate", key="k", summary="s", seconds=1.0, details=details)
    write_report(run, command="mapo run photos.yaml")
    page = run.storage.read("runs/photos/evaluation/leaderboard.html").decode()
    assert "aligned ranks first" in page
    for file, link in ((run.leaderboard, "../report/index.html"), (run.report, "../evaluation/leaderboard.html")):
        assert link in Page(run.storage.read(file).decode()).addresses
        assert (tmp_path / "storage" / file).parent.joinpath(link).resolve().is_file()


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_a_phone_is_legible_and_its_console_is_silent(data: ReportData, tmp_path: Path, *, dark: bool) -> None:
    preferences = suite({"a": {"x": 0.9, "y": 0.9}}, name="pickapic-v2-test")
    results = {**data.evaluation.record.results.suites, "p": replace(preferences, scorers=("x", "y", "pickscore"))}  # type: ignore[union-attr]
    full = changed(data, {"evaluation.record.results": Results(results)})
    (tmp_path / "board.html").write_text(render_leaderboard(full, board_of(full)))
    script = "const wide = doc.documentElement.scrollWidth > 390; const found = (() => {" + CONTRAST + "})();"
    script += "const shy = [...doc.querySelectorAll('.scroll')].filter(e => e.tabIndex !== 0).length;"
    seen = look(tmp_path, "board.html", f"{script} return [wide, shy, found].join(' ')", dark=dark)
    wide, shy, ratio, *_ = seen.text.split()
    assert (wide, shy) == ("false", "0")
    assert float(ratio) >= 4.5, seen.text
    assert seen.console == []
