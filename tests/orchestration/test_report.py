"""The report: self-contained, complete, escaped, and drawn where the numbers say."""

import base64
import io
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from orchestration import encoding_view, report
from orchestration.report import render_report
from orchestration.report_data import sample_grids
from pipelines.dataset.pair import Reason
from pipelines.dataset.storage import Storage

ENDS = ("low", "mean", "high")
CONTACT = ("source", "decoded")
GRIDS = (0, 400, 800, 1200)
PROMPTS = (
    "a cat on a sofa", "a red bicycle against a wall", "a bowl of lemons", "mountains after rain",
    '<script>alert("x")</script> & <img src=x onerror=alert(1)>', "an old harbour at dawn, " * 30, "x" * 300,
    "\U0001f98a\U0001f342 a fox, \u79cb\u306e\u68ee\u306e\u4e2d\u306e\u8d64\u3044\u72d0",
)  # fmt: skip


def _image(seed: int, *, side: int = 64, styled: bool = False) -> bytes:
    """A small landscape; styled: in warm colours, as a style taught from preferences would be."""
    rng = random.Random(seed)
    image = Image.new("RGB", (side, side), (240, 190, 120) if styled else (150, 180, 205))
    draw = ImageDraw.Draw(image)
    for layer in range(3):
        top, waves = side * (0.45 + 0.16 * layer) + rng.uniform(-4, 4), rng.uniform(4, 9)
        tint = (200 - 50 * layer, 90 - 20 * layer, 40) if styled else (95 - 22 * layer,) * 3
        edge = [(x, top + side * 0.08 * math.sin(x / side * waves + seed + layer)) for x in range(side)]
        draw.polygon([*edge, (side, side), (0, side)], fill=tint)
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def _step(step: int, progress: float, rng: random.Random, noise: float) -> dict[str, float]:
    gain = 1 - math.exp(-4 * progress)
    chosen, rejected = (mean + noise * rng.gauss(0, 0.035) for mean in (0.21 - 0.06 * gain, 0.215 + 0.02 * gain))
    accuracy = min(1.0, max(0.0, 0.49 + 0.27 * gain + noise * rng.gauss(0, 0.12)))
    return {
        "step": step, "loss": chosen + 0.0866 - 0.02 * gain, "mse_chosen": chosen, "mse_rejected": rejected,
        "margin": rejected - chosen, "implicit_accuracy": round(accuracy * 16) / 16 if noise else accuracy,
    }  # fmt: skip


def sample_data(num_steps: int = 1200) -> dict[str, Any]:
    """What the report relies on, spelled out."""
    return {
        "name": "photos", "created_at": "2026-11-23T23:10:00Z", "command": "mapo run photos.yaml",
        "config": {"name": "photos", "storage": "runs/photos", "train": {"loss": {"beta": 8.0}}},
        "versions": {"mapo": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "python": "3.11.9"},
        "state": "finished", "stage": None, "message": "", "started_at": "2026-11-23T20:00:00Z",
        "timeline": {"width": 1000.0, "pauses": [300.0], "pause_width": 12.0, "left_out_s": 7200.0, "is_open": False,
                     "began": "2026-11-23T20:00:00Z", "ended": "2026-11-23T23:10:00Z",
                     "bars": [{"stage": "ingest", "state": "done", "x": 0.0, "width": 8.0},
                              {"stage": "train", "state": "failed", "x": 8.0, "width": 292.0},
                              {"stage": "train", "state": "done", "x": 312.0, "width": 688.0}]},
        "cost": {"gpu_hours": 2.5, "cpu_hours": 0.0, "num_lost": 1,
                 "price": {"amount": 6.25, "hour": 2.5, "currency": "EUR"},
                 "stages": [{"stage": "train", "devices": 2, "kind": "GPU", "hours": 2.5, "seconds": 4500.0,
                             "attempts": 2}]},
        "places": [{"node": "10.0.0.1", "device": "cpu", "count": 2, "what": "train"}],
        "sources": [{"format": "pickapic", "path": "data/*.parquet"}],
        "rounds": [{"round": 1, "key": "0123", "steps": 1200, "finished_at": "2026-11-23T22:50:00Z", "parent": None,
                    "checkpoint": "runs/photos/checkpoints/0123/step", "pairs_version": 3, "num_pairs": 560}],
        "stages": [{"name": name, "seconds": seconds, "summary": summary, "status": "done" if seconds else "up to date",
                    "began": None}
                   for name, seconds, summary in (("ingest", 12.3, "668 rows: 612 kept, 56 not"), ("encode", None, ""),
                                                  ("train", 2587.0, "1,200 steps on 2 workers"))],
        "dataset": {
            "storage": "runs/photos", "version": 3, "shards": 2, "bytes": 9123456, "prompts": 90,
            "rows": {"kept": 612, "tie": 30, "duplicate": 8, "quarantined": 18},
            "reasons": {"equal_preference": 30, "repeated": 8, "truncated_image": 4, "missing_prompt": 13, "<odd>": 1},
            "splits": {"train": 560, "validation": 52},
        },
        "encoding": _encoding(),
        "fingerprints": {"latents": "9f" * 16, "text": "77" * 16},
        "training": _training(num_steps),
        "evaluation": {
            "num_samples": 64, "num_inference_steps": 25, "guidance_scale": 3.0,
            "scores": [{"name": name, "description": f"How far the {name} is met.",
                        "base": dict(zip(ENDS, base, strict=True)), "aligned": dict(zip(ENDS, aligned, strict=True))}
                       for name, base, aligned in (("style", (0.08, 0.104, 0.128), (0.3, 0.341, 0.379)),
                                                   ("content", (0.25, 0.26, 0.27), (0.24, 0.255, 0.265)))],
            "samples": [{"prompt": prompt, "seed": 17 + i, "base": f"base-{i:03}.png", "aligned": f"aligned-{i:03}.png"}
                        for i, prompt in enumerate(PROMPTS * 2)],
        },
        "model": "runs/photos/runs/photos/model",
    }  # fmt: skip


def _training(num_steps: int) -> dict[str, Any]:
    rng = random.Random(0)
    history = [
        {**_step(step, step / num_steps, rng, 1.0), "grad_norm": 0.8 * math.exp(rng.gauss(0, 0.35)),
         "learning_rate": 1e-4 * min(1, step / 50) * (1 - step / num_steps), "pairs_per_s": rng.gauss(7.4, 0.3),
         "step_s": 2.0 if step > 1 else 20.0, "data_wait_ratio": 0.01 if step > 1 else 0.5, "mfu": 0.412, "hfu": 0.509,
         "memory_bytes": 61.5e9 + step, "skipped_steps": 0}
        for step in range(1, num_steps + 1)
    ]  # fmt: skip
    measured = range(0, num_steps + 1, num_steps // 6)
    worker = {"world_size": 2, "node": "10.0.0.1", "device": "cpu", "backend": "gloo", "zero_stage": 2}
    return {
        "method": "mapo_paper", "loss": {"beta": 8.0}, "steps": num_steps, "max_steps": num_steps,
        "is_over": True, "notes": [], "zero_stage": 2, "world_size": 2,
        "precision": "fp32", "global_batch_size": 16, "num_starts": 2, "history": history,
        "validation": [{**_step(step, step / num_steps, rng, 0.0), **_quarters(step / num_steps), "num_pairs": 52.0}
                       for step in measured],
        "samples": [{"step": step, "image": f"samples/0123/step-{step:08}.jpg"} for step in GRIDS],
        "workers": [{**worker, "rank": rank, "pid": 4711 + rank, "num_pairs": 9604 + rank, "digest": f"ab{rank}2" * 4}
                    for rank in (0, 1)],
    }  # fmt: skip


def _quarters(progress: float) -> dict[str, float]:
    return {f"implicit_accuracy_q{quarter}": 0.5 + progress * quarter / 10 for quarter in (1, 2, 3, 4)}


def _grid(progress: float) -> bytes:
    """Four landscapes, the more styled the later."""
    grid = Image.new("RGB", (1032, 1032), (128, 128, 128))
    for i in range(4):
        plain, styled = (Image.open(io.BytesIO(_image(40 + i, side=512, styled=each))) for each in (False, True))
        grid.paste(Image.blend(plain, styled, progress), (520 * (i % 2), 520 * (i // 2)))
    grid.save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def _encoding() -> dict[str, Any]:
    shared = {"num_actors": 2, "device": "cpu", "batch_size": 8, "halved_to": None}
    return {
        "pairs": 612, "images": 1501, "image_slots": 1606, "prompts": 90, "truncated_prompts": 3, "max_tokens": 77,
        "image_ratio": 1.07, "text_ratio": 6.8, "quarantined": {"non_finite": 2, "truncated_image": 1},
        "bytes_per_pair": {"latents": 8420.0, "text": 1020.5, "text_per_pair_storage": 10205.0},
        "speed": {
            "latents": {**shared, "seconds": 12.3, "items": 803, "images": 1499, "images_per_s": 122.0,
                        "items_per_s": 65.25, "busy_ratio": 0.934,
                        "seconds_by_part": {"fetch": 1.2, "decode": 3.0, "encode": 20.1, "pack": 0.5, "upload": 0.2}},
            "text": {**shared, "seconds": 1.6, "items": 91, "images": 0, "images_per_s": 0.0, "items_per_s": 56.9,
                     "busy_ratio": 0.712, "num_actors": 1, "device": "NVIDIA H100 80GB HBM3", "batch_size": 64,
                     "seconds_by_part": {"encode": 1.1, "pack": 0.3, "upload": 0.1}},
        },
        "contact": [
            {"pair_key": f"c0ffee{i:02}" * 4, "prompt": prompt, "side": i % 2, "bucket": [64 + 16 * (i % 2), 64],
             "psnr": None if i == 2 else 28.4 + i, "source": f"encode/contact-{i:03}-source.png",
             "decoded": f"encode/contact-{i:03}-decoded.png"}
            for i, prompt in enumerate(PROMPTS)
        ],
    }  # fmt: skip


def sample_images() -> dict[str, bytes]:
    names = sample_data(6)["evaluation"]["samples"]
    samples = {name: _image(sample["seed"], styled=name.startswith("aligned"))
               for sample in names for name in (sample["base"], sample["aligned"])}  # fmt: skip
    contact = {image[kind]: _image(100 + i) for i, image in enumerate(_encoding()["contact"]) for kind in CONTACT}
    return samples | contact | {f"samples/0123/step-{step:08}.jpg": _grid(step / GRIDS[-1]) for step in GRIDS}


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(sample_data(), sample_images())


class _Page(HTMLParser):
    """What a browser would fetch, run and show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = self.style = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.text += " " * (tag in ("td", "th", "dd", "li"))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["style"]:
            self.style += data
        else:
            self.text += data.replace("\u00a0", " ")


def test_nothing_is_fetched_from_elsewhere(page: str) -> None:
    parsed = _Page(page)
    assert all(address.startswith(("data:", "#")) or address == "../../index.html" for address in parsed.addresses)
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page
    assert not {"script", "iframe", "object", "embed", "base"} & set(parsed.tags)


def test_what_a_user_wrote_is_text_and_never_markup() -> None:
    data = sample_data(12)
    hostile = '"><script>alert(1)</script>'
    data["name"] = data["command"] = data["model"] = data["config"]["name"] = data["training"]["method"] = hostile
    data["stages"][0]["summary"] = data["evaluation"]["scores"][0]["name"] = hostile
    data["encoding"]["speed"]["text"]["device"] = data["encoding"]["contact"][0]["pair_key"] = hostile
    data["encoding"]["quarantined"][hostile] = 1
    parsed = _Page(render_report(data, sample_images()))
    assert "script" not in parsed.tags
    assert parsed.tags.count("img") == (2 * 2 + 2) * len(PROMPTS) + len(GRIDS)
    assert parsed.text.count(hostile) >= 11
    assert all(parsed.text.count(prompt) >= 3 for prompt in PROMPTS)  # two samples and one image of encoding


def test_every_row_that_was_read_is_accounted_for(page: str) -> None:
    text = re.sub(r"\s+", " ", _Page(page).text)
    assert "612 kept + 30 tie + 8 duplicate + 18 quarantined = 668 rows read" in text
    for row in (
        "kept 612 91.6 %", "tie 30 4.5 %", "duplicate 8 1.2 %", "quarantined 18 2.7 %", "rows read 668 100.0 %",
        "truncated_image 4 An", "missing_prompt 13 The", "<odd> 1 (no explanation", "9,604 ab02", "9.1 MB",
        "with a reason 56 of 56 that were not kept", "train 560 pairs", "validation 52 pairs",
    ):  # fmt: skip
        assert row in text, row


def test_every_reason_of_the_table_is_explained() -> None:
    data = sample_data(12)
    data["dataset"]["reasons"] = dict.fromkeys(Reason, 1)
    assert "no explanation" not in render_report(data, {})


def test_the_outcome_is_told_in_words_and_never_oversold(page: str) -> None:
    text = _Page(page).text
    assert "Held-out accuracy rose from 49.0 % to 75.5 %" in text
    assert "0.104 \u2192 0.341rose: the intervals are apart" in text
    assert "0.260 \u2192 0.255no clear change: the intervals overlap" in text
    data = sample_data(12)
    data["training"]["validation"][-1]["implicit_accuracy"] = 0.44
    assert "fell from 49.0 % to 44.0 %, which is within the noise" in _Page(render_report(data, {})).text
    del data["training"]["validation"][0]
    assert "was not measured on held-out pairs both before and after" in render_report(data, {})


@pytest.mark.parametrize("missing", ["dataset", "encoding", "fingerprints", "training", "evaluation", "model"])
def test_a_stage_that_has_not_run_is_said_to_be_missing(missing: str) -> None:
    data = sample_data(12)
    said = render_report({**data, missing: None}, {})
    del data[missing]
    assert said == render_report(data, {})
    assert "has not run" in said


def _section(page: str, name: str) -> str:
    (section,) = re.findall(rf'<section id="{name}".*?</section>', page, re.DOTALL)
    return re.sub(r"\s+", " ", _Page(section).text)


def test_the_encoding_section_tells_all_that_was_recorded(page: str) -> None:
    text = _section(page, "encoding")
    for fact in (
        "Pairs 612", "Distinct images encoded for the 1,606 images of the pairs, 1.07 to each 1,501",
        "Distinct prompts 6.80 pairs a prompt 90", "Prompts longer than 77 tokens 3.3 % of the prompts; what comes",
        "after was cut 3", "Latents, a pair 8.4 kB",
        "Text, a pair 90.0 % less than the 10.2 kB of a text stored with every pair 1.0 kB",
        "Quarantined: non_finite The encoder gave numbers that are not finite. 2", "Quarantined: truncated_image An",
        "Latents Text", "Encoded 803 pairs 91 prompts", "Images 1,499 \u2013", "Time 12.3 s 1.6 s",
        "Images a second 122 \u2013", "Pairs a second 65.2 \u2013", "Prompts a second \u2013 56.9",
        "Device busy 93.4 % 71.2 %", "Actors 2 1", "Device cpu NVIDIA H100 80GB HBM3", "Batch size 8 64",
        "fetch reads images 1.2 s 4.8 %", "3.0 s 12.0 %", "encode runs the model 20.1 s 80.4 %",
        "0.5 s 2.0 %", "0.2 s 0.8 %", "1.1 s 73.3 %", "0.3 s 20.0 %", "0.1 s 6.7 %", "not of the time: the parts run",
        "a PSNR near 10 dB", "PSNR 28.4 dB \u00b7 64 \u00d7 64 \u00b7 image 0 of c0ffee00c0ffee00",
        "PSNR 29.4 dB \u00b7 80 \u00d7 64 \u00b7 image 1 of c0ffee01c0ffee01", "no pixel differs \u00b7 64 \u00d7 64",
    ):  # fmt: skip
        assert fact in text, fact
    assert "out of memory" not in text
    assert page.index('id="data"') < page.index('id="encoding"') < page.index('id="workers"')


def test_what_is_not_known_of_encoding_is_not_made_up() -> None:
    data = sample_data(12)
    data["encoding"].update(image_ratio=None, truncated_prompts=0, quarantined={}, contact=[])
    data["encoding"]["bytes_per_pair"]["text"] = 20000.0  # more than with every pair: nothing to boast of
    data["encoding"]["speed"]["latents"].update(halved_to=4)
    data["encoding"]["speed"]["text"] = None
    text = _section(render_report(data, {}), "encoding")
    for fact in ("images of the pairs 1,501", "tokens 0 L", "Quarantined 0", "Text, a pair 20.0 kB", "No contact sheet",
                 "Latents ran out of memory with 8 a pass; went on with 4."):  # fmt: skip
        assert fact in text, fact
    assert not re.search("prompts a second|work on text|less than|no explanation", text, re.IGNORECASE)


@pytest.mark.parametrize("speed", [None, {"latents": None, "text": None}])
def test_a_run_that_found_everything_encoded_has_no_speed(speed: dict[str, None] | None) -> None:
    data = sample_data(12)
    data["encoding"]["speed"] = speed
    text = _section(render_report(data, {}), "encoding")
    assert "This run encoded nothing: another run of this storage had done it." in text
    assert not re.search("a second|Device|Work on|of the work", text)


def test_shares_of_the_work_make_a_whole(page: str) -> None:
    (section,) = re.findall(r'<section id="encoding".*?</section>', page, re.DOTALL)
    grows = dict(re.findall(r"\.(grow-\d+) { flex-grow: ([\d.e-]+)", page))
    for bar in (bars := re.findall(r'<div class="bar".*?</div>', section)):
        assert sum(float(grows[name]) for name in re.findall(r"grow-\d+", bar)) == pytest.approx(1, abs=1e-5)
    for kind in ("latents", "text"):
        (table,) = re.findall(rf'aria-label="Work on {kind} by part">.*?</table>', section, re.DOTALL)
        shown = re.findall(r"([\d.]+) %", _Page(table).text)
        assert sum(map(float, shown)) == pytest.approx(100, abs=1)
    assert len(bars) == 2
    assert [part["share"] for part in encoding_view.shares({"encode": 3.0, "pack": 1.0})] == [0.75, 0.25]
    assert [part["share"] for part in encoding_view.shares({"encode": 0.0})] == [0.0]


def test_the_contact_sheet_shows_every_image_or_says_which_is_missing(page: str) -> None:
    images = sample_images()
    for name in (names := [image[kind] for image in _encoding()["contact"] for kind in CONTACT]):
        assert base64.b64encode(images[name]).decode() in page
    del images[names[1]]
    text = _section(render_report(sample_data(12), images), "encoding")
    assert f"{names[1]} is missing" in text
    assert text.count("is missing") == 1


def test_grids_of_samples_are_shown_in_order_or_not_at_all(page: str) -> None:
    text = _section(page, "curves")
    places = [text.index(f"Step {step:,}", text.index("Samples while training")) for step in GRIDS]
    assert places == sorted(places)
    assert "Step 0 before training" in text
    data = sample_data(12)
    data["training"]["samples"] = []
    assert "Samples while training" not in render_report(data, sample_images())


def test_six_grids_of_this_training_are_chosen_evenly_with_both_ends(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert sample_grids(storage, "runs/photos", "0123") == []
    for step in range(0, 1100, 100):
        storage.write(f"runs/photos/samples/0123/step-{step:08}.jpg", b"")
    storage.write("runs/photos/samples/4567/step-00005000.jpg", b"of another training")
    chosen = sample_grids(storage, "runs/photos", "0123")
    assert [grid["step"] for grid in chosen] == [0, 200, 400, 600, 800, 1000]
    assert chosen[-1]["image"] == "samples/0123/step-00001000.jpg"
    for step in range(200, 1000, 100):
        storage.delete(f"runs/photos/samples/0123/step-{step:08}.jpg")
    assert [grid["step"] for grid in sample_grids(storage, "runs/photos", "0123")] == [0, 100, 1000]


def test_the_accuracy_at_each_noise_is_told_where_it_was_measured(page: str) -> None:
    text = _section(page, "curves")
    assert "at the least noise 0.500 0.600" in text
    assert "in the second quarter of the timesteps 0.500 0.700" in text
    assert "at the most noise 0.500 0.900" in text
    data = sample_data(12)
    for row in data["training"]["validation"]:
        del row["implicit_accuracy_q2"]
    assert "second quarter" not in render_report(data, {})


def test_speed_is_told_as_far_as_it_was_measured(page: str) -> None:
    text = _section(page, "workers")
    for fact in (
        "median of the steps 7.4", "Time of a step median 2.0 s", "Waiting for data of the time of all steps 1.4 %",
        "median 41.2 %", "computes again 50.9 %", "Memory of a worker at its most, mean of the workers 61.5 GB",
    ):  # fmt: skip
        assert fact in text, fact
    assert "Steps skipped" not in text
    data = sample_data(12)
    data["training"]["history"] = [{"step": 1, "loss": 1.0, "skipped_steps": 0}, {"step": 2, "skipped_steps": 3}]
    text = _section(render_report(data, {}), "workers")
    assert "no weight changed 3" in text
    assert not re.search("a second|Memory|utilization|Waiting", text)
    data["training"]["history"] = [{"step": 1, "loss": 1.0, "skipped_steps": 0}]
    assert "Speed" not in _section(render_report(data, {}), "workers")


def test_numbers_that_are_not_finite_are_left_out_and_named() -> None:
    data = sample_data(12)
    data["training"]["history"][3]["loss"] = math.nan
    data["evaluation"]["scores"][0]["base"]["mean"] = math.nan
    text = _Page(page := render_report(data, {})).text
    assert "style: not a finite number" in text
    assert not re.search(r' (d|c?x|c?y)="[^"]*nan', page)


def test_a_curve_lies_where_its_numbers_say() -> None:
    drawn = report.chart([report.Trace("train", "line", 0, [(0, 0.0), (50, 1.0), (100, 0.5)])], size=(162, 132))
    assert (frame := drawn["frame"]) == report.Frame(46, 146, 10, 110, (0, 100), (0.0, 1.0))
    assert frame.path(drawn["traces"][0].points) == "M46 110L96 10L146 60"
    assert drawn["x_ticks"] == [(46.0, "0"), (96.0, "50"), (146.0, "100")]
    assert drawn["y_ticks"] == [(110.0, "0"), (60.0, "0.5"), (10.0, "1")]
    plot = report.interval_plot(sample_data(12)["evaluation"]["scores"][0])  # from 0.08 to 0.379
    assert (plot["frame"].x(0.0), plot["frame"].x(0.4), plot["apart"]) == (58, 346, True)


def test_ticks_and_numbers_are_round() -> None:
    assert report.round_ticks(0.13, 0.41) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert report.round_ticks(0, 3, min_step=1) == [0, 1, 2, 3]
    assert report.round_ticks(7, 7)[0] <= 7 <= report.round_ticks(7, 7)[-1]
    assert report.round_ticks(0, 1e-4, count=2) == [0, 5e-5, 1e-4]
    shown = [report.number(value) for value in (0.3, 1234.4, 2e-5, -0.004, 0.0, math.inf)]
    assert shown == ["0.300", "1,234", "2e-5", "\u22120.00400", "0", "\u2013"]


def test_a_long_series_keeps_its_spikes_and_its_mean() -> None:
    points = [(float(step), 1000.0 if step == 777 else step % 2) for step in range(5000)]
    assert len(kept := report.downsample(points)) <= report.MAX_POINTS
    assert (777.0, 1000.0) in kept
    assert kept == sorted(kept)
    assert report.smooth([(float(step), 3.0) for step in range(100)]) == [(float(step), 3.0) for step in range(100)]


def test_a_large_image_becomes_a_small_copy_and_a_small_one_stays_as_it_is() -> None:
    images = {**sample_images(), "base-000.png": _image(1, side=report.MAX_SIDE + 88)}
    page = render_report(sample_data(12), images)
    assert base64.b64encode(images["aligned-000.png"]).decode() in page
    copies = [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"image/jpeg;base64,([^\"]+)", page)
    ]
    sides = [report.MAX_SIDE] + [report.MAX_GRID_SIDE] * len(GRIDS)
    assert [copy.size for copy in copies] == [(side, side) for side in sides]
    assert "base-000.png is missing" in render_report(sample_data(12), {})


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on PATH")
def test_a_phone_shows_the_page_without_sideways_scrolling(page: str, tmp_path: Path) -> None:
    """Chromium's own window is never as narrow as a phone, so the page is put in a frame of 360 px."""
    (tmp_path / "report.html").write_text(page.replace('http-equiv="Content', 'name="Content'))  # nothing is tried
    script = """onload = () => { const page = frames[0], root = page.document.documentElement
        const requests = page.performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))
        document.title = `measured ${root.clientWidth} ${root.scrollWidth} ${requests.length}` }"""
    frame = '<iframe src="report.html" style="width:360px;border:0"></iframe>'
    (tmp_path / "phone.html").write_text(f"{frame}<script>{script}</script>")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         "--allow-file-access-from-files", f"--user-data-dir={tmp_path}/profile", "--dump-dom",
         (tmp_path / "phone.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>measured 360 360 0<" in done.stdout, done.stderr  # client width, scroll width, requests
