"""The report: self-contained, complete, escaped, and drawn where the numbers say."""

import base64
import io
import math
import re
import time
from pathlib import Path

import pytest
from browser import CONTRAST, look, needs_chromium
from PIL import Image
from report_sample import (
    GRIDS,
    PROMPTS,
    Page,
    changed,
    contact_names,
    landscape,
    running,
    sample_data,
    sample_images,
)

from orchestration.report.charts import (
    MAX_POINTS,
    ChartSpec,
    Frame,
    Trace,
    downsample,
    draw,
    interval_plot,
    round_ticks,
    smooth,
)
from orchestration.report.encoding import speeds, work_parts
from orchestration.report.format import number
from orchestration.report.page import MAX_GRID_SIDE, MAX_SIDE, render_report, source_digest
from orchestration.report.records import Interval, StageRow
from orchestration.report.training_section import sample_grids
from orchestration.stages.stage import StageState
from pipelines.dataset.pair import Reason
from pipelines.dataset.storage import Storage


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(sample_data(), sample_images())


def test_the_page_loads_nothing_from_elsewhere(page: str) -> None:
    parsed = Page(page)
    beside = ("../../index.html", "../evaluation/leaderboard.html")
    assert all(address.startswith(("data:", "#")) or address in beside for address in parsed.addresses)
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page
    assert not {"script", "iframe", "object", "embed", "base"} & set(parsed.tags)


def test_user_text_is_never_markup() -> None:
    hostile = '"><script>alert(1)</script>'
    places = ("name", "command", "model", "config.name", "training.method", "stages.0.summary",
              "encoding.speeds.1.device", "encoding.contact.0.pair_key")  # fmt: skip
    data = changed(sample_data(12), dict.fromkeys(places, hostile) | {"encoding.quarantined": {hostile: 1}})
    parsed = Page(render_report(data, sample_images()))
    assert "script" not in parsed.tags
    assert parsed.tags.count("img") == (2 * 2 + 2) * len(PROMPTS) + len(GRIDS)
    assert parsed.text.count(hostile) >= 9
    assert all(parsed.text.count(prompt) >= 3 for prompt in PROMPTS)  # two samples and one image of encoding


def test_every_row_that_was_read_is_accounted_for(page: str) -> None:
    text = re.sub(r"\s+", " ", Page(page).text)
    assert "612 kept + 30 tie + 8 duplicate + 18 quarantined = 668 rows read" in text
    for row in (
        "kept 612 91.6 %", "tie 30 4.5 %", "duplicate 8 1.2 %", "quarantined 18 2.7 %", "rows read 668 100.0 %",
        "truncated_image 4 An", "missing_prompt 13 The", "<odd> 1 (no explanation", "9,604 ab02", "9.1 MB",
        "with a reason 56 of 56 that were not kept", "train 560 pairs", "validation 52 pairs",
    ):  # fmt: skip
        assert row in text, row


def test_every_reason_is_explained() -> None:
    data = changed(sample_data(12), {"dataset.reasons": dict.fromkeys(Reason, 1)})
    assert "no explanation" not in render_report(data, {})


def test_the_outcome_is_put_into_words_and_never_oversold(page: str) -> None:
    text = Page(page).text
    assert "Held-out accuracy rose from 49.0 % to 75.5 %" in text
    assert "0.105 \u2192 0.328better: aligned is higher by 0.223 (0.213 to 0.233)" in text
    assert "0.264 \u2192 0.248no difference shown: -0.014 (-0.043 to 0.012); this run can see differences" in text
    data = changed(sample_data(12), {"training.validation.6.implicit_accuracy": 0.44})
    assert "fell from 49.0 % to 44.0 %, which is within the noise" in Page(render_report(data, {})).text
    data = changed(data, {"training.validation": data.training.validation[1:]})
    assert "was not measured on held-out pairs both before and after" in render_report(data, {})


@pytest.mark.parametrize("missing", ["dataset", "encoding", "fingerprints", "training", "evaluation", "model"])
def test_the_page_says_which_stages_have_not_run(missing: str) -> None:
    assert "has not run" not in render_report(sample_data(12), {})
    assert "has not run" in render_report(changed(sample_data(12), {missing: None}), {})


def _section(page: str, name: str) -> str:
    (section,) = re.findall(rf'<section id="{name}".*?</section>', page, re.DOTALL)
    return re.sub(r"\s+", " ", Page(section).text)


def test_the_encoding_section_shows_everything_recorded(page: str) -> None:
    text = _section(page, "encoding")
    for fact in (
        "Pairs 612", "Distinct images encoded for the 1,606 images of all pairs; each is used 1.07 times on",
        "on average 1,501",
        "Distinct prompts 6.80 pairs per prompt 90",
        "Prompts longer than 77 tokens 3.3 % of the prompts; the excess was cut 3", "Latents per pair 8.4 kB",
        "Text per pair 90.0 % less than the 10.2 kB of storing a text with every pair 1.0 kB",
        "Quarantined: non_finite The encoder returned non-finite numbers. 2", "Quarantined: truncated_image An",
        "Latents Text", "Encoded 803 pairs 91 prompts", "Images 1,499 \u2013", "Duration 12.3 s 1.6 s",
        "Images per second 122 \u2013", "Pairs per second 65.2 \u2013", "Prompts per second \u2013 56.9",
        "Device busy 93.4 % 71.2 %", "Actors 2 1", "Device cpu NVIDIA H100 80GB HBM3", "Batch size 8 64",
        "fetch read images 1.2 s 4.8 %", "3.0 s 12.0 %", "encode run the model 20.1 s 80.4 %",
        "0.5 s 2.0 %", "0.2 s 0.8 %", "1.1 s 73.3 %", "0.3 s 20.0 %", "0.1 s 6.7 %", "not of the time: the parts run",
        "a PSNR near 10 dB", "PSNR 28.4 dB \u00b7 64 \u00d7 64 \u00b7 image 0 of c0ffee00c0ffee00",
        "PSNR 29.4 dB \u00b7 80 \u00d7 64 \u00b7 image 1 of c0ffee01c0ffee01", "identical pixels \u00b7 64 \u00d7 64",
    ):  # fmt: skip
        assert fact in text, fact
    assert "out of memory" not in text
    assert page.index('id="data"') < page.index('id="encoding"') < page.index('id="workers"')


def test_the_encoding_section_shows_nothing_that_is_unknown() -> None:
    unknown = {"image_ratio": None, "truncated_prompts": 0, "quarantined": {}, "contact": [], "speeds.0.halved_to": 4}
    unknown |= {"bytes_per_pair.text": 20000.0}  # more than with every pair: nothing to boast of
    data = changed(sample_data(12), {f"encoding.{name}": value for name, value in unknown.items()})
    data = changed(data, {"encoding.speeds": data.encoding.speeds[:1]})
    text = _section(render_report(data, {}), "encoding")
    for fact in ("images of all pairs 1,501", "tokens 0 L", "Quarantined 0", "Text per pair 20.0 kB", "No contact",
                 "Latents ran out of memory at batch size 8; continued with 4."):  # fmt: skip
        assert fact in text, fact
    assert not re.search("prompts per second|work on text|less than|no explanation", text, re.IGNORECASE)


@pytest.mark.parametrize("speed", [None, {"latents": None, "text": None}])
def test_a_run_that_found_everything_encoded_has_no_speed(speed: dict[str, None] | None) -> None:
    data = changed(sample_data(12), {"encoding.speeds": speeds({"speed": speed})})
    text = _section(render_report(data, {}), "encoding")
    assert "This run encoded nothing: another run of this storage had already done it." in text
    assert not re.search("per second|Device|Work on|of the work", text)


def test_shares_of_the_work_add_up_to_one(page: str) -> None:
    (section,) = re.findall(r'<section id="encoding".*?</section>', page, re.DOTALL)
    grows = dict(re.findall(r"\.(grow-\d+) { flex-grow: ([\d.e-]+)", page))
    for bar in (bars := re.findall(r'<div class="bar".*?</div>', section)):
        assert sum(float(grows[name]) for name in re.findall(r"grow-\d+", bar)) == pytest.approx(1, abs=1e-5)
    for kind in ("latents", "text"):
        (table,) = re.findall(rf'aria-label="Work on {kind} by part">.*?</table>', section, re.DOTALL)
        shown = re.findall(r"([\d.]+) %", Page(table).text)
        assert sum(map(float, shown)) == pytest.approx(100, abs=1)
    assert len(bars) == 2
    assert [part.share for part in work_parts({"encode": 3.0, "pack": 1.0})] == [0.75, 0.25]
    assert [part.share for part in work_parts({"encode": 0.0})] == [0.0]


def test_the_contact_sheet_shows_every_image_or_says_which_is_missing(page: str) -> None:
    images = sample_images()
    for name in (names := contact_names()):
        assert base64.b64encode(images[name]).decode() in page
    del images[names[1]]
    text = _section(render_report(sample_data(12), images), "encoding")
    assert f"{names[1]} is missing" in text
    assert text.count("is missing") == 1


def test_grids_of_samples_are_shown_in_order_or_not_at_all(page: str) -> None:
    text = _section(page, "curves")
    places = [text.index(f"Step {step:,}", text.index("Samples during training")) for step in GRIDS]
    assert places == sorted(places)
    assert "Step 0 before training" in text
    data = changed(sample_data(12), {"training.samples": []})
    assert "Samples during training" not in render_report(data, sample_images())


def test_six_grids_of_this_training_are_chosen_evenly_with_both_ends(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert sample_grids(storage, "runs/photos", "0123") == []
    for step in range(0, 1100, 100):
        storage.write(f"runs/photos/samples/0123/step-{step:08}.jpg", b"")
    storage.write("runs/photos/samples/4567/step-00005000.jpg", b"of another training")
    chosen = sample_grids(storage, "runs/photos", "0123")
    assert [grid.step for grid in chosen] == [0, 200, 400, 600, 800, 1000]
    assert chosen[-1].image == "samples/0123/step-00001000.jpg"
    for step in range(200, 1000, 100):
        storage.delete(f"runs/photos/samples/0123/step-{step:08}.jpg")
    assert [grid.step for grid in sample_grids(storage, "runs/photos", "0123")] == [0, 100, 1000]


def test_accuracy_by_noise_level_is_shown_if_it_was_measured(page: str) -> None:
    text = _section(page, "curves")
    assert "at the lowest noise 0.500 0.600" in text
    assert "in the second quarter of the timesteps 0.500 0.700" in text
    assert "at the highest noise 0.500 0.900" in text
    data = sample_data(12)
    rows = [{k: v for k, v in row.items() if k != "implicit_accuracy_q2"} for row in data.training.validation]
    data = changed(data, {"training.validation": rows})
    assert "second quarter" not in render_report(data, {})


def test_speed_is_shown_as_far_as_it_was_measured(page: str) -> None:
    text = _section(page, "workers")
    for fact in (
        "median of the steps 7.4", "Time per step median 2.0 s",
        "Waiting for data share of the time of all steps 1.4 %", "median 41.2 %",
        "including recomputation; median 50.9 %", "Memory per worker peak, mean over the workers 61.5 GB",
    ):  # fmt: skip
        assert fact in text, fact
    assert "Steps skipped" not in text
    first = {"step": 1, "loss": 1.0, "skipped_steps": 0}
    data = changed(sample_data(12), {"training.history": [first, {"step": 2, "skipped_steps": 3}]})
    text = _section(render_report(data, {}), "workers")
    assert "no weights changed 3" in text
    assert not re.search("per second|Memory|utilization|Waiting", text)
    data = changed(data, {"training.history": [first]})
    assert "Speed" not in _section(render_report(data, {}), "workers")


def test_numbers_that_are_not_finite_are_left_out_and_named() -> None:
    data = changed(sample_data(12), {"training.history.3.loss": math.nan})
    page = render_report(data, {})
    assert not re.search(r' (d|c?x|c?y)="[^"]*nan', page)


def test_a_curve_lies_where_its_numbers_say() -> None:
    spec = ChartSpec("Loss", {"loss": "train"}, size=(162, 132))
    drawn = draw(spec, [Trace("train", "line", 0, [(0, 0.0), (50, 1.0), (100, 0.5)])])
    assert drawn.frame == Frame(46, 146, 10, 110, (0, 100), (0.0, 1.0))
    assert drawn.frame.path(drawn.traces[0].points) == "M46 110L96 10L146 60"
    assert drawn.x_ticks == [(46.0, "0"), (96.0, "50"), (146.0, "100")]
    assert drawn.y_ticks == [(110.0, "0"), (60.0, "0.5"), (10.0, "1")]
    plot = interval_plot(
        "style", [("base", Interval(0.08, 0.104, 0.128), False), ("x" * 30, Interval(0.3, 0.34, 0.379), True)]
    )
    assert (plot.frame.x(0.0), plot.frame.x(0.4), plot.height) == (146, 342, 96)
    assert [(row.label, row.y) for row in plot.rows] == [("base", 28), ("x" * 21 + "\u2026", 58)]


def test_ticks_and_numbers_are_round() -> None:
    assert round_ticks(0.13, 0.41) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert round_ticks(0, 3, min_step=1) == [0, 1, 2, 3]
    assert round_ticks(7, 7)[0] <= 7 <= round_ticks(7, 7)[-1]
    assert round_ticks(0, 1e-4, count=2) == [0, 5e-5, 1e-4]
    shown = [number(value) for value in (0.3, 1234.4, 2e-5, -0.004, 0.0, math.inf)]
    assert shown == ["0.300", "1,234", "2e-5", "\u22120.00400", "0", "\u2013"]


def test_a_long_series_keeps_its_spikes_and_its_mean() -> None:
    points = [(float(step), 1000.0 if step == 777 else step % 2) for step in range(5000)]
    assert len(kept := downsample(points)) <= MAX_POINTS
    assert (777.0, 1000.0) in kept
    assert kept == sorted(kept)
    assert smooth([(float(step), 3.0) for step in range(100)]) == [(float(step), 3.0) for step in range(100)]


def test_large_images_are_shrunk_and_small_ones_kept_as_they_are() -> None:
    data = sample_data(12)
    large, small = (image.name for image in data.evaluation.record.gallery[0].images.values())
    images = {**sample_images(), large: landscape(1, side=MAX_SIDE + 88)}
    page = render_report(data, images)
    assert base64.b64encode(images[small]).decode() in page
    copies = [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"image/jpeg;base64,([^\"]+)", page)
    ]
    sides = [MAX_SIDE] + [MAX_GRID_SIDE] * len(GRIDS)
    assert [copy.size for copy in copies] == [(side, side) for side in sides]
    assert f"{large} is missing" in render_report(data, {})


def test_the_page_of_a_live_run_says_so_and_reloads_itself() -> None:
    page = render_report(running(), {})
    text = re.sub(r"\s+", " ", Page(page).text)
    assert '<meta http-equiv="refresh" content="60">' in page
    assert "Training, step 700 of 1,200" in text
    assert "About 16 min 40 s of training left" in text  # 500 steps of 2 s
    assert "running since 22:00 UTC" in text
    assert "step 4: <slow> disk" in text
    assert page.index('id="stages"') < page.index('id="samples"')
    for state in ("finished", "failed", "stopped", "lost", "partial"):
        assert "refresh" not in render_report(running(state=state), {})


def test_results_of_an_earlier_training_are_marked() -> None:
    done = sample_data().stages
    data = changed(sample_data(), {"stages": [*done, StageRow("evaluate", StageState.WAITS)]})
    assert "until this one has its own: samples and scores." in render_report(data, {})
    data = changed(data, {"stages.2.status": StageState.RUNNING, "stages.2.began": "2026-11-23T22:00:00Z"})
    assert "until this one has its own: training, samples and scores." in render_report(data, {})
    assert "earlier training" not in render_report(sample_data(), {})


@pytest.mark.parametrize(("state", "said"), [("failed", "Failed"), ("stopped", "Stopped"), ("lost", "Interrupted")])
def test_an_interrupted_run_says_where_and_why_and_how_to_resume(state: str, said: str) -> None:
    text = Page(render_report(running(state=state, message="<b>disk full</b>\nhint: make room"), {})).text
    assert f"{said} during training, at step 700 of 1,200" in text
    assert "<b>disk full</b>\nhint: make room" in text
    assert "Rerun the same command to resume training from its last checkpoint: mapo run photos.yaml" in text


def test_the_cost_says_what_it_counts(page: str) -> None:
    text = _section(page, "stages")
    assert "2.50 GPU hours = 6.25 EUR at 2.50 EUR per GPU hour" in text
    assert "train 2 1 h 15 min 2 GPUs 2.50" in text
    assert "Not counted: 1 execution whose driver vanished" in text
    assert "Long pauses are shortened: 2 h 00 min in all" in text


def test_lineage_names_sources_devices_and_rounds(page: str) -> None:
    text = _section(page, "lineage")
    assert "pickapic data/*.parquet" in text
    assert "train on 2 \u00d7 cpu (10.0.0.1)" in text
    assert "1 base model 3 560 1,200 23 November 2026, 22:50 UTC" in text


def test_the_content_security_policy_allows_our_style_and_nothing_else(page: str) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert source_digest(style) in policy
    assert "unsafe" not in policy
    assert " style=" not in page


def test_a_page_of_two_thousand_steps_takes_less_than_half_a_second() -> None:
    data = sample_data(2000)
    started = time.process_time()
    render_report(data, {})
    assert time.process_time() - started < 0.5


def test_every_table_has_a_caption(page: str) -> None:
    parsed = Page(page)
    assert parsed.tags.count("table") == parsed.tags.count("caption") > 8


@needs_chromium
@pytest.mark.parametrize(
    ("state", "dark"), [("finished", False), ("finished", True), ("running", True), ("failed", False)]
)
def test_a_phone_shows_the_page_legibly_and_without_sideways_scrolling(state: str, dark: bool, tmp_path: Path) -> None:
    data = sample_data() if state == "finished" else running(state=state, message="no room\nhint: make room")
    (tmp_path / "report.html").write_text(render_report(data, sample_images()))
    script = """const root = doc.documentElement, style = page.getComputedStyle(doc.querySelector('.bar i'))
        const requests = page.performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))
        return [root.clientWidth, root.scrollWidth, requests.length, style.flexGrow,
            (() => {CONTRAST})()].join(' ')""".replace("CONTRAST", CONTRAST)
    seen = look(tmp_path, "report.html", script, dark=dark)
    assert seen.console == []
    width, scroll_width, requests, grow, contrast, *where = seen.text.split()
    assert (width, scroll_width, requests, grow) == ("390", "390", "0", "612")
    assert float(contrast) >= 4.5, where
