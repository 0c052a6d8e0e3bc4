"""The evaluation on the page: every number with its interval, nothing oversold, and records of an earlier version."""

import json
import math
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_sample import PROMPTS, Page, changed, evaluation_data, former_details, sample_data, sample_images

from orchestration.report.data import page_images
from orchestration.report.evaluation import MAX_PAGE_IMAGES, evaluation_section, own_model, shown_gallery
from orchestration.report.page import render_report
from orchestration.report.records import EvaluationSection, ReportData, StageRow
from orchestration.report.suite_view import suite_views
from orchestration.report.summary import RunSummary, summary_of
from orchestration.stages.stage import StageState
from pipelines.dataset.storage import Storage
from pipelines.suites.evaluation import EvaluationRecord
from pipelines.suites.gallery import GalleryEntry, GalleryImage
from pipelines.suites.results import Judge, ModelResult, ModelScore, Results, SuiteResult

OLD_STORAGE = Path(__file__).parents[2] / "data" / "old_storage.tar.xz"
RESULTS = "evaluation.record.results.suites"


@pytest.fixture(scope="module")
def data() -> ReportData:
    return sample_data(12)


@pytest.fixture(scope="module")
def page(data: ReportData) -> str:
    return render_report(data, sample_images())


def section(page: str, name: str) -> str:
    (found,) = re.findall(rf'<section id="{name}".*?</section>', page, re.DOTALL)
    return re.sub(r"\s+", " ", Page(found).text)


def with_evaluation(data: ReportData, evaluation: EvaluationSection | None) -> ReportData:
    return replace(data, evaluation=evaluation)


def test_every_suite_has_a_table_of_scores_with_intervals(page: str) -> None:
    text = section(page, "scores")
    for said in (
        "held-out@1: 8 prompts, 2 images each, 25 steps, guidance 3.0", "own@1: 40 prompts, 1 image each",
        "style primary base 0.105 0.0744 to 0.131 \u2013 \u2013 reference",
        "aligned 0.328 0.301 to 0.354 +0.223 0.213 to 0.233 100.0 % 67.6 % to 100.0 % better: aligned is higher by",
        "no difference shown: -0.014 (-0.043 to 0.012); this run can see differences from 0.034 on",
        "after Holm\u2019s correction over 2 comparisons", "1 prompt left out: not scored for both",
        "dark_share lower is better", "% aligned is lower by 0.089 (0.068 to 0.108); lower is better",
    ):  # fmt: skip
        assert said in text, said


def test_tags_and_judges_are_on_the_page(page: str) -> None:
    text = section(page, "scores")
    assert re.search(
        r"style few 12 0\.\d+ 0\.\d+ to 0\.\d+ 0\.\d+ 0\.\d+ to 0\.\d+ \+0\.2\d+ 0\.\d+ to 0\.\d+ style many 28", text
    )
    assert "style 71.0 % 58.0 % to 81.0 % 52 9 100.0 %" in text
    assert "content \u2013 \u2013 0 0 \u2013" in text
    assert "How far the content is met. share, 0 to 1 \u2013 not against a published value" in text
    assert "Share that is nearly black. lower is better share, 0 to 1 \u2013 nothing to verify" in text
    assert "112 images drawn in 7 min 30 s, 0.250 GPU hours." in text


def test_warnings_come_before_the_numbers(page: str) -> None:
    text = section(page, "scores")
    for said in ("style helped to make the training pairs", "of the 16 images of aligned there is no score by content",
                 "not verified against a published value: content"):  # fmt: skip
        assert text.index(said) < text.index("0.328"), said


def test_the_gallery_says_why_an_image_was_chosen(page: str) -> None:
    text = section(page, "samples")
    assert text.index("Where models differ most") < text.index("Where judges disagree") < text.index("Other prompts")
    assert "style differs most" in text
    assert all(prompt in text for prompt in PROMPTS)
    assert "style 0." in text


def test_a_difference_that_holm_takes_back_is_no_claim(data: ReportData) -> None:
    place = f"{RESULTS}.own.against.aligned.style"
    weak = changed(data, {f"{place}.p_value": 0.03, f"{place}.p_holm": 0.06})
    text = section(render_report(weak, {}), "scores")
    assert "p 0.0600 after Holm\u2019s correction over 2 comparisons" in text
    (view,) = (view for view in suite_views(weak.evaluation) if view.name == "own")
    assert [row.verdict for row in view.groups[0].rows] == ["", ""]


def test_scores_that_describe_are_neither_better_nor_worse_and_not_in_the_head(page: str) -> None:
    text = Page(page).text
    assert "Score \u201cheld-out: style\u201d" in text
    assert "Score \u201cheld-out: dark_share\u201d" not in text
    assert not re.search(r"(better|worse): aligned is (higher|lower)[^;]*; lower is better", text)


def test_a_score_without_a_number_is_named_and_not_drawn(data: ReportData) -> None:
    nothing = dict.fromkeys(
        (f"{RESULTS}.own.models.{model}.scores.style.mean" for model in ("base", "aligned")), math.nan
    )
    page = render_report(changed(data, nothing), {})
    assert "style: not a finite number" in section(page, "scores")
    assert not re.search(r' (d|c?x|c?y)="[^"]*nan', page)


def test_names_of_an_evaluation_are_never_markup(data: ReportData) -> None:
    hostile = '"><script>alert(1)</script>'
    score = ModelScore(0.5, 0.5, 0.4, 0.6, 3)
    model = ModelResult({hostile: score})
    compared = {
        hostile: replace(next(iter(evaluation_data().record.results.suites["own"].against["aligned"].values())))
    }
    result = SuiteResult(
        hostile, 3, 1, {hostile: model, "base": model}, {hostile: compared}, "base", (hostile,), about=hostile
    )
    image = GalleryImage(hostile, {hostile: 0.5})
    record = EvaluationRecord(
        Results({hostile: result}),
        gallery=(GalleryEntry(hostile, "0", hostile, 0, (hostile,), {hostile: image, "base": image}),),
        judges={hostile: Judge(hostile, licence=hostile, description=hostile)},
        warnings=(hostile,),
    )
    parsed = Page(render_report(with_evaluation(data, EvaluationSection(record)), {}))
    assert "script" not in parsed.tags
    assert parsed.text.count(hostile) >= 15


def checkpoints(steps: list[int], models: list[str]) -> SuiteResult:
    scores = {f"step-{step}": ModelResult({"x": ModelScore(step / 100, None, 0.0, 1.0, 8)}) for step in steps}
    named = {name: ModelResult({"x": ModelScore(0.1, None, 0.0, 0.2, 8)}) for name in models}
    return SuiteResult("own@1", 8, 1, scores | named, {}, "base", ("x",))


def test_checkpoints_make_a_learning_curve_in_the_order_of_steps(data: ReportData) -> None:
    result = checkpoints([100, 20, 60], ["base", "aligned"])
    evaluation = EvaluationSection(EvaluationRecord(Results({"own": result})))
    (view,) = suite_views(evaluation)
    (curve,) = view.curves
    assert [x for x, _ in curve.traces[0].points] == [20, 60, 100]
    assert curve.guide == 0.1
    assert (list(view.models), view.ours) == (["base", "aligned"], "aligned")
    text = section(render_report(with_evaluation(data, evaluation), {}), "scores")
    assert "Learning curve of own" in text
    assert "step-60" not in text


@pytest.mark.parametrize(
    ("steps", "models", "ours"),
    [([], ["base", "dpo"], "dpo"), ([20, 100], ["base"], "step-100"), ([], ["base"], None),
     ([20], ["aligned", "dpo", "base"], "aligned")],
)  # fmt: skip
def test_the_model_that_a_suite_is_about(steps: list[int], models: list[str], ours: str | None) -> None:
    assert own_model(checkpoints(steps, models)) == ours


def test_a_run_that_only_evaluates_says_so(data: ReportData) -> None:
    stages = [StageRow("train", StageState.NOT_RUN), StageRow("evaluate", StageState.DONE)]
    text = Page(render_report(replace(data, training=None, stages=stages), {})).text
    assert "Evaluated, without a training" in text
    assert "earlier training" not in text


def test_an_evaluation_of_an_earlier_version_keeps_its_numbers_and_samples(data: ReportData) -> None:
    former = with_evaluation(data, evaluation_section(former_details(), has_samples=True))
    page = render_report(former, sample_images())
    text = Page(page).text
    assert "0.104 \u2192 0.341better: the intervals do not overlap" in text
    assert "0.260 \u2192 0.255no clear change: the intervals overlap" in text
    scores = section(page, "scores")
    assert (
        "style base 0.104 0.0800 to 0.128 \u2013 \u2013 reference aligned 0.341 0.300 to 0.379 +0.237 \u2013" in scores
    )
    assert "as an earlier version recorded them" in scores
    samples = section(page, "samples")
    assert "seed 17" in samples
    assert "is missing" not in samples
    assert page.count('alt="aligned: ') == 2 * len(PROMPTS)


def test_what_the_version_of_november_2026_wrote_is_shown_with_all_its_images(data: ReportData, tmp_path: Path) -> None:
    with tarfile.open(OLD_STORAGE) as archive:
        wanted = [
            each for each in archive.getmembers() if "/runs/finished/" in each.name and "/checkpoints/" not in each.name
        ]
        archive.extractall(tmp_path, members=wanted, filter="data")
    storage = Storage(str(tmp_path / "bucket" / "storage"))
    details = json.loads(storage.read("runs/finished/stages/evaluate.json"))["details"]
    former = replace(data, encoding=None, training=None, evaluation=evaluation_section(details, has_samples=True))
    images = page_images(storage, "runs/finished", former)
    assert len(images) == 2 * len(details["samples"]) > 0
    page = render_report(former, images)
    assert "is missing" not in section(page, "samples")
    assert all(score["name"] in section(page, "scores") for score in details["scores"])
    assert len(summary_of(former).samples) == min(12, len(details["samples"]))


def test_the_summary_of_an_earlier_evaluation_is_as_it_was(data: ReportData) -> None:
    summary = summary_of(with_evaluation(data, evaluation_section(former_details(), has_samples=True)))
    assert [(each.name, each.base.mean, each.aligned.high) for each in summary.scores] == [
        ("style", 0.104, 0.379),
        ("content", 0.26, 0.265),
    ]
    first = summary.samples[0]
    assert (first.prompt, first.seed, first.base, first.aligned) == (
        "a cat on a sofa", 17, "base-000.png", "aligned-000.png",
    )  # fmt: skip
    read = RunSummary.from_json(json.loads(json.dumps(summary.to_json(), allow_nan=False)))
    assert (read.scores, read.samples) == (summary.scores, summary.samples)


def test_samples_are_not_shown_while_the_next_evaluation_replaces_them(data: ReportData) -> None:
    former = evaluation_section(former_details(), has_samples=False)
    text = section(render_report(with_evaluation(data, former), {}), "samples")
    assert "The evaluation kept no samples." in text


@pytest.mark.parametrize(
    "details",
    [{}, {"version": 2}, {"scores": [{}], "samples": [], "num_samples": 1}, {"version": 2, "results": {"suites": []}}],
)
def test_a_damaged_record_costs_only_the_evaluation(details: dict[str, Any], data: ReportData) -> None:
    assert evaluation_section(details, has_samples=True) is None
    assert "no scores yet" in render_report(with_evaluation(data, None), {})


def test_a_gallery_of_many_suites_is_cut_to_what_a_page_can_hold(data: ReportData) -> None:
    (first, *_) = data.evaluation.record.gallery
    entries = tuple(replace(first, suite=suite, index=index) for suite in ("x", "y") for index in range(90))
    record = replace(data.evaluation.record, gallery=entries)
    kept = shown_gallery(EvaluationSection(record))
    assert [entry.suite for entry in kept] == ["x"] * 36 + ["y"] * 36
    assert sum(len(entry.images) for entry in kept) == MAX_PAGE_IMAGES
    assert kept == tuple(entry for entry in entries if entry.index < 36)
    text = section(render_report(with_evaluation(data, EvaluationSection(record)), {}), "samples")
    assert "108 more prompts of the gallery are in the run\u2019s folder evaluation/." in text
    assert shown_gallery(EvaluationSection(record, is_former=True)) == entries


def test_a_suite_that_is_named_with_its_version_finds_its_gallery(data: ReportData) -> None:
    results = data.evaluation.record.results.suites
    record = replace(data.evaluation.record, results=Results({"held-out@1": results["held-out"]}))
    page = render_report(with_evaluation(data, EvaluationSection(record)), {})
    assert "style 0." in section(page, "samples")
    assert '<small class="ours">aligned</small>' in page


def test_a_record_in_the_journal_is_the_section_of_the_page(data: ReportData) -> None:
    details = json.loads(json.dumps(data.evaluation.record.to_json(), allow_nan=False))
    assert evaluation_section(details, has_samples=True) == data.evaluation


def test_a_missing_sample_is_named_and_the_others_are_read(data: ReportData, tmp_path: Path) -> None:
    storage, images = Storage(str(tmp_path)), sample_images()
    names = [image.name for entry in data.evaluation.record.gallery for image in entry.images.values()]
    for name in names[1:]:
        storage.write(f"runs/photos/evaluation/{name}", images[name])
    only = replace(data, encoding=None, training=None)
    found = page_images(storage, "runs/photos", only)
    assert found == {name: images[name] for name in names[1:]}
    text = section(render_report(only, found), "samples")
    assert f"{names[0]} is missing" in text
    assert text.count("is missing") == 1
